"""Finds the smallest allocation that keeps accuracy: the budget is the loss that is accepted.

In: a prepared model, its scores, a :class:`~infoq_fx.Tolerance`, and samples to calibrate and to validate with. Out:
the allocation, its recovered model, and every step with the loss that was measured.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

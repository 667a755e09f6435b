"""Recovers accuracy lost to rounding, without labels, at fixed bit-widths.

In: a :class:`~infoq_fx.PreparedModel`, bit-widths by site, data. Out: a copy with better weights, biases and scales.
Each step is one file in ``steps``; ``ladder`` names the steps and runs them in order.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

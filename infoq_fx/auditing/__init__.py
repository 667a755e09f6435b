"""Compares criteria on the user's model by the accuracy of their allocations.

In: a model, data, budgets, criteria. Out: an :class:`~infoq_fx.Audit` with a row for each way to allocate.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""Chooses the bit-width of every layer from scores and a budget by an exact integer program (paper, Eq. 5).

In: a :class:`~infoq_fx.SensitivityTable` and a :class:`~infoq_fx.Budget`. Out: an :class:`~infoq_fx.Allocation`.
Nothing here imports torch; an allocation takes milliseconds on a laptop.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

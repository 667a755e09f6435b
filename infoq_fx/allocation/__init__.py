"""From scores and a budget to a bit-width for every layer (paper, Eq. 5), exactly.

In: a :class:`~infoq_fx.SensitivityTable` and a :class:`~infoq_fx.Budget`. Out: an :class:`~infoq_fx.Allocation`.
Nothing here imports torch: an allocation takes milliseconds on any laptop.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

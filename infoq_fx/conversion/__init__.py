"""Converts a prepared model into a quantized module at the bit-widths of an allocation.

In: a :class:`~infoq_fx.PreparedModel` and an :class:`~infoq_fx.Allocation`. Out: a :class:`~infoq_fx.QuantizedModule`
with integer weights and a record of how it was made. The prepared model is not changed.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

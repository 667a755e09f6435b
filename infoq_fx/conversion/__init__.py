"""A prepared model at the bit-widths of an allocation becomes the quantized module.

In: a :class:`~infoq_fx.PreparedModel` and an :class:`~infoq_fx.Allocation`. Out: a :class:`~infoq_fx.QuantizedModule`
with integer weights, which remembers how it was made. The prepared model stays as it is.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""Quantization of tensors, and the modules and custom ops that do it inside a graph.

In: tensors, and how they are quantized (:class:`infoq_fx.types.QuantSpec`). Out: scales, zero points, integers, and
the :class:`PreparedModel` that holds a quantizer for every site. The core is four kinds of pure functions: choose
qparams, quantize, dequantize and fake quantize.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

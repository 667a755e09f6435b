"""From float tensors to integers and back, and the modules and ops that do it inside of a graph.

In: tensors, and how they are quantized (:class:`infoq_fx.types.QuantSpec`). Out: scales, zero points, integers, and
the :class:`PreparedModel` that holds a quantizer for every site. The verbs are ``choose``, ``quantize``, ``dequantize``
and ``fake_quantize``: functions of their arguments, without state.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

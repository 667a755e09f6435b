"""From a quantized module to what other programs run: ONNX, ``.pt2`` files, ``torch.compile``, PT2E.

In: a :class:`~infoq_fx.QuantizedModule`. Out: files that were checked before they are at their place, and adapters for
PyTorch's own compile flows. Only this room imports onnx, onnxruntime, OpenVINO and torchao.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

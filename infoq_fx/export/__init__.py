"""Exports quantized modules: ONNX and ``.pt2`` files, ``torch.compile``, PT2E.

In: a :class:`~infoq_fx.QuantizedModule`. Out: files that are checked before they are moved to their path, and adapters
for PyTorch's compile flows. Only this package imports onnx, onnxruntime, OpenVINO and torchao.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

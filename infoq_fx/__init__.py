"""Mixed-precision quantization of trained networks as a ``torch.fx`` compiler pass: finds every layer's bit-width.

quantized = infoq_fx.quantize(model, 3.0, calibration_data=loader)
infoq_fx.export_onnx(quantized, "model.onnx")

The public names are listed in ``__init__.pyi``. Each is imported on first use (PEP 562), so that the command line's
help and an allocation do not wait for torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ = [name for name in __all__ if name != "InfoqQuantizer"]  # needs an extra: ``import *`` works without it

"""infoq_fx finds the bit-width of every layer of a trained network, as a ``torch.fx`` compiler pass.

quantized = infoq_fx.quantize(model, 3.0, calibration_data=loader)
infoq_fx.export_onnx(quantized, "model.onnx")

The public names are listed in ``__init__.pyi``. Each is imported when it is first used (PEP 562): the help of the command
line, and an allocation on a laptop, do not wait for torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ = [name for name in __all__ if name != "InfoqQuantizer"]  # needs an extra: ``import *`` works without it

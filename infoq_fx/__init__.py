"""infoq_fx: every layer's bit-width by information flow, as a torch.fx compiler pass.

quantized = infoq_fx.quantize(model, 3.0, calibration_data=loader)
infoq_fx.export_onnx(quantized, "model.onnx")
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or Path("".join(sys.argv[:1])).stem != "infoq-fx":
    from infoq_fx.names import *  # noqa: F403
    from infoq_fx.names import __all__ as __all__
    from infoq_fx.names import __version__ as __version__
else:
    # The command's help and completion, and an allocation on a laptop, must not wait for torch.
    def __getattr__(name: str) -> Any:
        import importlib

        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)
        try:
            return getattr(importlib.import_module("infoq_fx.names"), name)
        except AttributeError:
            raise AttributeError(f"module 'infoq_fx' has no attribute {name!r}") from None

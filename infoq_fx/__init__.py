"""infoq_fx: every layer's bit-width by information flow, as a torch.fx compiler pass.

quantized = infoq_fx.quantize(model, 3.0, calibration_data=loader)
infoq_fx.export_onnx(quantized, "model.onnx")
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The command's help and completion, and an allocation on a laptop, must not wait for torch.
_IS_COMMAND = Path("".join(sys.argv[:1])).stem == "infoq-fx"

if TYPE_CHECKING or not _IS_COMMAND:
    from infoq_fx.names import *  # noqa: F403
    from infoq_fx.names import __all__ as __all__
    from infoq_fx.names import __version__ as __version__

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        import importlib.util

        is_module = importlib.util.find_spec(f"{__name__}.{name}") is not None
        if is_module or (name.startswith("__") and name != "__version__"):
            raise AttributeError(name)  # an import of a module goes on behind this
        return getattr(importlib.import_module("infoq_fx.names"), name)

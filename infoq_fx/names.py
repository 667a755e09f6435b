"""The public names, each from the file that it lives in; the package itself has the same ones."""

from typing import Any

from infoq_fx.allocation import allocate
from infoq_fx.allocation_file import load_allocation, save_allocation
from infoq_fx.api import convert, prepare, quantize, recover, refine, score
from infoq_fx.auditing import Audit, audit
from infoq_fx.compile_flows import InfoqPass, backend
from infoq_fx.cost import COSTS, OperationCost
from infoq_fx.criteria import CRITERIA, EAGL, Criterion, FunctionCriterion, InfoQ, InfoQPaper
from infoq_fx.encoders import load_dinov2
from infoq_fx.errors import (
    CalibrationDataError,
    EncoderUnavailableError,
    ExportError,
    InfeasibleBudgetError,
    InfoqError,
    MissingExtraError,
    OptionError,
    UnsupportedModelError,
)
from infoq_fx.finetuning import finetune
from infoq_fx.onnx_export import export_onnx
from infoq_fx.prepared import PreparedModel
from infoq_fx.quantized import QuantizedModule, allocation_of, summarize
from infoq_fx.quantized_files import load_quantized, save_quantized
from infoq_fx.recovery import (
    RECOVERY_STEPS,
    BiasCorrection,
    BlockReconstruction,
    OutputTuning,
    RangeEqualization,
    RecoveryStep,
    SecondOrderRounding,
)
from infoq_fx.report import write_report
from infoq_fx.retraining import to_quantized, to_trainable
from infoq_fx.spec import Allocation, Budget, Observer
from infoq_fx.table import SensitivityTable
from infoq_fx.targets import CONTAINERS, TARGETS, Container, Target
from infoq_fx.verification import LevelResult, Verification, verify_onnx
from infoq_fx.version import __version__

__all__ = [
    "CONTAINERS",
    "COSTS",
    "CRITERIA",
    "EAGL",
    "RECOVERY_STEPS",
    "TARGETS",
    "Allocation",
    "Audit",
    "BiasCorrection",
    "BlockReconstruction",
    "Budget",
    "CalibrationDataError",
    "Container",
    "Criterion",
    "EncoderUnavailableError",
    "ExportError",
    "FunctionCriterion",
    "InfeasibleBudgetError",
    "InfoQ",
    "InfoQPaper",
    "InfoqError",
    "InfoqPass",
    "LevelResult",
    "MissingExtraError",
    "Observer",
    "OperationCost",
    "OptionError",
    "OutputTuning",
    "PreparedModel",
    "QuantizedModule",
    "RangeEqualization",
    "RecoveryStep",
    "SecondOrderRounding",
    "SensitivityTable",
    "Target",
    "UnsupportedModelError",
    "Verification",
    "__version__",
    "allocate",
    "allocation_of",
    "audit",
    "backend",
    "convert",
    "export_onnx",
    "finetune",
    "load_allocation",
    "load_dinov2",
    "load_quantized",
    "prepare",
    "quantize",
    "recover",
    "refine",
    "save_allocation",
    "save_quantized",
    "score",
    "summarize",
    "to_quantized",
    "to_trainable",
    "verify_onnx",
    "write_report",
]


def __getattr__(name: str) -> Any:
    # Not imported above: it needs an extra.
    if name == "InfoqQuantizer":
        from infoq_fx.pt2e import InfoqQuantizer

        return InfoqQuantizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

from .allocation import (
    COSTS as COSTS,
    OperationCost as OperationCost,
    allocate as allocate,
    load_allocation as load_allocation,
    save_allocation as save_allocation,
)
from .api import (
    convert as convert,
    prepare as prepare,
    quantize as quantize,
    recover as recover,
    refine as refine,
    score as score,
)
from .auditing import (
    Audit as Audit,
    audit as audit,
)
from .conversion import (
    QuantizedModule as QuantizedModule,
    allocation_of as allocation_of,
    summarize as summarize,
)
from .core import (
    CONTAINERS as CONTAINERS,
    TARGETS as TARGETS,
    Container as Container,
    Target as Target,
    __version__ as __version__,
)
from .errors import (
    CalibrationDataError as CalibrationDataError,
    EncoderUnavailableError as EncoderUnavailableError,
    ExportError as ExportError,
    InfeasibleBudgetError as InfeasibleBudgetError,
    InfoqError as InfoqError,
    MissingExtraError as MissingExtraError,
    OptionError as OptionError,
    UnsupportedModelError as UnsupportedModelError,
)
from .export import (
    InfoqPass as InfoqPass,
    InfoqQuantizer as InfoqQuantizer,
    LevelResult as LevelResult,
    Verification as Verification,
    backend as backend,
    export_onnx as export_onnx,
    load_quantized as load_quantized,
    save_quantized as save_quantized,
    verify_onnx as verify_onnx,
)
from .finetuning import (
    finetune as finetune,
    to_quantized as to_quantized,
    to_trainable as to_trainable,
)
from .quantization import (
    PreparedModel as PreparedModel,
)
from .recovery import (
    RECOVERY_STEPS as RECOVERY_STEPS,
    BiasCorrection as BiasCorrection,
    BlockReconstruction as BlockReconstruction,
    OutputTuning as OutputTuning,
    RangeEqualization as RangeEqualization,
    RecoveryStep as RecoveryStep,
    SecondOrderRounding as SecondOrderRounding,
)
from .report import (
    write_report as write_report,
)
from .scoring import (
    CRITERIA as CRITERIA,
    EAGL as EAGL,
    Criterion as Criterion,
    FunctionCriterion as FunctionCriterion,
    InfoQ as InfoQ,
    InfoQPaper as InfoQPaper,
    load_dinov2 as load_dinov2,
)
from .table import (
    SensitivityTable as SensitivityTable,
)
from .types import (
    Allocation as Allocation,
    Budget as Budget,
    Observer as Observer,
)

from .allocation import (
    COSTS as COSTS,
)
from .allocation import (
    FileSize as FileSize,
)
from .allocation import (
    OperationCost as OperationCost,
)
from .allocation import (
    allocate as allocate,
)
from .allocation import (
    load_allocation as load_allocation,
)
from .allocation import (
    save_allocation as save_allocation,
)
from .api import (
    convert as convert,
)
from .api import (
    prepare as prepare,
)
from .api import (
    quantize as quantize,
)
from .api import (
    recover as recover,
)
from .api import (
    refine as refine,
)
from .api import (
    score as score,
)
from .auditing import (
    Audit as Audit,
)
from .auditing import (
    audit as audit,
)
from .conversion import (
    QuantizedModule as QuantizedModule,
)
from .conversion import (
    allocation_of as allocation_of,
)
from .conversion import (
    summarize as summarize,
)
from .core import (
    CONTAINERS as CONTAINERS,
)
from .core import (
    TARGETS as TARGETS,
)
from .core import (
    Bernoulli as Bernoulli,
)
from .core import (
    Categorical as Categorical,
)
from .core import (
    Container as Container,
)
from .core import (
    Ignored as Ignored,
)
from .core import (
    Quantity as Quantity,
)
from .core import (
    Target as Target,
)
from .core import (
    __version__ as __version__,
)
from .errors import (
    CalibrationDataError as CalibrationDataError,
)
from .errors import (
    EncoderUnavailableError as EncoderUnavailableError,
)
from .errors import (
    ExportError as ExportError,
)
from .errors import (
    InfeasibleBudgetError as InfeasibleBudgetError,
)
from .errors import (
    InfoqError as InfoqError,
)
from .errors import (
    MissingExtraError as MissingExtraError,
)
from .errors import (
    OptionError as OptionError,
)
from .errors import (
    UnsupportedModelError as UnsupportedModelError,
)
from .export import (
    InfoqPass as InfoqPass,
)
from .export import (
    InfoqQuantizer as InfoqQuantizer,
)
from .export import (
    LevelResult as LevelResult,
)
from .export import (
    Loading as Loading,
)
from .export import (
    OutputResult as OutputResult,
)
from .export import (
    Verification as Verification,
)
from .export import (
    backend as backend,
)
from .export import (
    export_onnx as export_onnx,
)
from .export import (
    load_quantized as load_quantized,
)
from .export import (
    measure_file as measure_file,
)
from .export import (
    save_quantized as save_quantized,
)
from .export import (
    verify_onnx as verify_onnx,
)
from .finetuning import (
    finetune as finetune,
)
from .finetuning import (
    to_quantized as to_quantized,
)
from .finetuning import (
    to_trainable as to_trainable,
)
from .latency import (
    LatencyCost as LatencyCost,
)
from .latency import (
    load_latency as load_latency,
)
from .latency import (
    measure_latency as measure_latency,
)
from .quantization import (
    ActivationRange as ActivationRange,
)
from .quantization import (
    PreparedModel as PreparedModel,
)
from .quantization import (
    rank_activations as rank_activations,
)
from .recovery import (
    RECOVERY_STEPS as RECOVERY_STEPS,
)
from .recovery import (
    BiasCorrection as BiasCorrection,
)
from .recovery import (
    BlockReconstruction as BlockReconstruction,
)
from .recovery import (
    OutputTuning as OutputTuning,
)
from .recovery import (
    RangeEqualization as RangeEqualization,
)
from .recovery import (
    RecoveryStep as RecoveryStep,
)
from .recovery import (
    SecondOrderRounding as SecondOrderRounding,
)
from .report import (
    write_report as write_report,
)
from .scoring import (
    CRITERIA as CRITERIA,
)
from .scoring import (
    EAGL as EAGL,
)
from .scoring import (
    Criterion as Criterion,
)
from .scoring import (
    FunctionCriterion as FunctionCriterion,
)
from .scoring import (
    InfoQ as InfoQ,
)
from .scoring import (
    InfoQPaper as InfoQPaper,
)
from .scoring import (
    load_dinov2 as load_dinov2,
)
from .scoring.criterion import (
    Observer as Observer,
)
from .table import (
    SensitivityTable as SensitivityTable,
)
from .tolerance import (
    Tolerance as Tolerance,
)
from .tolerance import (
    ToleranceResult as ToleranceResult,
)
from .tolerance import (
    ToleranceStep as ToleranceStep,
)
from .tolerance import (
    search_tolerance as search_tolerance,
)
from .types import (
    Allocation as Allocation,
)
from .types import (
    Budget as Budget,
)
from .types import (
    MeasuredLoss as MeasuredLoss,
)

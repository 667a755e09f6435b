from .dynamo_backend import backend as backend
from .fx_pass import InfoqPass as InfoqPass
from .loading import measure_file as measure_file
from .pt2e import InfoqQuantizer as InfoqQuantizer
from .qdq_onnx.exporter import export_onnx as export_onnx
from .quantized_files import (
    load_quantized as load_quantized,
)
from .quantized_files import (
    save_quantized as save_quantized,
)
from .verification import (
    LevelResult as LevelResult,
)
from .verification import (
    Loading as Loading,
)
from .verification import OutputResult as OutputResult
from .verification import (
    Verification as Verification,
)
from .verification import (
    verify_onnx as verify_onnx,
)

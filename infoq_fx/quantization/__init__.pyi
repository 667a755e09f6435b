from .custom_ops import (
    dequantize_op as dequantize_op,
    quantize_dequantize_op as quantize_dequantize_op,
)
from .histogram import (
    Histogram as Histogram,
    choose_activation_qparams as choose_activation_qparams,
)
from .numerics import (
    choose_weight_qparams as choose_weight_qparams,
    dequantize as dequantize,
    fake_quantize as fake_quantize,
    quantize as quantize,
)
from .prepared import PreparedModel as PreparedModel
from .quantizers import (
    Observe as Observe,
    Quantizer as Quantizer,
)

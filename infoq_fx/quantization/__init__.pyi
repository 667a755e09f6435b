from .activation_ranges import (
    ActivationRange as ActivationRange,
)
from .activation_ranges import (
    rank_activations as rank_activations,
)
from .custom_ops import (
    dequantize_op as dequantize_op,
)
from .custom_ops import (
    quantize_dequantize_op as quantize_dequantize_op,
)
from .histogram import (
    Histogram as Histogram,
)
from .histogram import (
    choose_activation_qparams as choose_activation_qparams,
)
from .numerics import (
    dequantize as dequantize,
)
from .numerics import (
    fake_quantize as fake_quantize,
)
from .numerics import (
    quantize as quantize,
)
from .prepared import PreparedModel as PreparedModel
from .quantizers import (
    Observe as Observe,
)
from .quantizers import (
    Quantizer as Quantizer,
)
from .weight_qparams import (
    choose_weight_qparams as choose_weight_qparams,
)

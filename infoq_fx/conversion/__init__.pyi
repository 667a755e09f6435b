from .conversion import convert_prepared as convert_prepared
from .quantized import (
    Provenance as Provenance,
)
from .quantized import (
    QuantizedModule as QuantizedModule,
)
from .quantized import (
    allocation_of as allocation_of,
)
from .quantized import (
    provenance_of as provenance_of,
)
from .quantized import (
    summarize as summarize,
)

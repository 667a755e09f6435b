from .conversion import convert_prepared as convert_prepared
from .quantized import (
    Provenance as Provenance,
    QuantizedModule as QuantizedModule,
    allocation_of as allocation_of,
    provenance_of as provenance_of,
    summarize as summarize,
)

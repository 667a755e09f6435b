from .result import (
    ToleranceResult as ToleranceResult,
)
from .result import (
    ToleranceStep as ToleranceStep,
)
from .search import search_tolerance as search_tolerance
from .tolerance import Tolerance as Tolerance

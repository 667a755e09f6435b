from .comparison import audit as audit
from .differentiable import DifferentiableSearch as DifferentiableSearch
from .evolutionary import EvolutionarySearch as EvolutionarySearch
from .references import (
    REFERENCES as REFERENCES,
)
from .references import (
    Reference as Reference,
)
from .result import (
    Audit as Audit,
)
from .result import (
    AuditRow as AuditRow,
)

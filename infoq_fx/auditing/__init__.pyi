from .comparison import audit as audit
from .result import (
    Audit as Audit,
)
from .result import (
    AuditRow as AuditRow,
)

from .comparison import audit as audit
from .result import (
    Audit as Audit,
    AuditRow as AuditRow,
)

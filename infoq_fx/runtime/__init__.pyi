from .digest import digest_run as digest_run
from .forward import (
    RunOptions as RunOptions,
)
from .forward import (
    compute_float_logits as compute_float_logits,
)
from .forward import (
    compute_logits as compute_logits,
)
from .forward import (
    run_perturbed as run_perturbed,
)
from .forward import (
    run_whole as run_whole,
)
from .interpreter import SiteInterpreter as SiteInterpreter
from .outputs import (
    class_logits as class_logits,
)
from .outputs import (
    diverge as diverge,
)

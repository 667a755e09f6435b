from .digest import digest_run as digest_run
from .forward import (
    RunOptions as RunOptions,
    compute_float_logits as compute_float_logits,
    compute_logits as compute_logits,
    run_perturbed as run_perturbed,
    run_whole as run_whole,
)
from .interpreter import SiteInterpreter as SiteInterpreter
from .outputs import (
    class_logits as class_logits,
    diverge as diverge,
)

from .digest import digest_run as digest_run
from .forward import (
    RunOptions as RunOptions,
)
from .forward import (
    hold_float_outputs as hold_float_outputs,
)
from .forward import (
    hold_outputs as hold_outputs,
)
from .forward import (
    measure_lost_nats as measure_lost_nats,
)
from .forward import (
    run_perturbed as run_perturbed,
)
from .forward import (
    run_whole as run_whole,
)
from .held_outputs import (
    HeldLoss as HeldLoss,
)
from .held_outputs import (
    HeldOutputs as HeldOutputs,
)
from .held_outputs import (
    make_loss as make_loss,
)
from .interpreter import SiteInterpreter as SiteInterpreter

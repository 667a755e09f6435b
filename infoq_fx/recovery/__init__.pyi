from .candidates import Candidates as Candidates
from .ladder import (
    LADDER as LADDER,
)
from .ladder import (
    RECOVERY_STEPS as RECOVERY_STEPS,
)
from .ladder import (
    find_steps as find_steps,
)
from .ladder import (
    recover_accuracy as recover_accuracy,
)
from .step import (
    RecoveryStep as RecoveryStep,
)
from .step import (
    StepContext as StepContext,
)
from .steps.bias_correction import BiasCorrection as BiasCorrection
from .steps.block_reconstruction import BlockReconstruction as BlockReconstruction
from .steps.output_tuning import OutputTuning as OutputTuning
from .steps.range_equalization import RangeEqualization as RangeEqualization
from .steps.second_order_rounding import SecondOrderRounding as SecondOrderRounding

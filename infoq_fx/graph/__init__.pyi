from .calibration import calibrate as calibrate
from .capture import (
    CapturedModel as CapturedModel,
)
from .capture import (
    capture as capture,
)
from .float_interpreter import (
    FloatInterpreter as FloatInterpreter,
)
from .float_interpreter import (
    read_weights as read_weights,
)
from .model_inputs import fit_data as fit_data
from .passes.pass_manager import run_passes as run_passes
from .sites import (
    SitePlan as SitePlan,
)
from .sites import (
    find_sites as find_sites,
)

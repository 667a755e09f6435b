from .criteria import (
    CRITERIA as CRITERIA,
)
from .criteria import (
    EAGL as EAGL,
)
from .criteria import (
    FunctionCriterion as FunctionCriterion,
)
from .criteria import (
    InfoQ as InfoQ,
)
from .criteria import (
    InfoQPaper as InfoQPaper,
)
from .criteria import (
    find_criterion as find_criterion,
)
from .criterion import (
    Criterion as Criterion,
)
from .criterion import (
    Measure as Measure,
)
from .information.encoders import (
    encode_inputs as encode_inputs,
)
from .information.encoders import (
    load_dinov2 as load_dinov2,
)
from .refinement import choose_allocation as choose_allocation
from .sensitivity import (
    Resources as Resources,
)
from .sensitivity import (
    measure_sensitivity as measure_sensitivity,
)

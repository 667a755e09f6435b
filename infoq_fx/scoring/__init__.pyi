from .criteria import (
    CRITERIA as CRITERIA,
    EAGL as EAGL,
    FunctionCriterion as FunctionCriterion,
    InfoQ as InfoQ,
    InfoQPaper as InfoQPaper,
    find_criterion as find_criterion,
)
from .criterion import (
    Criterion as Criterion,
    Measure as Measure,
)
from .information.encoders import (
    encode_inputs as encode_inputs,
    load_dinov2 as load_dinov2,
)
from .refinement import choose_allocation as choose_allocation
from .sensitivity import (
    Resources as Resources,
    measure_sensitivity as measure_sensitivity,
)

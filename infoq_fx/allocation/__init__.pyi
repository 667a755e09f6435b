from .allocation_file import (
    load_allocation as load_allocation,
    save_allocation as save_allocation,
)
from .cost import (
    COSTS as COSTS,
    OperationCost as OperationCost,
    measure_cost as measure_cost,
)
from .solver import (
    allocate as allocate,
    check_budget as check_budget,
    find_uniform as find_uniform,
    propose as propose,
)
from .summary import (
    Summary as Summary,
    summarize_allocation as summarize_allocation,
)

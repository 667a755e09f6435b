from .allocation_file import (
    load_allocation as load_allocation,
)
from .allocation_file import (
    save_allocation as save_allocation,
)
from .cost import (
    COSTS as COSTS,
)
from .cost import (
    OperationCost as OperationCost,
)
from .cost import (
    measure_cost as measure_cost,
)
from .solver import (
    allocate as allocate,
)
from .solver import (
    check_budget as check_budget,
)
from .solver import (
    find_uniform as find_uniform,
)
from .solver import (
    propose as propose,
)
from .summary import (
    FileSize as FileSize,
)
from .summary import (
    Summary as Summary,
)
from .summary import (
    summarize_allocation as summarize_allocation,
)

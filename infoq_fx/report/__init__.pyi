from .page import write_report as write_report
from .plots import (
    plot_allocation as plot_allocation,
)
from .plots import (
    plot_correlation as plot_correlation,
)
from .plots import (
    plot_pareto as plot_pareto,
)
from .plots import (
    plot_sensitivity as plot_sensitivity,
)

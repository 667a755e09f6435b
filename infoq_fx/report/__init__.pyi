from .page import write_report as write_report
from .plots import (
    plot_allocation as plot_allocation,
    plot_correlation as plot_correlation,
    plot_pareto as plot_pareto,
    plot_sensitivity as plot_sensitivity,
)

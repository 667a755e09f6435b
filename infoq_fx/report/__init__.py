"""What was found, to look at: one page with a budget slider, and pictures."""

from infoq_fx.report.page import write_report
from infoq_fx.report.plots import plot_allocation, plot_correlation, plot_pareto, plot_sensitivity

__all__ = ["plot_allocation", "plot_correlation", "plot_pareto", "plot_sensitivity", "write_report"]

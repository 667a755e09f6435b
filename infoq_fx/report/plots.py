"""Matplotlib figures of a table, an allocation and an audit; the only module that imports matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from infoq_fx.auditing.result import Audit
from infoq_fx.errors import MissingExtraError, OptionError, unknown_name_error
from infoq_fx.report.curve import choose_unit, cost_of, damage_scale, describe_allocation, find_uniforms, trace_curve
from infoq_fx.table import SensitivityTable
from infoq_fx.types import Allocation, Inventory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_allocation", "plot_correlation", "plot_pareto", "plot_sensitivity"]

# Okabe and Ito's colours, each with its own marker: distinguishable with any colour vision and in grey.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b5b5b")
_MARKERS = "os^Dv>P*"
_LOW_BITS = 4


def plot_sensitivity(table: SensitivityTable) -> Figure:
    """Plot the score of every layer at every bit-width with standard errors, layers in graph order.

    Returns:
        A figure outside of pyplot: save it by ``figure.savefig(path)``, or make it the last line of a notebook cell.

    Raises:
        MissingExtraError: ``infoq-fx[plots]`` is not installed.

    Reference:
        InfoQ, Fig. 2.
    """
    sites = [site.name for site in table.inventory.sites if table.scores.get(site.name)]
    figure, axes = _start_figure(max(7.0, 2 + 0.24 * len(sites)), 4.8)
    for index, bits in enumerate(sorted({bits for by_bits in table.scores.values() for bits in by_bits})):
        found = [(x, table.scores[name][bits]) for x, name in enumerate(sites) if bits in table.scores[name]]
        axes.errorbar(
            [x for x, _ in found],
            [score.value for _, score in found],
            [score.standard_error for _, score in found],
            label=f"{bits} bits",
            **_style(index),
        )
    axes.set_xticks(range(len(sites)), sites, rotation=60, ha="right", fontsize=7)
    _scale(axes, [score.value for by_bits in table.scores.values() for score in by_bits.values()])
    axes.set(ylabel=f"score of {table.criterion}", title="Sensitivity by layer and bit-width")
    axes.legend(ncols=4, fontsize=8)
    return figure


def plot_pareto(
    table: SensitivityTable,
    *,
    allocation: Allocation | None = None,
    limit: str = "size_bytes",
    budgets: int = 60,
    alpha: float = 1.0,
    pin: Mapping[str, int] | None = None,
) -> Figure:
    """Plot predicted damage against size or BitOps: the best allocations, the uniform ones, and a given one.

    Args:
        table: scores of every site with more than one candidate.
        allocation: an allocation to mark.
        limit: ``"size_bytes"`` or ``"bitops"``.
        budgets: number of points of the curve.
        alpha: see :func:`infoq_fx.allocate`.
        pin: see :func:`infoq_fx.allocate`.

    Raises:
        OptionError: an argument cannot be used, or the allocation is of another model.
        MissingExtraError: ``infoq-fx[plots]`` is not installed.
    """
    figure, axes = _start_figure(7.0, 4.6)
    curve = trace_curve(table, limit, budgets=budgets, alpha=alpha, pin=pin)
    unit, text = choose_unit(curve)

    def place(found: Allocation) -> tuple[float, float]:
        return getattr(cost_of(found, table.inventory), limit) / unit, found.score or 0.0

    x, y = zip(*(place(found) for found in curve.allocations), strict=True)
    errors = [found.standard_error or 0.0 for found in curve.allocations]
    low, high = ([v + sign * e for v, e in zip(y, errors, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, alpha=0.2, color=_COLORS[0], linewidth=0)
    axes.plot(x, y, label="best within a budget", **_style(0))
    uniforms = find_uniforms(table, alpha=alpha, pin=pin)
    if uniforms:
        places = [place(found) for found in uniforms.values()]
        axes.plot(*zip(*places, strict=True), label="uniform", **_style(1) | {"linestyle": "none", "markersize": 7})
        for bits, at in zip(uniforms, places, strict=True):
            axes.annotate(f"{bits} bits", at, xytext=(6, 4), textcoords="offset points", fontsize=8)
    marked = [] if allocation is None else [place(describe_allocation(table, allocation, alpha))]
    for at in marked:
        axes.plot(*at, "D", color="black", markersize=10, markerfacecolor="none", label="this allocation")
    _scale(axes, [*y, *(found.score or 0.0 for found in uniforms.values()), *(score for _, score in marked)])
    axes.set(xlabel=text, ylabel=f"predicted damage ({table.criterion} score)")
    axes.legend()
    return figure


def plot_allocation(allocation: Allocation, inventory: Inventory) -> Figure:
    """Plot the bits of every weight and every searched activation as bars, in graph order.

    Args:
        allocation: bits for every site of the inventory.
        inventory: of the prepared model: ``table.inventory``.

    Raises:
        OptionError: the allocation lacks a site.
        MissingExtraError: ``infoq-fx[plots]`` is not installed.
    """
    sites = [s for s in inventory.sites if s.kind == "weight" or (s.is_searched and len(s.bits) > 1)]
    for site in sites:
        if site.name not in allocation.bits:
            raise unknown_name_error("site without bits", site.name, allocation.bits)
    figure, axes = _start_figure(max(6.0, 2 + 0.24 * len(sites)), 3.6)
    for kind, color, hatch in (("weight", _COLORS[0], None), ("activation", _COLORS[4], "//")):
        shown = [(x, allocation.bits[s.name]) for x, s in enumerate(sites) if s.kind == kind]
        if shown:
            bars = axes.bar(*zip(*shown, strict=True), color=color, hatch=hatch, edgecolor="white", label=f"{kind}s")
            axes.bar_label(bars, fontsize=8)
    axes.set_xticks(range(len(sites)), [site.name for site in sites], rotation=60, ha="right", fontsize=7)
    cost = cost_of(allocation, inventory)
    most = max(9, *allocation.bits.values())
    axes.set(ylim=(0, most), ylabel="bits", title=f"{cost.weight_bits:.3g} bits a weight, {cost.size_bytes:,} bytes")
    if len({site.kind for site in sites}) > 1:
        axes.legend()
    return figure


def plot_correlation(audit: Audit, criterion: str | None = None) -> Figure:
    """Plot scores against the measured accuracy drop of every layer at 4 bits and fewer, with standard errors.

    Args:
        audit: made with ``correlate=True``.
        criterion: the criterion whose scores are plotted; None for the first of the audit.

    Raises:
        OptionError: there is no such criterion, or the audit measured no accuracy drops.
        MissingExtraError: ``infoq-fx[plots]`` is not installed.

    Reference:
        InfoQ, Fig. 1.
    """
    if not audit.accuracy_drops:
        raise OptionError("the audit measured no accuracy drops; make it with correlate=True")
    name = next(iter(audit.tables)) if criterion is None else criterion
    if name not in audit.tables:
        raise unknown_name_error("criterion of the audit", name, audit.tables)
    row = next(row for row in audit.rows if row.name == name)
    figure, axes = _start_figure(6.0, 4.8)
    scores = audit.tables[name].scores
    for index, bits in enumerate(sorted({b for by_bits in scores.values() for b in by_bits if b <= _LOW_BITS})):
        shared = [site for site in scores if bits in scores[site] and bits in audit.accuracy_drops.get(site, {})]
        found, drops = ([held[site][bits] for site in shared] for held in (scores, audit.accuracy_drops))
        axes.errorbar(
            [score.value for score in found],
            [drop.value for drop in drops],
            [drop.standard_error for drop in drops],
            [score.standard_error for score in found],
            label=f"{bits} bits",
            **_style(index) | {"linestyle": "none", "markersize": 6},
        )
    r = "" if row.correlation is None else f": r = {row.correlation:.2f} ± {row.correlation_error:.2f}"
    axes.set(xlabel=f"score of {name}", ylabel="accuracy drop [points]", title=f"{name}{r}")
    axes.legend()
    return figure


def _start_figure(width: float, height: float) -> tuple[Figure, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError('plots need matplotlib: pip install "infoq-fx[plots]"') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _style(index: int) -> dict[str, Any]:
    color, marker = _COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]
    return {"color": color, "marker": marker, "markersize": 4, "linewidth": 1}


def _scale(axes: Any, values: list[float]) -> None:
    linear_below, ticks = damage_scale(values)
    axes.set_yscale("symlog", linthresh=linear_below)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()

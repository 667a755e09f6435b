"""Builds the data of the page as values that JSON can store."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from infoq_fx.allocation.cost import packs_weights, weight_bytes
from infoq_fx.auditing.result import Audit, AuditRow
from infoq_fx.errors import OptionError
from infoq_fx.report.curve import (
    Curve,
    choose_unit,
    container_bytes,
    cost_of,
    damage_scale,
    describe_allocation,
    find_uniforms,
    trace_curve,
)
from infoq_fx.table import SensitivityTable
from infoq_fx.types import FLOAT_BITS, Allocation, Inventory, QuantSite, Score

__all__ = ["build_document"]

_LOW_BITS = 4


def build_document(
    table: SensitivityTable,
    *,
    shown: Mapping[str, Allocation],
    audit: Audit | None,
    accuracies: Mapping[str, tuple[Allocation, float]],
    budgets: int,
    alpha: float,
    pin: Mapping[str, int] | None,
) -> dict[str, Any]:
    """Build the page's sites, curves, allocations, accuracies and correlations; arguments are as for the page."""
    inventory = table.inventory
    sites = [s for s in inventory.sites if s.kind == "weight" or (s.is_searched and len(s.bits) > 1)]
    curves = [trace_curve(table, name, budgets=budgets, alpha=alpha, pin=pin) for name in ("size_bytes", "bitops")]
    uniforms = find_uniforms(table, alpha=alpha, pin=pin)
    others = [
        _describe_other(f"uniform {bits} bits", "uniform", f"{bits} bits", found, inventory, sites)
        for bits, found in uniforms.items()
    ]
    for label, allocation in shown.items():
        found = describe_allocation(table, allocation, alpha)
        note = label if found.loss is None else f"{label} {found.loss.describe()}"
        others.append(_describe_other(label, "your allocation", note, found, inventory, sites))
    measured = _list_accuracies(table, audit, accuracies, alpha)
    return {
        "criterion": table.criterion,
        "sites": [_describe_site(site, table) for site in sites],
        "axes": [_describe_axis(curve, inventory, sites) for curve in curves if curve.limits[-1] > 1],
        "others": others,
        "start": _find_start(curves[0], shown, inventory),
        "damage": _describe_scale(
            [a.score or 0.0 for curve in curves for a in (*curve.allocations, *uniforms.values())]
        ),
        "spread": _describe_scale([score.value for by_bits in table.scores.values() for score in by_bits.values()]),
        "measured": measured,
        "measured_note": _describe_evaluation(audit),
        "accuracy_name": _name_accuracy(audit),
        "metric_name": None if audit is None or audit.float_metric is None else audit.metric_name,
        "float_accuracy": _float_accuracy(audit),
        "correlations": [] if audit is None else _list_correlations(audit),
        "float_bytes": FLOAT_BITS // 8 * sum(s.numel for s in inventory.sites if s.kind == "weight")
        + inventory.float_bytes,
        "note": "Squares are uniform bit-widths, with activations at their largest bit-widths.",
        "options": "".join(
            f", {name}={value!r}" for name, value in (("alpha", alpha), ("pin", pin)) if value not in (1.0, None)
        ),
        "command": _describe_command(budgets, alpha, pin),
    }


def _describe_site(site: QuantSite, table: SensitivityTable) -> dict[str, Any]:
    operations = table.inventory.operations
    is_weight, is_packed = site.kind == "weight", packs_weights(table.inventory)
    tie = next((index for index, names in enumerate(table.inventory.ties, 1) if site.name in names), None)
    return {
        "name": site.name,
        "kind": site.kind,
        "weights": site.numel if is_weight else 0,
        "macs": sum(operation.macs for operation in operations if site.name in (operation.left, operation.right)),
        "bytes": {b: weight_bytes(site, b, is_packed=is_packed) for b in site.bits} if is_weight else {},
        "scores": {bits: _pair(score) for bits, score in table.scores.get(site.name, {}).items()},
        "tie": tie,
    }


def _describe_axis(curve: Curve, inventory: Inventory, sites: list[QuantSite]) -> dict[str, Any]:
    unit, title = choose_unit(curve)
    return {
        "name": curve.name,
        "label": "size" if curve.name == "size_bytes" else "BitOps",
        "title": title,
        "unit": unit,
        "points": [
            {"limit": limit, **_describe_point(allocation, inventory, sites)}
            for limit, allocation in zip(curve.limits, curve.allocations, strict=True)
        ],
    }


def _describe_point(allocation: Allocation, inventory: Inventory, sites: list[QuantSite]) -> dict[str, Any]:
    cost = cost_of(allocation, inventory)
    return {
        "bits": [allocation.bits[site.name] for site in sites],
        "score": float(allocation.score or 0.0),
        "error": float(allocation.standard_error or 0.0),
        "size_bytes": cost.size_bytes,
        "bitops": cost.bitops,
        "weight_bits": cost.weight_bits,
        "compression": cost.compression,
        "containers": list(container_bytes(inventory, allocation.bits).values()),
        "uniform_bits": allocation.uniform_bits,
        "uniform_score": allocation.uniform_score,
    }


def _describe_other(
    label: str, kind: str, note: str, allocation: Allocation, inventory: Inventory, sites: list[QuantSite]
) -> dict[str, Any]:
    point = _describe_point(allocation, inventory, sites)
    return {"label": label, "kind": kind, "note": note, "all_bits": dict(allocation.bits), **point}


def _find_start(curve: Curve, shown: Mapping[str, Allocation], inventory: Inventory) -> float:
    """Initial position of the slider, from 0 to 1: at the first allocation's size, else in the middle."""
    last = len(curve.limits) - 1
    if not shown or not last:
        return 0.5
    size = cost_of(next(iter(shown.values())), inventory).size_bytes
    fitting = [index for index, limit in enumerate(curve.limits) if limit <= size]
    return (fitting[-1] if fitting else 0) / last


def _list_accuracies(
    table: SensitivityTable, audit: Audit | None, accuracies: Mapping[str, tuple[Allocation, float]], alpha: float
) -> list[dict[str, Any]]:
    measured = []
    for label, (allocation, accuracy) in accuracies.items():
        budget = "-" if allocation.budget is None else str(allocation.budget)
        shown = {"accuracy": _check_percent(label, accuracy), "error": 0.0}
        measured.append({"label": label, "budget": budget, **shown, **_describe_cost(table, allocation, alpha)})
    for row in () if audit is None else audit.rows:
        for budget, allocation in row.allocations.items():
            if budget in row.nats or budget in row.hits:
                shown = _describe_measured(audit, row, budget)
                measured.append(
                    {"label": row.name, "budget": budget, **shown, **_describe_cost(table, allocation, alpha)}
                )
    return measured


def _describe_cost(table: SensitivityTable, allocation: Allocation, alpha: float) -> dict[str, Any]:
    described = describe_allocation(table, allocation, alpha)
    cost = cost_of(described, table.inventory)
    return {"size_bytes": cost.size_bytes, "bitops": cost.bitops, "score": described.score}


def _describe_measured(audit: Audit | None, row: AuditRow, budget: str) -> dict[str, Any]:
    """What the chart shows as accuracy (top-1, else the user's metric, else nats), and all that was measured."""
    top1, nats, metric = row.top1(budget), row.lost_nats(budget), row.metrics.get(budget)
    charted = top1 or (nats if metric is None else Score(metric)) or Score(0.0)
    return {
        "accuracy": charted.value,
        "error": charted.standard_error,
        "nats": None if nats is None else nats.value,
        "metric": metric,
        "sqnr_db": min(row.sqnr_db.get(budget, {}).values(), default=None),
    }


def _name_accuracy(audit: Audit | None) -> str:
    if audit is None or any(row.hits for row in audit.rows):
        return "top-1 [%]"
    return "nats lost" if audit.float_metric is None else audit.metric_name


def _float_accuracy(audit: Audit | None) -> float | None:
    if audit is None:
        return None
    return audit.float_metric if math.isnan(audit.float_top1) else audit.float_top1


def _check_percent(label: str, accuracy: float) -> float:
    if isinstance(accuracy, bool) or not isinstance(accuracy, int | float) or not 0 <= accuracy <= 100:
        raise OptionError(f"accuracies[{label!r}] is {accuracy!r}; give top-1 in percent, from 0 to 100")
    return float(accuracy)


def _describe_evaluation(audit: Audit | None) -> str:
    if audit is None:
        return "Top-1 as given by the user."
    name = _name_accuracy(audit)
    name = "Top-1" if name == "top-1 [%]" else name[0].upper() + name[1:]
    value = _float_accuracy(audit)
    unit = "" if math.isnan(audit.float_top1) else " %"
    of_float = "" if value is None else f"; the float model has {value:.4g}{unit}"
    return f"{name} on {audit.evaluation_samples} samples that no criterion saw, with standard errors{of_float}."


def _list_correlations(audit: Audit) -> list[dict[str, Any]]:
    rows = {row.name: row for row in audit.rows}
    listed = []
    for name, table in audit.tables.items():
        points = [
            [site, bits, *_pair(score), *_pair(audit.accuracy_drops[site][bits])]
            for site, by_bits in table.scores.items()
            for bits, score in by_bits.items()
            if bits <= _LOW_BITS and bits in audit.accuracy_drops.get(site, {})
        ]
        row = rows[name]
        if points:
            listed.append(
                {
                    "criterion": name,
                    "r": row.correlation,
                    "r_error": row.correlation_error,
                    "rank": row.rank_correlation,
                    "points": points,
                }
            )
    return listed


def _describe_scale(values: list[float]) -> dict[str, Any]:
    constant, ticks = damage_scale(values)
    return {
        "constant": constant,
        "ticks": ticks,
        "domain": [min(0.0, *values), max(values) or 1.0] if values else [0, 1],
    }


def _describe_command(budgets: int, alpha: float, pin: Mapping[str, int] | None) -> str:
    given = {"budgets": budgets, "alpha": alpha, "pin": dict(pin) if pin else None}
    usual = {"budgets": 60, "alpha": 1.0, "pin": None}
    options = "".join(f", {name}={value!r}" for name, value in given.items() if value != usual[name])
    return f'infoq_fx.write_report(table, "report.html"{options})  # this page'


def _pair(score: Score) -> list[float]:
    return [float(score.value), float(score.standard_error)]

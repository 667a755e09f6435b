"""Computes the best allocations over a range of budgets, the uniform ones, and their sizes in each container."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from infoq_fx.allocation.cost import measure_cost
from infoq_fx.allocation.float_candidates import widest_integer
from infoq_fx.allocation.solver import allocate, pin_sites
from infoq_fx.core.targets import CONTAINERS
from infoq_fx.errors import OptionError
from infoq_fx.table import SensitivityTable
from infoq_fx.types import FLOAT16_BITS, Allocation, Budget, Cost, Inventory

__all__ = [
    "Curve",
    "choose_unit",
    "container_bytes",
    "cost_of",
    "damage_scale",
    "describe_allocation",
    "find_uniforms",
    "trace_curve",
]

_UNLIMITED = 1e30
_DECADES = 6


@dataclass(frozen=True)
class Curve:
    """Allocations of least score over a range of one limit.

    ``limits`` are ascending integers in the unit of ``name``, a field of :class:`~infoq_fx.types.Budget`;
    ``allocations`` are those of :func:`infoq_fx.allocate` for each limit.
    """

    name: str
    limits: tuple[int, ...]
    allocations: tuple[Allocation, ...]


def choose_unit(curve: Curve) -> tuple[float, str]:
    """Return the unit that suits a curve, and the label of its axis."""
    if curve.name == "size_bytes":
        unit, text = (1e6, "MB") if curve.limits[-1] >= 1e6 else (1e3, "kB")
        return unit, f"size of all parameters [{text}]"
    unit, text = (1e9, "G") if curve.limits[-1] >= 1e9 else (1e6, "M")
    return unit, f"BitOps of one sample [{text}]"


def trace_curve(
    table: SensitivityTable,
    name: str = "size_bytes",
    *,
    budgets: int = 60,
    alpha: float = 1.0,
    pin: Mapping[str, int] | None = None,
) -> Curve:
    """Allocate at evenly spaced limits, from the least that can be reached to where the limit no longer binds.

    Args:
        table: scores of every site with more than one candidate.
        name: the limit, ``"size_bytes"`` or ``"bitops"``.
        budgets: number of limits; fewer if the range has fewer integers.
        alpha: see :func:`infoq_fx.allocate`.
        pin: see :func:`infoq_fx.allocate`.

    Raises:
        OptionError: an argument cannot be used, or a candidate has no score.
    """
    if isinstance(budgets, bool) or not isinstance(budgets, int) or budgets < 2:
        raise OptionError(f"budgets={budgets!r} is not a number of positions; give an integer, 2 or more")
    if name not in ("size_bytes", "bitops"):
        raise OptionError(f"there is no curve over {name!r}; give 'size_bytes' or 'bitops'")

    def find(limit: float) -> Allocation:
        budget = Budget(size_bytes=limit) if name == "size_bytes" else Budget(bitops=limit)
        return allocate(table, budget, alpha=alpha, pin=pin)

    fewest = {site.name: site.bits[0] for site in pin_sites(table.inventory, pin or {}).sites}
    least = getattr(measure_cost(table.inventory, fewest), name)
    most = getattr(cost_of(find(_UNLIMITED), table.inventory), name)
    # A model without multiply-accumulates has 0 BitOps, which is not a valid limit.
    limits = tuple(sorted({round(float(x)) for x in np.linspace(max(least, 1), max(most, 1), budgets)}))
    return Curve(name, limits, tuple(find(limit) for limit in limits))


def find_uniforms(
    table: SensitivityTable, *, alpha: float = 1.0, pin: Mapping[str, int] | None = None
) -> dict[int, Allocation]:
    """Return the uniform allocation of every bit-width that all searched weights share.

    Activations are at their largest integer candidates, and pinned sites keep their bits. The scores are the table's,
    as in :func:`infoq_fx.allocate`.
    """
    sites = pin_sites(table.inventory, pin or {}).sites
    free = [site for site in sites if site.kind == "weight" and len(site.bits) > 1]
    shared = set.intersection(*(set(site.bits) - {FLOAT16_BITS} for site in free)) if free else set()
    largest = {site.name: widest_integer(site) for site in sites}
    found = {}
    for bits in sorted(shared):
        chosen = largest | {site.name: bits for site in free}
        found[bits] = describe_allocation(table, Allocation(bits=chosen), alpha)
    return found


def describe_allocation(table: SensitivityTable, allocation: Allocation, alpha: float = 1.0) -> Allocation:
    """Return the allocation with its scores, total and cost from the table.

    Raises:
        OptionError: the allocation lacks a site of the table, or has bits that the table did not score.
    """
    scores, weights = {}, {}
    for site in table.inventory.sites:
        bits, known = allocation.bits.get(site.name), table.scores.get(site.name, {})
        if bits is None or (known and bits not in known):
            raise OptionError(
                f"the allocation gives site {site.name!r} {bits} bits; give one of the table's own, of {sorted(known)}"
            )
        if known:
            scores[site.name] = known[bits]
            weights[site.name] = 1.0 if site.kind == "weight" else alpha
    return replace(
        allocation,
        criterion=table.criterion,
        score=math.fsum(weights[name] * score.value for name, score in scores.items()),
        standard_error=math.hypot(*(weights[name] * score.standard_error for name, score in scores.items())),
        cost=measure_cost(table.inventory, allocation.bits),
        scores=scores,
    )


def cost_of(allocation: Allocation, inventory: Inventory) -> Cost:
    """Return the allocation's cost, computed if it has none."""
    return allocation.cost or measure_cost(inventory, allocation.bits)


def container_bytes(inventory: Inventory, bits: Mapping[str, int]) -> dict[str, int]:
    """Return the bytes of all parameters in each of :data:`infoq_fx.CONTAINERS`, without the file's graph.

    All include scales (4 bytes per channel) and everything in float.
    """
    stored = {
        name: {site: container.stored_bits(width) for site, width in bits.items()}
        for name, container in CONTAINERS.items()
    }
    return {name: measure_cost(inventory, widths).size_bytes for name, widths in stored.items()}


def damage_scale(values: Iterable[float]) -> tuple[float, list[float]]:
    """Choose a symmetric logarithmic axis for scores that span decades and may be 0.

    Returns:
        The value below which the axis is linear, and the ticks: 0 and powers of ten on both sides of it.
    """
    found = list(values)
    sizes = [abs(value) for value in found if value]
    if not sizes:
        return 1.0, [0.0, 1.0]
    top = math.ceil(math.log10(max(sizes)))
    bottom = max(math.floor(math.log10(min(sizes))), top - _DECADES)
    decades = [10.0**power for power in range(bottom, top + 1)]
    low = [-tick for tick in reversed(decades) if min(found) <= -tick]
    return decades[0], [*low, 0.0, *decades]

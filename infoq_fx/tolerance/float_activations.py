"""Activations in float where no limit counts them: all in the search for the least cost, then as few as needed."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from infoq_fx.allocation.cost import measure_cost
from infoq_fx.allocation.float_candidates import widest_integer
from infoq_fx.tolerance.bisection import find_smallest
from infoq_fx.tolerance.result import ToleranceStep
from infoq_fx.tolerance.steps import Search, StepTaker
from infoq_fx.tolerance.tolerance import Tolerance
from infoq_fx.types import FLOAT16_BITS, Budget, QuantSite

__all__ = ["allow_floats", "has_free_floats", "lower_bitops"]

_OF_WEIGHTS = ("size_bytes", "weight_bits")
_MOST_STEPS = 4


def has_free_floats(search: Search) -> bool:
    """Return whether activations may be in float, and neither the minimized cost nor a limit counts them."""
    tolerance = search.validation.tolerance
    within = {} if tolerance.within is None else tolerance.within.limits
    is_counted = tolerance.minimize not in _OF_WEIGHTS or any(
        name not in (*_OF_WEIGHTS, "compression") for name in within
    )
    return not is_counted and any(map(_may_float, search.table.inventory.sites))


def allow_floats(search: Search) -> Search:
    """Return the search with all activations in float that may be: for a cost that does not count them the least loss.

    Their scores alone would leave most of them at 8 bits, as a gain counts only above three standard errors.
    """
    floats = {s.name: FLOAT16_BITS for s in search.table.inventory.sites if _may_float(s)}
    return replace(search, pin={**floats, **search.pin})


def _may_float(site: QuantSite) -> bool:
    return site.kind == "activation" and site.bits[-1] == FLOAT16_BITS != site.bits[0]


def lower_bitops(search: Search, chosen: ToleranceStep) -> tuple[list[ToleranceStep], StepTaker]:
    """Measure allocations of fewer BitOps that cost no more than a chosen one: with fewer activations in float.

    Args:
        search: without limits on activations.
        chosen: the step of least cost that passes.

    Returns:
        The steps, at most four and in order, with the minimized cost as theirs, and what took them.
    """
    inventory, minimized = search.table.inventory, search.validation.tolerance.minimize
    bits = chosen.allocation.bits
    integers = {
        site.name: min(bits[site.name], widest_integer(site)) if site.kind == "activation" else bits[site.name]
        for site in inventory.sites
    }
    least, most = (measure_cost(inventory, found).bitops for found in (integers, bits))
    take = StepTaker(_with_limits(search, "bitops", **{minimized: chosen.cost}), float("inf"))
    if least == most:
        return [], take
    known = replace(chosen, limit=most, cost=most)
    found = find_smallest(
        least, most, lambda limit: known if limit >= most else take(limit), most_steps=_MOST_STEPS + 1
    )
    return [step for step in found if step is not known], take


def _with_limits(search: Search, minimize: str, **limits: float) -> Search:
    tolerance = search.validation.tolerance
    held: dict[str, Any] = (
        {} if tolerance.within is None else {f.name: getattr(tolerance.within, f.name) for f in fields(Budget)}
    )
    given: Any = {tolerance.measure: tolerance.limit}
    changed = Tolerance(**given, minimize=minimize, within=Budget(**{**held, **limits}))
    return replace(search, validation=replace(search.validation, tolerance=changed))

"""Says what a budget that is out of reach could be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from infoq_fx.types import Budget, Cost, Inventory

__all__ = ["describe_reach"]

_NAMED = 3  # sites in a message
_DIGITS = 6


def describe_reach(inventory: Inventory, budget: Budget, cost: Cost, name: str, own: Mapping[str, float]) -> str:
    """Return what was asked for by one limit, what can be reached, and what to do.

    Args:
        inventory: of the prepared model.
        budget: the limits.
        cost: of all sites at their fewest bits.
        name: of the limit.
        own: the least that user-defined costs can be, by name.
    """
    kinds = {"bitops": ("weight", "activation"), "activation_bytes": ("activation",)}.get(name, ("weight",))
    fewest = {site.bits[0] for site in inventory.sites if site.kind in kinds and site.is_searched}
    how = f"all layers at {fewest.pop()} bits" if len(fewest) == 1 else "every layer at its fewest bits"
    side = "above the largest" if name == "compression" else "below the smallest"
    if name in own:
        how = "every operation at its cheapest bits"
    asked, reachable = budget.limits[name], own[name] if name in own else cost[name]
    remedy = "lower it to that" if name == "compression" else "raise it to that"
    pinned = _describe_pinned(inventory, kinds)
    shown = _round_text(reachable, down=name == "compression")
    advice = f"{remedy}, allow fewer bits, or pin fewer" if pinned else f"{remedy}, or allow fewer bits"
    return f"budget {name}={asked:.12g} is {side} reachable {shown} ({how}{pinned}); {advice}"


def _describe_pinned(inventory: Inventory, kinds: Iterable[str]) -> str:
    """The sites of one bit-width among others that have a choice, and those of more bits than the others need."""
    sites = [site for site in inventory.sites if site.kind in kinds and site.is_searched]
    free = [site.bits[0] for site in sites if len(site.bits) > 1]
    fixed = [site for site in sites if len(site.bits) == 1 and free and site.bits[0] > min(free)]
    named = ", ".join(f"{site.name!r} pinned to {site.bits[0]}" for site in fixed[:_NAMED])
    more = f" and {len(fixed) - _NAMED} more" if len(fixed) > _NAMED else ""
    return f", {named}{more}" if fixed else ""


def _round_text(value: float, *, down: bool) -> str:
    """A number in few digits, rounded so that it can be copied into a budget: up, or down for a lower limit."""
    if float(f"{value:.{_DIGITS}g}") == value:
        return f"{value:.{_DIGITS}g}"
    digits = _DIGITS - 1 - math.floor(math.log10(abs(value)))
    exact = Decimal(value).quantize(Decimal(1).scaleb(-digits), ROUND_FLOOR if down else ROUND_CEILING)
    return f"{exact.normalize():f}"

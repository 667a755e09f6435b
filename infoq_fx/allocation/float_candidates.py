"""Decides which activations may stay in float where no limit of the budget counts them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection
from dataclasses import replace

from infoq_fx.allocation.lagrangian_bound import CandidateScores
from infoq_fx.types import FLOAT16_BITS, MAX_BITS, Budget, Inventory, QuantSite

__all__ = ["drop_idle_floats", "widest_integer"]

_LEAST_SHARE = 0.02  # of the total score
_DENSITY = 4.0  # times the median


def widest_integer(site: QuantSite) -> int:
    """Return the largest candidate of a site that is an integer bit-width; 16 if float is its only one."""
    return max((bits for bits in site.bits if bits <= MAX_BITS), default=site.bits[-1])


def drop_idle_floats(
    inventory: Inventory,
    budget: Budget,
    candidates: CandidateScores,
    solve: Callable[[Inventory, CandidateScores], float],
) -> Inventory:
    """Take the candidate 16 from all activations for which float gains too little.

    A limit on weights alone would leave every activation in float, since that costs it nothing and always scores
    better; the integer kernels would be lost. Without a limit that counts activations (BitOps, their bytes or a cost of
    your own), an activation keeps the candidate only where float gains at least 2 % of the total score that the best
    allocation has without it, and four times the median gain per multiply-accumulate.

    Args:
        inventory: of the table.
        budget: the limits.
        candidates: weighted scores by site and bit-width.
        solve: returns the least total score within the budget.
    """
    if budget.bitops is not None or budget.activation_bytes is not None or budget.costs:
        return inventory
    free = [s for s in inventory.sites if s.kind == "activation" and FLOAT16_BITS in s.bits and len(s.bits) > 1]
    gains = {s.name: candidates[s.name][widest_integer(s)] - candidates[s.name][FLOAT16_BITS] for s in free}
    if not any(gain > 0 for gain in gains.values()):
        return _without_floats(inventory, gains)
    total = solve(_without_floats(inventory, gains), candidates)
    densities = {
        name: gain / max(1, sum(o.macs for o in inventory.operations if name in (o.left, o.right)))
        for name, gain in gains.items()
    }
    least = _DENSITY * statistics.median(densities.values())
    worthy = {name for name, gain in gains.items() if gain > _LEAST_SHARE * total and densities[name] > least}
    return _without_floats(inventory, gains.keys() - worthy)


def _without_floats(inventory: Inventory, names: Collection[str]) -> Inventory:
    sites = (
        replace(site, bits=tuple(b for b in site.bits if b <= MAX_BITS)) if site.name in names else site
        for site in inventory.sites
    )
    return replace(inventory, sites=tuple(sites))

"""Improves an allocation by measured changes of a few sites at a time: ``refine="search"``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from infoq_fx.allocation.solver import allocate, pin_sites
from infoq_fx.table import SensitivityTable
from infoq_fx.types import MAX_BITS, Allocation, Budget, Inventory, QuantSite, Score

__all__ = ["improve_allocation", "neighbours"]

_REACH = 1  # candidates to either side of the current one
_RESTRAINTS = (0.0, 0.5, 1.5)  # what a change must gain, in means of the changes that gain
_LOGGER = logging.getLogger(__name__)

_Bits = dict[str, int]
Evaluate = Callable[[Mapping[str, int]], float]
"""Runs the model at the bit-widths of all sites, and returns what it loses."""


@dataclass
class _Evaluations:
    """Losses by allocation; each is measured once, and at most ``left`` more are."""

    evaluate: Evaluate
    left: int
    known: dict[frozenset[tuple[str, int]], float] = field(default_factory=dict)

    def __call__(self, bits: Mapping[str, int]) -> float | None:
        """The loss; None if it is not known and no evaluation is left."""
        key = frozenset(bits.items())
        if key not in self.known:
            if self.left < 1:
                return None
            self.left -= 1
            self.known[key] = self.evaluate(bits)
        return self.known[key]


def improve_allocation(
    table: SensitivityTable,
    start: Allocation,
    evaluate: Evaluate,
    passes: int,
    *,
    alpha: float = 1.0,
    pin: Mapping[str, int] | None = None,
) -> list[_Bits]:
    """Improve an allocation step by step, each step measured, within its budget.

    In each round every site, or tie of sites, is measured at the next candidate below and above its bit-width, with all
    others as they are. The integer program then finds the changes of least total loss among these that fit the budget,
    and two smaller sets of changes, since losses add up the better the fewer change at once: there, every change must
    gain more. These three are measured, and the best one is the start of the next round if it loses less. The search
    ends at an allocation that no round improves, or when all passes are used. Where a round has more changes than
    passes, those come first that free bits at the least score and those that take bits for the most.

    Sites in float stay in float, and no site is moved there: what float must gain is decided by the scores.

    Args:
        table: scores, which only decide what is measured first.
        start: within its budget.
        evaluate: what is lost at the bit-widths of all sites; called at most ``passes`` times.
        passes: number of evaluations.
        alpha: factor on the scores of activations relative to those of weights.
        pin: fixed bit-widths by site name.

    Returns:
        The start and every better allocation that was found, each better than the one before.
    """
    assert start.budget is not None
    inventory = pin_sites(table.inventory, pin or {})
    measured = _Evaluations(evaluate, passes)
    found = [_own_bits(inventory, start.bits)]
    lost = measured(found[-1])
    while lost is not None and measured.left > len(_RESTRAINTS):
        changes = _measure_changes(table, neighbours(inventory, found[-1]), found[-1], lost, measured, alpha)
        tried = {}
        for bits in _choose_changes(table, inventory, found[-1], start.budget, changes):
            if (value := measured(bits)) is not None and value < lost:
                tried[value] = bits
        if not tried:
            break
        lost = min(tried)
        found.append(tried[lost])
        _LOGGER.info("search: %.5g, %d passes left", lost, measured.left)
    return found


def neighbours(inventory: Inventory, bits: Mapping[str, int], reach: int = _REACH) -> list[QuantSite]:
    """Return all sites with the candidates that a search may reach from ``bits``: the next ones, without float."""
    sites = []
    for site in inventory.sites:
        integers = [b for b in site.bits if b <= MAX_BITS]
        if len(site.bits) > 1 and bits[site.name] in integers:
            at = integers.index(bits[site.name])
            near = tuple(integers[max(0, at - reach) : at + reach + 1])
        else:
            near = (bits[site.name],)
        sites.append(replace(site, bits=near))
    return sites


def _own_bits(inventory: Inventory, bits: Mapping[str, int]) -> _Bits:
    """The bit-widths that the sites have themselves; those in float since another site is have their most bits."""
    return {s.name: b if (b := bits[s.name]) in s.bits else s.bits[-1] for s in inventory.sites}


def _measure_changes(
    table: SensitivityTable,
    near: Iterable[QuantSite],
    bits: _Bits,
    lost: float,
    measured: _Evaluations,
    alpha: float,
) -> dict[tuple[str, int], float]:
    """What every change of one site, or tie, loses more than now, by its leader and its new bit-width.

    Passes for the allocations that are made of them are left over.
    """
    leaders = table.inventory.leaders
    moves = [(s.name, b) for s in near if leaders[s.name] == s.name for b in s.bits if b != bits[s.name]]
    members: dict[str, list[str]] = {}
    for name, leader in leaders.items():
        members.setdefault(leader, []).append(name)

    def predict(move: tuple[str, int]) -> float:
        return abs(
            sum(
                (1.0 if table.inventory[name].kind == "weight" else alpha)
                * (table.scores[name][move[1]].value - table.scores[name][bits[name]].value)
                for name in members[move[0]]
                if {move[1], bits[name]} <= table.scores.get(name, {}).keys()
            )
        )

    # Half of the moves that come first free bits, half of them take some.
    lower, higher = (
        sorted((m for m in moves if (m[1] > bits[m[0]]) is is_up), key=predict, reverse=is_up)
        for is_up in (False, True)
    )
    ordered = [m for pair in zip(lower, higher, strict=False) for m in pair]
    ordered += lower[len(higher) :] + higher[len(lower) :]
    changes = {}
    for name, new in ordered:
        if measured.left <= len(_RESTRAINTS):
            break
        value = measured({**bits, **dict.fromkeys(members[name], new)})
        assert value is not None
        changes[name, new] = value - lost
    return changes


def _choose_changes(
    table: SensitivityTable,
    inventory: Inventory,
    bits: _Bits,
    budget: Budget,
    changes: Mapping[tuple[str, int], float],
) -> list[_Bits]:
    """Different allocations within the budget of which single changes gain the most together."""
    widths = {
        name: tuple(sorted({bits[name], *(b for n, b in changes if n == leader)}))
        for name, leader in inventory.leaders.items()
    }
    near = replace(inventory, sites=tuple(replace(s, bits=widths[s.name]) for s in inventory.sites))
    gains = [-value for value in changes.values() if value < 0]
    mean_gain = sum(gains) / len(gains) if gains else 0.0
    found: list[_Bits] = []
    for restraint in _RESTRAINTS:
        scores = {
            site.name: {
                b: Score(changes[site.name, b] + restraint * mean_gain if (site.name, b) in changes else 0.0)
                for b in site.bits
            }
            for site in near.sites
        }
        local = SensitivityTable(criterion=table.criterion, inventory=near, scores=scores)
        chosen = _own_bits(near, allocate(local, budget).bits)
        if chosen != bits and chosen not in found:
            found.append(chosen)
    return found

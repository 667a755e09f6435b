"""Chooses a bit-width for every site: the integer program of Eq. 5 over a sensitivity table, solved exactly."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

from infoq_fx.allocation.core_problem import search_core
from infoq_fx.allocation.cost import bound_own_cost, broken_limits, build_cost_row, measure_cost
from infoq_fx.allocation.float_candidates import drop_idle_floats, widest_integer
from infoq_fx.allocation.integer_program import build_rows, solve_with_highs
from infoq_fx.allocation.lagrangian_bound import CandidateScores
from infoq_fx.allocation.pairwise_program import join_pairs, minimize_pairs, total_of_pairs
from infoq_fx.allocation.reach import describe_reach
from infoq_fx.core.option_checks import check_alpha
from infoq_fx.errors import InfeasibleBudgetError, InfoqError, OptionError, unknown_name_error
from infoq_fx.table import SensitivityTable, check_table
from infoq_fx.types import (
    FLOAT16_BITS,
    MAX_BITS,
    Allocation,
    Budget,
    Inventory,
    QuantSite,
    Score,
    check_bits,
)

__all__ = ["allocate", "check_budget", "find_uniform", "move_allocation", "pin_sites", "propose"]

_POWERS = (1.0, 0.75, 0.5, 0.25)
_LOGGER = logging.getLogger(__name__)

# The objective is the excess of a score over its site's best, scaled so that the best known allocation has this value:
# the solver's absolute tolerances (1e-9) are then 1e-14 of it. If the improved objective is below _RESCALE of the old
# one, the program is scaled and solved again.
_OBJECTIVE_SCALE = 1e5
_RESCALE = 1e-3

_Bits = dict[str, int]


def allocate(
    table: SensitivityTable,
    budget: float | Budget,
    *,
    alpha: float = 1.0,
    pin: Mapping[str, int] | None = None,
) -> Allocation:
    """Return the allocation with the least total score among all that meet every limit of the budget.

    If two bit-widths of a site have equal scores, the larger one is taken as far as the budget reaches, but not float
    (16). Scores of pairs, if the table has some, are added; such a program is solved exactly if it is small, and by a
    local search otherwise. Where no limit counts activations, one stays in float only if that gains much, see
    ``infoq_fx.allocation.float_candidates``. The result is deterministic.

    Args:
        table: scores of every site with more than one candidate.
        budget: the limits; a number is the mean weight bit-width.
        alpha: factor on the scores of activations relative to those of weights.
        pin: fixed bit-widths by site name, each one of the site's candidates; it holds for all sites of a tie.

    Returns:
        The bit-width of every site, one for all sites of a tie, the total score with its standard error (errors of
        sites are taken as independent), the cost, and for comparison the largest uniform weight bit-width within the
        same budget, scored by the same table. In the uniform allocation, searched activations have their largest
        candidate or, if that does not fit, the weights' bit-width.

    Raises:
        OptionError: an argument is invalid, or a candidate has no score.
        InfeasibleBudgetError: a limit cannot be met; the message says what can.
        InfoqError: the solver did not run, or did not finish.

    Reference:
        InfoQ, Eq. 5.
    """
    return next(_propose(table, budget, alpha, pin or {}, (1.0,)))


def propose(
    table: SensitivityTable,
    budget: float | Budget,
    *,
    alpha: float = 1.0,
    pin: Mapping[str, int] | None = None,
    second: Mapping[str, Mapping[int, float]] | None = None,
) -> list[Allocation]:
    """Return a few different allocations within the budget, of which the best can be found by running them.

    The damages of single sites add up only as long as they are small; the sum of large scores overestimates the total.
    The allocations are therefore that of :func:`allocate`, those with the least total of the scores' powers 0.75, 0.5
    and 0.25, that of ``second``, other scores of all searched sites, if given, and the uniform allocation of the
    largest bit-width that fits.

    Other arguments and errors are those of :func:`allocate`. The scores in the results are the table's.
    """
    found: list[Allocation] = []
    for allocation in _propose(table, budget, alpha, pin or {}, _POWERS, second):
        if all(allocation.bits != other.bits for other in found):
            found.append(allocation)
    return found


def move_allocation(
    table: SensitivityTable, allocation: Allocation, bits: Mapping[str, int], alpha: float = 1.0
) -> Allocation:
    """Return an allocation of the same table and budget with other bit-widths, and their score and cost.

    Args:
        table: the scores.
        allocation: what :func:`allocate` found.
        bits: bit-width of every site, within the budget.
        alpha: factor on the scores of activations.
    """
    assert allocation.budget is not None
    sites = [replace(site, bits=(bits[site.name],)) for site in table.inventory.sites]
    candidates = {site.name: _read_scores(table, site, alpha) for site in sites}
    uniform = allocation.uniform_bits, allocation.uniform_score
    return _describe(table, table.inventory, allocation.budget, candidates, dict(bits), alpha, uniform)


def check_budget(inventory: Inventory, budget: float | Budget) -> Budget:
    """Return the budget as a :class:`Budget`, after checking that the candidate bit-widths can meet it.

    Args:
        inventory: of the prepared model.
        budget: the limits; a number is the mean weight bit-width.

    Raises:
        OptionError: the budget is neither a number nor a :class:`Budget`.
        InfeasibleBudgetError: no allocation meets the limits.
    """
    limits = _read_budget(budget)
    # Built-in costs grow with every bit-width: this one allocation has the extreme of all of them at once.
    cost = measure_cost(inventory, {site.name: site.bits[0] for site in inventory.sites}, limits.costs)
    broken = broken_limits(cost, limits)
    choices = {site.name: site.bits for site in inventory.sites}
    own = {
        name: build_cost_row(inventory, name, limits.costs[name], choices) for name in broken if name in limits.costs
    }
    free = {name: row for name, row in own.items() if not row.grows_with_bits}
    if beyond := [name for name in broken if name not in free or free[name].least > free[name].limit]:
        reached = {name: bound_own_cost(row, limits.costs[name]) for name, row in own.items()}
        raise InfeasibleBudgetError("; ".join(describe_reach(inventory, limits, cost, n, reached) for n in beyond))
    if broken and _find_fitting(inventory, limits) is None:
        raise InfeasibleBudgetError(
            f"no allocation meets {limits} at once, though each limit alone can be met; raise one of them, or allow "
            "other bit-widths"
        )
    return limits


def _propose(
    table: SensitivityTable,
    budget: float | Budget,
    alpha: float,
    pin: Mapping[str, int],
    powers: Iterable[float],
    second: Mapping[str, Mapping[int, float]] | None = None,
) -> Iterator[Allocation]:
    check_alpha(alpha)
    check_table(table)
    inventory = pin_sites(table.inventory, pin)
    limits = check_budget(inventory, budget)
    candidates = {site.name: _read_scores(table, site, float(alpha)) for site in inventory.sites}

    def solve(inventory: Inventory, scores: CandidateScores) -> float:
        joined, known = _join_ties(inventory, _scores_of(inventory, scores)), _find_known(inventory, limits)
        return _total_score(joined, _minimize_score(inventory, limits, joined, known))

    inventory = drop_idle_floats(inventory, limits, candidates, solve)
    candidates = _scores_of(inventory, candidates)
    known = _find_known(inventory, limits)
    uniform_bits, uniform = find_uniform(inventory, limits)
    of_uniform = None if uniform is None else _total_score(candidates, uniform) + total_of_pairs(table.pairs, uniform)

    def describe(bits: _Bits) -> Allocation:
        return _describe(table, inventory, limits, candidates, bits, float(alpha), (uniform_bits, of_uniform))

    def minimize(scores: CandidateScores) -> _Bits:
        joined = _join_ties(inventory, scores)
        return inventory.spread(_spend(inventory, limits, joined, _minimize_score(inventory, limits, joined, known)))

    if table.pairs:
        leading = [_leading(inventory, bits) for bits in (minimize(candidates), *known)]
        single, pairs = join_pairs(inventory.leaders, _join_ties(inventory, candidates), table.pairs)
        best = minimize_pairs(inventory, limits, single, pairs, leading, lambda bits: _fits(inventory, limits, bits))
        yield describe(inventory.spread(best))
        powers = [power for power in powers if power != 1]
    for power in powers:
        # A user-defined criterion may have scores below 0; their order is kept.
        raised = {n: {b: math.copysign(abs(v) ** power, v) for b, v in d.items()} for n, d in candidates.items()}
        yield describe(minimize(raised if power != 1 else candidates))
    if second is not None:
        yield describe(
            minimize({s.name: {b: second.get(s.name, {}).get(b, 0.0) for b in s.bits} for s in inventory.sites})
        )
    if uniform is not None:
        yield describe(uniform)


def _scores_of(inventory: Inventory, scores: CandidateScores) -> dict[str, dict[int, float]]:
    """The scores of the candidates that the sites of an inventory have."""
    return {site.name: {bits: scores[site.name][bits] for bits in site.bits} for site in inventory.sites}


def _find_known(inventory: Inventory, limits: Budget) -> list[_Bits]:
    """Some allocations within the limits, which bound the search."""
    smallest = {site.name: site.bits[0] for site in inventory.sites}
    known = [bits for bits in (smallest, find_uniform(inventory, limits)[1]) if bits and _fits(inventory, limits, bits)]
    return known or [bits for bits in (_find_fitting(inventory, limits),) if bits is not None]


def _describe(
    table: SensitivityTable,
    inventory: Inventory,
    limits: Budget,
    candidates: CandidateScores,
    bits: _Bits,
    alpha: float,
    uniform: tuple[int | None, float | None],
) -> Allocation:
    chosen = {name: table.scores[name][b] for name, b in bits.items() if b in table.scores.get(name, {})}
    weights = {site.name: 1.0 if site.kind == "weight" else alpha for site in inventory.sites}
    completed = inventory.complete_floats(bits)
    shown = completed if _fits(inventory, limits, completed) else bits
    return Allocation(
        bits=shown,
        criterion=table.criterion,
        budget=limits,
        score=_total_score(candidates, bits) + total_of_pairs(table.pairs, bits),
        standard_error=math.hypot(*(weights[name] * score.standard_error for name, score in chosen.items())),
        cost=measure_cost(inventory, shown, limits.costs),
        uniform_bits=uniform[0],
        uniform_score=uniform[1],
        scored_for=table.scored_for,
        scores=chosen,
        ties=inventory.ties,
    )


def _read_budget(budget: Any) -> Budget:
    if isinstance(budget, Budget):
        return budget
    if isinstance(budget, type):
        raise OptionError(f"budget={budget.__name__} is a class; give an instance, such as Budget(weight_bits=3.0)")
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise OptionError(
            f"budget={budget!r} is neither a number nor a Budget; give mean weight bits, such as 3.0, or a Budget"
        )
    return Budget(weight_bits=float(budget))


def pin_sites(inventory: Inventory, pin: Mapping[str, int]) -> Inventory:
    """Return the inventory with a single candidate for every pinned site, and for all sites tied to one.

    Raises:
        OptionError: there is no site of a name, a bit-width is not a candidate, or tied sites are pinned differently.
    """
    names = [site.name for site in inventory.sites]
    fixed: dict[str, int] = {}
    for name, bits in pin.items():
        if name not in names:
            raise unknown_name_error("site in pin", name, names)
        (fixed[name],) = check_bits(bits, f"pin[{name!r}]")
        if bits not in inventory[name].bits:
            raise OptionError(
                f"pin[{name!r}]={bits} is not among the site's candidates; take one of {inventory[name].bits}"
            )
    for tie in inventory.ties:
        pinned = {name: fixed[name] for name in tie if name in fixed}
        if len(set(pinned.values())) > 1:
            raise OptionError(f"pin={pinned} gives tied sites different bits; pin one of them, or all alike")
        fixed |= dict.fromkeys(tie, next(iter(pinned.values()))) if pinned else {}
    sites = tuple(replace(site, bits=(fixed[site.name],)) if site.name in fixed else site for site in inventory.sites)
    return replace(inventory, sites=sites)


def _read_scores(table: SensitivityTable, site: QuantSite, alpha: float) -> dict[int, float]:
    """Weighted scores of the candidates of a site; a site with one candidate needs no score."""
    scores: Mapping[int, Score] = table.scores.get(site.name, {})
    if not scores and len(site.bits) == 1:
        return {site.bits[0]: 0.0}
    for bits in site.bits:
        if bits not in scores:
            known = ", ".join(map(str, sorted(scores))) or "none"
            raise OptionError(
                f"the table has no score for {site.name!r} at {bits} bits; scored there: {known}; score it, or pin "
                "the site"
            )
    weight = 1.0 if site.kind == "weight" else alpha
    return {bits: weight * scores[bits].value for bits in site.bits}


def _join_ties(inventory: Inventory, scores: CandidateScores) -> dict[str, dict[int, float]]:
    """The scores by the first site of every tie, summed over its sites; other sites have their own."""
    joined = {name: dict(scores[name]) for name, leader in inventory.leaders.items() if name == leader}
    for tie in inventory.ties:
        joined[tie[0]] = {b: math.fsum(scores[name][b] for name in tie) for b in joined[tie[0]]}
    return joined


def _leading(inventory: Inventory, bits: Mapping[str, int]) -> _Bits:
    """The bits of the first sites of all ties, and of the sites in none."""
    return {name: bits[name] for name, leader in inventory.leaders.items() if name == leader}


def _total_score(candidates: CandidateScores, bits: Mapping[str, int]) -> float:
    return math.fsum(candidates[name][b] for name, b in bits.items())


def find_uniform(inventory: Inventory, budget: Budget) -> tuple[int | None, _Bits | None]:
    """Return the largest bit-width that all searched weights can have within the budget, and that allocation.

    Searched activations have their largest integer candidate or, if that does not fit, the weights' bit-width. A
    bit-width of 16, float, is not uniform.
    """
    free = [site for site in inventory.sites if len(site.bits) > 1]
    candidates = [set(site.bits) - {FLOAT16_BITS} for site in free if site.kind == "weight"]
    common = set.intersection(*candidates) if candidates else set()
    largest = {site.name: widest_integer(site) for site in inventory.sites}
    for bits in sorted(common, reverse=True):
        wide = {**largest, **{site.name: bits for site in free if site.kind == "weight"}}
        choices = [wide]
        if all(bits in site.bits for site in free):
            choices.append({**largest, **{site.name: bits for site in free}})
        for choice in choices:
            if _fits(inventory, budget, choice):
                return bits, choice
    return None, None


def _minimize_score(inventory: Inventory, budget: Budget, candidates: CandidateScores, known: Iterable[_Bits]) -> _Bits:
    """The best allocation within the budget; the ``known`` allocations, which fit it, bound the search."""
    rows = build_rows(inventory, budget, candidates)
    grows = all(row.grows_with_bits for row in rows)
    efficient = {name: _drop_dominated(scores) if grows else dict(scores) for name, scores in candidates.items()}
    floor = {name: min(scores.values()) for name, scores in efficient.items()}
    excess = {name: {b: s - floor[name] for b, s in scores.items()} for name, scores in efficient.items()}
    unlimited = {name: min(scores, key=lambda b: (scores[b], b)) for name, scores in efficient.items()}
    if _fits(inventory, budget, unlimited):
        return unlimited
    lowered = [{name: max(c for c in efficient[name] if c <= bits[name]) for name in efficient} for bits in known]
    best = min(lowered, key=lambda bits: _total_score(excess, bits))
    # Nothing is better than no excess: under a cost that falls with the bits, the fewest of equal scores may not fit.
    while span := _total_score(excess, best):
        # A candidate whose own excess is above the span cannot be part of a better allocation.
        scaled = {
            name: {b: e / span * _OBJECTIVE_SCALE for b, e in scores.items() if e <= span}
            for name, scores in excess.items()
        }
        found = _solve(inventory, budget, scaled, best)
        if _total_score(excess, found) < span:
            best = found
        if _total_score(excess, best) > _RESCALE * span:
            break
        _LOGGER.debug("scores span many orders of magnitude: solving again, scaled to the best allocation found")
    return best


def _spend(inventory: Inventory, budget: Budget, scores: CandidateScores, bits: _Bits) -> _Bits:
    """Raise bit-widths that cost no score as far as the budget reaches, the lowest and smallest first.

    Scores that tie say nothing against more bits, and what the budget has left is of no other use. Float, which gives
    up integer kernels, is not taken so.
    """
    raised = dict(bits)
    free = [site for site in inventory.sites if site.name in bits]
    for site in sorted(free, key=lambda site: (bits[site.name], site.numel)):
        known = scores[site.name]
        for wider in sorted((b for b in known if raised[site.name] < b <= MAX_BITS), reverse=True):
            tried = {**raised, site.name: wider}
            if known[wider] <= known[raised[site.name]] and _fits(inventory, budget, tried):
                raised = tried
                break
    return raised


def _drop_dominated(scores: Mapping[int, float]) -> dict[int, float]:
    """Keep the candidates that score below every smaller one; for costs that all grow with the bits."""
    efficient: dict[int, float] = {}
    for bits in sorted(scores):
        if not efficient or scores[bits] < min(efficient.values()):
            efficient[bits] = scores[bits]
    return efficient


def _solve(inventory: Inventory, budget: Budget, scores: CandidateScores, known: _Bits) -> _Bits:
    """One candidate per site with the least total score within every limit, which the ``known`` allocation meets."""
    rows = build_rows(inventory, budget, scores)
    best, rest = known, scores
    if all(row.grows_with_bits for row in rows):
        bits, core = search_core(rows, scores, _total_score(scores, known))
        best = {**known, **bits}
        if core is None or all(len(by_bits) == 1 for by_bits in core.values()):
            return best
        _LOGGER.debug("too many allocations near the bound to enumerate: HiGHS solves the remaining problem")
        rest = {name: dict(by_bits) for name, by_bits in core.items()}
    found = solve_with_highs(inventory, budget, rest)
    if found is None:  # cannot be: the known allocation meets all limits
        raise InfoqError(f"HiGHS found no proven optimum for {budget}; try a slightly different budget")
    return min(best, found, key=lambda bits: _total_score(scores, bits))


def _fits(inventory: Inventory, budget: Budget, bits: _Bits) -> bool:
    return not broken_limits(measure_cost(inventory, inventory.spread(bits), budget.costs), budget)


def _find_fitting(inventory: Inventory, budget: Budget) -> _Bits | None:
    """Any allocation within the budget, for costs that do not grow with the bits."""
    scores = {site.name: dict.fromkeys(site.bits, 0.0) for site in inventory.sites}
    found = solve_with_highs(inventory, budget, _join_ties(inventory, scores))
    return None if found is None else inventory.spread(found)

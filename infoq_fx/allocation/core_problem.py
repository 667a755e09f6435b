"""Finds the optimum of Eq. 5, or the candidates that it can have, by enumerating allocations near the lower bound.

Only an allocation that exceeds the bound of :mod:`infoq_fx.allocation.lagrangian_bound` by less than the best known one
can be better. There are usually few enough of these to enumerate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from infoq_fx.allocation.cost import CostRow
from infoq_fx.allocation.lagrangian_bound import (
    MAX_TOTAL,
    NO_PICKS,
    Bound,
    CandidateScores,
    Doubles,
    Integers,
    Program,
    measure_rises,
    read_program,
    set_prices,
    site_costs,
    total_score,
)

__all__ = ["search_core"]

_Bits: TypeAlias = dict[str, int]

_FIRST_OPTIONS = 24  # options besides the best in the first enumeration
_GROWTH = 1.6
_TIED = 0.1  # options that raise the bound by less than this share of the gap count as equally good
_MAX_BRANCHES = 400  # beyond it HiGHS solves the rest
_FEW_STATES = 200  # up to this many are kept without comparison, which costs more
_MAX_STATES = 1 << 15  # of half of the sites; splitting is faster than longer lists
_MAX_PAIRS = 1 << 23
_CHUNK = 1 << 18


@dataclass(frozen=True)
class _States:
    """Partial allocations: options of some ``sites``, sorted by ascending excess over the bound."""

    sites: tuple[int, ...]
    picks: NDArray[np.int8]  # [states, sites]
    excess: Doubles
    scores: Doubles
    costs: Integers  # [rows, states]


def search_core(
    rows: Sequence[CostRow], scores: CandidateScores, ceiling: float
) -> tuple[_Bits, CandidateScores | None]:
    """Find the best allocation below a known score, or at least the candidates that it can consist of.

    Args:
        rows: the limits over the sites with several candidates; all costs grow with the bits.
        scores: score of every candidate by site and bits, fewest bits first; the least score of each site is 0.
        ceiling: positive score of a known allocation of these candidates that meets all limits.

    Returns:
        Bits of the best allocation found, if any, and the candidates that a better one can have; None if there is none.
    """
    program = read_program(rows, scores)
    if program is None:
        return {}, scores
    best, branches, rounds = NO_PICKS, [program], 0
    while branches and rounds < _MAX_BRANCHES:
        found, parts = _search_branch(branches.pop(), ceiling)
        if found.size:
            best, ceiling = found, total_score(program, found)
        branches, rounds = branches + parts, rounds + 1
    bits = {name: by[pick] for name, by, pick in zip(program.sites, program.bits, best, strict=False)}
    if not branches:
        return bits, None
    bound, _ = set_prices(program, ceiling)
    gap, kept = ceiling - bound.value + 2 * bound.rounding, dict(scores)
    for name, by, rises in zip(program.sites, program.bits, measure_rises(program, bound), strict=True):
        kept[name] = {b: scores[name][b] for b, rise in zip(by, rises, strict=False) if rise <= gap}
    return bits, kept


def _search_branch(program: Program, ceiling: float) -> tuple[Integers, list[Program]]:
    """The best picks found below the ceiling, and the subproblems that remain to be searched for better ones."""
    if (site_costs(program, np.isfinite(program.scores).argmax(1)).sum(1) > program.capacity).any():
        return NO_PICKS, []
    bound, best = set_prices(program, ceiling)
    rises = measure_rises(program, bound)
    above = np.sort(rises[np.isfinite(rises) & (rises > bound.rounding)])
    window = float(above[_FIRST_OPTIONS]) if above.size > _FIRST_OPTIONS else math.inf
    while True:
        ceiling = total_score(program, best) if best.size else ceiling
        gap = ceiling - bound.value + bound.rounding
        if gap < 0:
            return best, []
        window = min(window, gap)
        found = _search_window(program, bound, rises, window + bound.rounding, ceiling)
        if found is None:
            return best, _split(program, rises, gap + bound.rounding)
        best = found if found.size else best
        if window == gap or (best.size and total_score(program, best) - bound.value + bound.rounding <= window):
            return best, []
        window *= _GROWTH


def _split(program: Program, rises: Doubles, gap: float) -> list[Program]:
    """Split the program into one subproblem per option of a site; the most promising comes last.

    The site is that whose scores differ most among the options that hardly raise the bound: if options far apart
    attain the bound only as a mixture, there may be no feasible allocation near it.
    """
    for near in (rises <= _TIED * gap, rises <= gap):
        high, low = (np.where(near, program.scores, other) for other in (-np.inf, np.inf))
        spread = high.max(1) - low.min(1)
        if spread.max() > 0:
            break
    site = int(spread.argmax())
    rows, options = np.indices(program.scores.shape)
    order = np.argsort(-rises[site], kind="stable")[(rises[site] > gap).sum() :]
    barred = [(rows == site) & (options != option) for option in order]
    return [replace(program, scores=np.where(mask, np.inf, program.scores)) for mask in barred]


def _search_window(program: Program, bound: Bound, rises: Doubles, window: float, ceiling: float) -> Integers | None:
    """The best picks below the ceiling with excess within the window; empty if none, None if too many to enumerate."""
    program, bound = _drop_loose_rows(program, bound, rises <= window)
    is_open = (rises <= window).sum(1) > 1
    settled = [tree for tree in program.trees if not is_open[list(tree)].any()]
    halves = [_settle(program, bound.picks, sites) for sites in (list(itertools.chain(*settled)), [])]
    trees = [_list_tree(program, bound, tree, window) for tree in program.trees if tree not in settled]
    for states in sorted(trees, key=lambda states: 0 if states is None else -states.excess.size):
        smaller = min((0, 1), key=lambda half: halves[half].excess.size)
        joined = states and _combine(program, halves[smaller], states, window)
        if joined is None:
            return None
        halves[smaller] = joined
    return _join(program, bound, halves, window, ceiling) if all(h.excess.size for h in halves) else NO_PICKS


def _drop_loose_rows(program: Program, bound: Bound, allowed: NDArray[np.bool_]) -> tuple[Program, Bound]:
    """Drop unpriced limits that no allowed options can exceed, so that more states dominate each other."""
    steps = np.where(allowed, program.steps, 0).max(1)
    most = np.where(allowed, program.linear, 0).max(2) + program.links * steps * steps[program.parents]
    tight = (most.sum(1) > program.capacity) | (bound.prices > 0)
    tight[0] |= not tight.any()
    linear, links, capacity = program.linear[tight], program.links[tight], program.capacity[tight]
    return replace(program, linear=linear, links=links, capacity=capacity), replace(bound, prices=bound.prices[tight])


def _settle(program: Program, picks: Integers, sites: Sequence[int]) -> _States:
    """The single state of sites with one option left each."""
    chosen = np.array(sites, np.int64)
    costs, score = site_costs(program, picks)[:, chosen].sum(1), program.scores[chosen, picks[chosen]].sum()
    return _States(tuple(sites), picks[None, chosen].astype(np.int8), np.zeros(1), np.array([score]), costs[:, None])


def _list_tree(program: Program, bound: Bound, tree: Sequence[int], window: float) -> _States | None:
    """The allocations of the sites of a tree with excess within the window; None if too many."""
    states = _settle(program, bound.picks, ())
    for column, site in enumerate(tree):
        parent = int(program.parents[site])
        above = states.picks[:, tree.index(parent)] if column else np.zeros(1, np.int8)
        excess = states.excess + bound.excess[site][:, above]
        options, index = np.nonzero(excess <= window)
        if options.size > _MAX_STATES:
            return None
        products = program.steps[site, options] * program.steps[parent, above[index]]
        states = _States(
            tuple(tree[: column + 1]),
            np.column_stack([states.picks[index], options.astype(np.int8)]),
            excess[options, index],
            states.scores[index] + program.scores[site, options],
            states.costs[:, index] + program.linear[:, site, options] + program.links[:, site, None] * products,
        )
    kept = _choose_states(program, states.excess, states.scores, states.costs, window)
    picks, excess, scores, costs = states.picks[kept], states.excess[kept], states.scores[kept], states.costs[:, kept]
    return _States(states.sites, picks, excess, scores, costs)


def _combine(program: Program, left: _States, right: _States, window: float) -> _States | None:
    """The pairs of a left and a right state with excess within the window; None if too many."""
    counts = np.searchsorted(left.excess, window - right.excess, "right")
    if counts.sum() > _MAX_STATES:
        return None
    ones, others = _spread(np.zeros_like(counts), counts)
    excess, scores = left.excess[ones] + right.excess[others], left.scores[ones] + right.scores[others]
    costs = left.costs[:, ones] + right.costs[:, others]
    kept = _choose_states(program, excess, scores, costs, window)
    picks = np.hstack([left.picks[ones[kept]], right.picks[others[kept]]])
    return _States(left.sites + right.sites, picks, excess[kept], scores[kept], costs[:, kept])


def _spread(starts: Integers, counts: Integers) -> tuple[Integers, Integers]:
    """Concatenated ranges of integers, and the index of the range that each integer is from."""
    owners = np.repeat(np.arange(counts.size), counts)
    first = np.cumsum(counts) - counts
    return np.arange(owners.size) - first[owners] + starts[owners], owners


def _choose_states(program: Program, excess: Doubles, scores: Doubles, costs: Integers, window: float) -> Integers:
    """The indices of states within the window and the limits that no other state dominates, sorted by excess."""
    kept = np.flatnonzero((excess <= window) & (costs <= program.capacity[:, None]).all(0))
    if kept.size > _FEW_STATES:
        kept = kept[~_find_beaten(scores[kept], costs[:, kept])]
    return kept[np.argsort(excess[kept], kind="stable")]


def _find_beaten(scores: Doubles, costs: Integers) -> NDArray[np.bool_]:
    """Find most of the states that another one dominates: no higher score and no higher cost in any row.

    States are sorted into the cells of a grid over the costs. A state is dominated by any with no higher score in a
    cell that is lower in every cost, and by the best state of its own cell if that has no higher costs.
    """
    count = scores.size
    low, high = costs.min(1), costs.max(1)
    varied = np.flatnonzero(high > low)
    if not varied.size:
        return np.asarray(np.arange(count) != scores.argmin())
    side = int((4 * count) ** (1 / varied.size)) + 1
    shape = (side + 1,) * varied.size
    cells = ((costs - low[:, None])[varied] * (side / (high - low)[varied, None])).astype(np.int64)
    flat = np.ravel_multi_index(tuple(cells), shape)
    # The last state written to a cell stays there: the one of least score and, of several, the cheapest.
    order = np.lexsort((costs.sum(0), scores))[::-1]
    best = np.full(math.prod(shape), -1)
    best[flat[order]] = order
    rival = best[flat]
    beaten = (rival != np.arange(count)) & (costs[:, rival] <= costs).all(0)
    least = np.where(best >= 0, scores[best], np.inf).reshape(shape)
    for axis in range(varied.size):
        least = np.minimum.accumulate(least, axis=axis)
    lower = np.where((cells > 0).all(0), least[tuple(np.maximum(cells - 1, 0))], np.inf)
    return np.asarray(beaten | (lower <= scores))


def _join(program: Program, bound: Bound, halves: Sequence[_States], window: float, ceiling: float) -> Integers | None:
    """The picks of the best pair that meets the limits, below the ceiling; empty if none, None if too many.

    The unused part of a priced limit adds to the excess of a pair, so that pairs within the window have costs in a
    narrow band below the limit.
    """
    left, right = halves
    spread = bound.prices * np.ptp(right.costs, axis=1)
    row = int(spread.argmax())
    order = np.argsort(right.costs[row], kind="stable")
    sorted_costs = right.costs[row, order]
    room = program.capacity[row] - left.costs[row]
    band = np.full(room.shape, float(2 * MAX_TOTAL))
    if spread[row] > 0:
        band = np.minimum((window - left.excess) / bound.prices[row] * (1 + 1e-9) + 1, band)
    starts = np.searchsorted(sorted_costs, room - band.astype(np.int64), "left")
    counts = np.maximum(np.searchsorted(sorted_costs, room, "right") - starts, 0)
    if (ends := np.cumsum(counts))[-1] > _MAX_PAIRS:
        return None
    best = NO_PICKS
    for chunk in np.split(np.arange(counts.size), np.flatnonzero(np.diff(ends // _CHUNK)) + 1):
        found, ones = _spread(starts[chunk], counts[chunk])
        ones, others = chunk[ones], order[found]
        scores = left.scores[ones] + right.scores[others]
        ones, others = ones[scores < ceiling], others[scores < ceiling]
        fits = (left.costs[:, ones] + right.costs[:, others] <= program.capacity[:, None]).all(0)
        if fits.any():
            scores = np.where(fits, left.scores[ones] + right.scores[others], np.inf)
            one, other = ones[scores.argmin()], others[scores.argmin()]
            ceiling = float(scores.min())
            best = np.zeros(len(program.sites), np.int64)
            best[list(left.sites)], best[list(right.sites)] = left.picks[one], right.picks[other]
    return best

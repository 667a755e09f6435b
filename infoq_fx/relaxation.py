"""Eq. 5 near its Lagrangian bound: which bit-widths an optimum can have, and the optimum where those are few.

Every limit becomes a price on its costs. What is left falls apart into small trees of sites that share
operations, and message passing solves those exactly, so any prices give a lower bound on the score. It is
within a few thousandths of the optimum on real networks: only allocations that exceed it by less than a known
one does are worth looking at, and those can mostly be listed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from infoq_fx.cost import CostRow

__all__ = ["Candidates", "search_core"]

Candidates: TypeAlias = Mapping[str, Mapping[int, float]]
_Bits: TypeAlias = dict[str, int]
_Doubles: TypeAlias = NDArray[np.float64]
_Integers: TypeAlias = NDArray[np.int64]

_NONE: _Integers = np.zeros(0, np.int64)
_MAX_TOTAL = 2**60  # sums of costs stay within int64
# Rounding, in parts of the largest score or priced cost, a site: such a sum has as many terms as there are sites.
_ROUNDING = 1e-14
_MAX_CUTTING_ROUNDS = 60
_WAY = (0.3, 0.6, 1.0)
_PRICE_GAP = 1e-3  # prices are good enough when better ones raise the bound by less of what is left to close
_FIRST_OPTIONS = 24  # options beside the best that the first listing considers
_GROWTH = 1.6
_TIED = 0.1  # options that raise the bound by less of the gap are as good as its own
_MAX_BRANCHES = 400  # then CBC takes over
_FEW_STATES = 200  # so few are cheaper to keep than to compare
_MAX_STATES = 1 << 15  # of half the sites; splitting is quicker than longer lists
_MAX_PAIRS = 1 << 23
_CHUNK = 1 << 18


def search_core(rows: Sequence[CostRow], scores: Candidates, ceiling: float) -> tuple[_Bits, Candidates | None]:
    """The best allocation below a known score, or at least the candidates that it is made of.

    Args:
        rows: the limits over the sites that have a choice; all costs grow with the bits.
        scores: score of every candidate by site and bits, each site's least 0; fewest bits first.
        ceiling: positive score of a known allocation that meets all limits and is made of these candidates.

    Returns:
        Bits of the best one found, if any, and the candidates that a better one can have; None: nothing is better.
    """
    program = _read_program(rows, scores)
    if program is None:
        return {}, scores
    best, branches, rounds = _NONE, [program], 0
    while branches and rounds < _MAX_BRANCHES:
        found, parts = _search_branch(branches.pop(), ceiling)
        if found.size:
            best, ceiling = found, _total_score(program, found)
        branches, rounds = branches + parts, rounds + 1
    bits = {name: by[pick] for name, by, pick in zip(program.sites, program.bits, best, strict=False)}
    if not branches:
        return bits, None
    bound, _ = _set_prices(program, ceiling)
    gap, kept = ceiling - bound.value + 2 * bound.rounding, dict(scores)
    for name, by, rises in zip(program.sites, program.bits, _measure_rises(program, bound), strict=True):
        kept[name] = {b: scores[name][b] for b, rise in zip(by, rises, strict=False) if rise <= gap}
    return bits, kept


@dataclass(frozen=True)
class _Program:
    """The sites that have a choice, with all costs taken above those of the fewest bits.

    A site's ``steps`` are its bits above its fewest. The product of two sites' bits is then a linear cost of
    each and the product of their steps. The sites form trees by those products.
    """

    sites: tuple[str, ...]
    bits: tuple[tuple[int, ...], ...]
    scores: _Doubles  # [sites, options]; inf: no such option, or one beyond some limit by itself
    steps: _Integers  # [sites, options]
    linear: _Integers  # [rows, sites, options]
    capacity: _Integers  # [rows]
    parents: _Integers  # [sites]; a root is its own
    links: _Integers  # [rows, sites], multiply-accumulates shared with the parent
    products: _Doubles  # [sites, options, options of the parent], of the steps
    levels: tuple[_Integers, ...]  # sites by depth, roots first
    trees: tuple[tuple[int, ...], ...]  # sites of each, parents first


@dataclass(frozen=True)
class _Bound:
    """A lower bound on the score, and by how much each choice exceeds it.

    ``excess`` is what the choice of a site's option adds to the bound when its parent's is given.
    """

    value: float
    prices: _Doubles  # [rows], score a unit of cost
    excess: _Doubles  # [sites, options, options of the parent]
    picks: _Integers  # [sites], the options that attain the bound
    rounding: float  # of the value and of sums of excess, at most


@dataclass(frozen=True)
class _States:
    """Partial allocations: options of some ``sites`` with their excess over the bound, ascending."""

    sites: tuple[int, ...]
    picks: NDArray[np.int8]  # [states, sites]
    excess: _Doubles
    scores: _Doubles
    costs: _Integers  # [rows, states]


def _read_program(rows: Sequence[CostRow], scores: Candidates) -> _Program | None:
    """The program in arrays; None for costs beyond integers of 64 bits, and for products that close a cycle."""
    sites = tuple(name for name, by_bits in scores.items() if len(by_bits) > 1)
    bits = tuple(tuple(scores[name]) for name in sites)
    index = {name: i for i, name in enumerate(sites)}
    shape = (len(sites), max(map(len, bits)))
    values, exact_steps = np.full(shape, np.inf), np.zeros(shape, object)  # Python's integers do not overflow
    for i, by in enumerate(bits):
        values[i, : len(by)] = list(scores[sites[i]].values())
        exact_steps[i, : len(by)] = [b - by[0] for b in by]
    exact_costs = np.zeros((len(rows), *shape), object)
    shared: dict[tuple[int, int], _Integers] = {}
    limits = []
    for k, (row, costs) in enumerate(zip(rows, exact_costs, strict=True)):
        limit, total = row.limit, 0
        for i, (name, by) in enumerate(zip(sites, bits, strict=True)):
            least = row.linear.get((name, by[0]), 0)
            costs[i, : len(by)] = [row.linear.get((name, b), 0) - least for b in by]
            limit -= least
        for (i, j), macs in (((index[one], index[other]), macs) for (one, other), macs in row.pairs.items()):
            costs[i] += macs * bits[j][0] * exact_steps[i]
            costs[j] += macs * bits[i][0] * exact_steps[j]
            limit -= macs * bits[i][0] * bits[j][0]
            total += macs * exact_steps[i].max() * exact_steps[j].max()
            if macs <= _MAX_TOTAL:
                shared.setdefault((i, j), np.zeros(len(rows), np.int64))[k] = macs
        total += costs.max(1).sum()
        limits.append((min(limit, total), total))  # more than everything is no limit: the smaller number does
    if any(total > _MAX_TOTAL for _, total in limits) or (grown := _grow_trees(len(sites), shared)) is None:
        return None
    parents, levels, trees = grown
    steps, linear, capacity = exact_steps.astype(np.int64), exact_costs.astype(np.int64), np.array(limits)[:, 0]
    values[(linear > capacity[:, None, None]).any(0)] = np.inf
    pairs = [(i, p) if (i, p) in shared else (p, i) for i, p in enumerate(parents.tolist())]
    links = np.stack([shared.get(pair, 0 * capacity) for pair in pairs], axis=1)
    is_child = (parents != np.arange(len(sites)))[:, None, None]
    products = (is_child * steps[:, :, None] * steps[parents][:, None, :]).astype(np.float64)
    return _Program(sites, bits, values, steps, linear, capacity, parents, links, products, levels, trees)


def _grow_trees(
    count: int, pairs: Iterable[tuple[int, int]]
) -> tuple[_Integers, tuple[_Integers, ...], tuple[tuple[int, ...], ...]] | None:
    """Parents, sites by depth, and sites by tree; None where the pairs close a cycle."""
    near: list[list[int]] = [[] for _ in range(count)]
    for left, right in pairs:
        near[left].append(right)
        near[right].append(left)
    parents, depth, trees = list(range(count)), [-1] * count, []
    for root in sorted(range(count), key=lambda site: (-len(near[site]), site)):
        if depth[root] >= 0:
            continue
        depth[root], tree = 0, [root]
        for site in tree:
            for child in near[site]:
                if depth[child] < 0:
                    depth[child], parents[child] = depth[site] + 1, site
                    tree.append(child)
        if sum(len(near[site]) for site in tree) > 2 * (len(tree) - 1):
            return None
        trees.append(tuple(tree))
    levels = tuple(np.flatnonzero(np.array(depth) == d) for d in range(max(depth) + 1))
    return np.array(parents, np.int64), levels, tuple(trees)


def _relax(program: _Program, prices: _Doubles) -> _Bound:
    """The least of score plus priced cost less the priced limits: no allocation within them scores lower."""
    cost = program.scores + _weigh(prices, program.linear)
    pair = _weigh(prices, program.links)[:, None, None] * program.products
    magnitude = cost[np.isfinite(cost)].max() + pair.max() + np.max(prices * program.capacity)
    messages = np.empty_like(cost)
    for level in program.levels[:0:-1]:
        messages[level] = (cost[level][:, :, None] + pair[level]).min(1)
        np.add.at(cost, program.parents[level], messages[level])
    roots = program.levels[0]
    messages[roots] = cost[roots].min(1, keepdims=True)
    excess = cost[:, :, None] + pair - messages[:, None, :]
    picks = np.zeros(len(program.sites), np.int64)
    for level in program.levels:
        picks[level] = excess[level, :, picks[program.parents[level]]].argmin(1)
    value = math.fsum([*messages[roots, 0], *(-prices * program.capacity)])
    return _Bound(value, prices, excess, picks, _ROUNDING * len(picks) * float(magnitude))


def _weigh(prices: _Doubles, costs: NDArray[Any]) -> _Doubles:
    """The sum over the rows in a fixed order: a matrix product may depend on the number of threads."""
    total: _Doubles = np.zeros(costs.shape[1:])
    for price, cost in zip(prices, costs, strict=True):
        total += price * cost
    return total


def _set_prices(program: _Program, ceiling: float) -> tuple[_Bound, _Integers]:
    """Prices of nearly the highest bound, by cutting planes, and the best allocation met below the ceiling."""
    unit = np.maximum(program.capacity, 1).astype(np.float64)
    rows, scale = len(unit), ceiling
    cuts: list[list[float]] = []
    limits: list[float] = []
    best = _relax(program, np.zeros(rows))
    bounds, found = [best], _NONE
    for _ in range(_MAX_CUTTING_ROUNDS):
        # The fewest bits meet every limit: without them the cuts would not bound the prices.
        for picks in (*(bound.picks for bound in bounds), *([] if cuts else [np.isfinite(program.scores).argmax(1)])):
            costs, score = _site_costs(program, picks).sum(1), _total_score(program, picks)
            if score < ceiling and (costs <= program.capacity).all():
                found, ceiling = picks, score
            cuts.append([1.0, *((program.capacity - costs) / unit)])
            limits.append(score / scale)
        best = max([best, *bounds], key=lambda bound: bound.value)
        model = linprog([-1.0] + [0.0] * rows, A_ub=cuts, b_ub=limits, bounds=[(None, None)] + [(0, None)] * rows)
        left = ceiling - best.value
        if model.status != 0 or left < 0 or model.x[0] * scale - best.value <= _PRICE_GAP * left:
            break
        # The cuts' own optimum swings widely at first: points on the way to it need fewer rounds.
        aim = np.maximum(model.x[1:], 0.0) * scale / unit
        bounds = [_relax(program, best.prices + part * (aim - best.prices)) for part in _WAY]
    return best, found


def _total_score(program: _Program, picks: _Integers) -> float:
    return math.fsum(program.scores[np.arange(len(picks)), picks])


def _site_costs(program: _Program, picks: _Integers) -> _Integers:
    """What every site costs with its product with its parent, ``[rows, sites]``."""
    sites = np.arange(len(picks))
    steps = program.steps[sites, picks]
    costs: _Integers = program.linear[:, sites, picks] + program.links * steps * steps[program.parents]
    return costs


def _measure_rises(program: _Program, bound: _Bound) -> _Doubles:
    """By how much the bound rises when a site takes an option, ``[sites, options]``."""
    rises = np.zeros_like(program.scores)
    for level in program.levels:
        rises[level] = (rises[program.parents[level]][:, None, :] + bound.excess[level]).min(2)
    return rises


def _search_branch(program: _Program, ceiling: float) -> tuple[_Integers, list[_Program]]:
    """The best picks found below the ceiling, and the parts in which something better is still to be looked for."""
    if (_site_costs(program, np.isfinite(program.scores).argmax(1)).sum(1) > program.capacity).any():
        return _NONE, []
    bound, best = _set_prices(program, ceiling)
    rises = _measure_rises(program, bound)
    above = np.sort(rises[np.isfinite(rises) & (rises > bound.rounding)])
    window = float(above[_FIRST_OPTIONS]) if above.size > _FIRST_OPTIONS else math.inf
    while True:
        ceiling = _total_score(program, best) if best.size else ceiling
        gap = ceiling - bound.value + bound.rounding
        if gap < 0:
            return best, []
        window = min(window, gap)
        found = _search_window(program, bound, rises, window + bound.rounding, ceiling)
        if found is None:
            return best, _split(program, rises, gap + bound.rounding)
        best = found if found.size else best
        if window == gap or (best.size and _total_score(program, best) - bound.value + bound.rounding <= window):
            return best, []
        window *= _GROWTH


def _split(program: _Program, rises: _Doubles, gap: float) -> list[_Program]:
    """The program with one site settled on each of its options; the most promising comes last.

    Where options far apart attain the bound, mixed, nothing near it may be feasible. So the split is at the site
    whose scores differ most among the options that hardly raise the bound.
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


def _search_window(
    program: _Program, bound: _Bound, rises: _Doubles, window: float, ceiling: float
) -> _Integers | None:
    """The best picks below the ceiling whose excess is within the window; empty: none, None: too many to list."""
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
    return _join(program, bound, halves, window, ceiling) if all(h.excess.size for h in halves) else _NONE


def _drop_loose_rows(program: _Program, bound: _Bound, allowed: NDArray[np.bool_]) -> tuple[_Program, _Bound]:
    """The program without the unpriced limits that no allowed options can break: more states beat each other."""
    steps = np.where(allowed, program.steps, 0).max(1)
    most = np.where(allowed, program.linear, 0).max(2) + program.links * steps * steps[program.parents]
    tight = (most.sum(1) > program.capacity) | (bound.prices > 0)
    tight[0] |= not tight.any()
    linear, links, capacity = program.linear[tight], program.links[tight], program.capacity[tight]
    return replace(program, linear=linear, links=links, capacity=capacity), replace(bound, prices=bound.prices[tight])


def _settle(program: _Program, picks: _Integers, sites: Sequence[int]) -> _States:
    """The one state of sites whose trees have no choice left."""
    chosen = np.array(sites, np.int64)
    costs, score = _site_costs(program, picks)[:, chosen].sum(1), program.scores[chosen, picks[chosen]].sum()
    return _States(tuple(sites), picks[None, chosen].astype(np.int8), np.zeros(1), np.array([score]), costs[:, None])


def _list_tree(program: _Program, bound: _Bound, tree: Sequence[int], window: float) -> _States | None:
    """The allocations of a tree's sites whose excess is within the window; None: too many."""
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


def _combine(program: _Program, left: _States, right: _States, window: float) -> _States | None:
    """The pairs of a left and a right state within the window; None: too many."""
    counts = np.searchsorted(left.excess, window - right.excess, "right")
    if counts.sum() > _MAX_STATES:
        return None
    ones, others = _spread(np.zeros_like(counts), counts)
    excess, scores = left.excess[ones] + right.excess[others], left.scores[ones] + right.scores[others]
    costs = left.costs[:, ones] + right.costs[:, others]
    kept = _choose_states(program, excess, scores, costs, window)
    picks = np.hstack([left.picks[ones[kept]], right.picks[others[kept]]])
    return _States(left.sites + right.sites, picks, excess[kept], scores[kept], costs[:, kept])


def _spread(starts: _Integers, counts: _Integers) -> tuple[_Integers, _Integers]:
    """Ranges of numbers one after the other, and the index of the range that each number is from."""
    owners = np.repeat(np.arange(counts.size), counts)
    first = np.cumsum(counts) - counts
    return np.arange(owners.size) - first[owners] + starts[owners], owners


def _choose_states(program: _Program, excess: _Doubles, scores: _Doubles, costs: _Integers, window: float) -> _Integers:
    """The states worth keeping, by excess: within the window and the limits, and not beaten by another state."""
    kept = np.flatnonzero((excess <= window) & (costs <= program.capacity[:, None]).all(0))
    if kept.size > _FEW_STATES:
        kept = kept[~_find_beaten(scores[kept], costs[:, kept])]
    return kept[np.argsort(excess[kept], kind="stable")]


def _find_beaten(scores: _Doubles, costs: _Integers) -> NDArray[np.bool_]:
    """Most of the states that another one equals or beats in the score and every cost.

    States fall into the cells of a grid over the costs. One is beaten by whatever scores no more in a cell that
    is lower in every cost, and by the best state of its own cell if that costs no more.
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
    # Of several states in a cell the last written stays: the best, of several the cheapest.
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


def _join(
    program: _Program, bound: _Bound, halves: Sequence[_States], window: float, ceiling: float
) -> _Integers | None:
    """The picks of the best pair that meets the limits and scores below the ceiling; empty: none, None: too many.

    What a pair leaves of a priced limit adds to its score: within the window, that leaves a band of costs.
    """
    left, right = halves
    spread = bound.prices * np.ptp(right.costs, axis=1)
    row = int(spread.argmax())
    order = np.argsort(right.costs[row], kind="stable")
    sorted_costs = right.costs[row, order]
    room = program.capacity[row] - left.costs[row]
    band = np.full(room.shape, float(2 * _MAX_TOTAL))
    if spread[row] > 0:
        band = np.minimum((window - left.excess) / bound.prices[row] * (1 + 1e-9) + 1, band)
    starts = np.searchsorted(sorted_costs, room - band.astype(np.int64), "left")
    counts = np.maximum(np.searchsorted(sorted_costs, room, "right") - starts, 0)
    if (ends := np.cumsum(counts))[-1] > _MAX_PAIRS:
        return None
    best = _NONE
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

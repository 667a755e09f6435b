"""A lower bound on Eq. 5 by Lagrangian relaxation: every limit becomes a price on its costs.

The relaxed problem separates into small trees of sites that share operations, which message passing solves exactly, so
that any prices give a lower bound on the score. It is within a few thousandths of the optimum on real networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from infoq_fx.allocation.cost import CostRow

__all__ = [
    "MAX_TOTAL",
    "NO_PICKS",
    "Bound",
    "CandidateScores",
    "Doubles",
    "Integers",
    "Program",
    "measure_rises",
    "read_program",
    "set_prices",
    "site_costs",
    "total_score",
]

CandidateScores: TypeAlias = Mapping[str, Mapping[int, float]]
Doubles: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]

NO_PICKS: Integers = np.zeros(0, np.int64)
MAX_TOTAL = 2**60  # sums of costs stay within int64
# Rounding error per site, relative to the largest score or priced cost: a sum has as many terms as there are sites.
_ROUNDING = 1e-14
_MAX_CUTTING_ROUNDS = 60
_WAY = (0.3, 0.6, 1.0)
_PRICE_GAP = 1e-3  # stop when better prices could raise the bound by less than this share of the remaining gap


@dataclass(frozen=True)
class Program:
    """The integer program in arrays: the sites with several options, costs relative to those of the fewest bits.

    A site's ``steps`` are its bits minus its fewest bits. The product of two sites' bits is then a linear cost of
    each plus the product of their steps. The sites form trees by those products.
    """

    sites: tuple[str, ...]
    bits: tuple[tuple[int, ...], ...]
    scores: Doubles  # [sites, options]; inf: no such option, or one that alone exceeds a limit
    steps: Integers  # [sites, options]
    linear: Integers  # [rows, sites, options]
    capacity: Integers  # [rows]
    parents: Integers  # [sites]; a root is its own
    links: Integers  # [rows, sites], multiply-accumulates shared with the parent
    products: Doubles  # [sites, options, options of the parent], of the steps
    levels: tuple[Integers, ...]  # sites by depth, roots first
    trees: tuple[tuple[int, ...], ...]  # sites of each, parents first


@dataclass(frozen=True)
class Bound:
    """A lower bound on the score, and how much each option exceeds it.

    ``excess`` is what the choice of a site's option adds to the bound, given its parent's option.
    """

    value: float
    prices: Doubles  # [rows], score per unit of cost
    excess: Doubles  # [sites, options, options of the parent]
    picks: Integers  # [sites], the options that attain the bound
    rounding: float  # upper bound on the rounding error of the value and of sums of excess


def read_program(rows: Sequence[CostRow], scores: CandidateScores) -> Program | None:
    """Return the program in arrays; None if costs exceed 64-bit integers or products form a cycle."""
    sites = tuple(name for name, by_bits in scores.items() if len(by_bits) > 1)
    bits = tuple(tuple(scores[name]) for name in sites)
    index = {name: i for i, name in enumerate(sites)}
    shape = (len(sites), max(map(len, bits)))
    values, exact_steps = np.full(shape, np.inf), np.zeros(shape, object)  # Python's integers do not overflow
    for i, by in enumerate(bits):
        values[i, : len(by)] = list(scores[sites[i]].values())
        exact_steps[i, : len(by)] = [b - by[0] for b in by]
    exact_costs = np.zeros((len(rows), *shape), object)
    shared: dict[tuple[int, int], Integers] = {}
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
            if macs <= MAX_TOTAL:
                shared.setdefault((i, j), np.zeros(len(rows), np.int64))[k] = macs
        total += costs.max(1).sum()
        limits.append((min(limit, total), total))  # a limit above the total never binds: the total fits int64
    if any(total > MAX_TOTAL for _, total in limits) or (grown := _grow_trees(len(sites), shared)) is None:
        return None
    parents, levels, trees = grown
    steps, linear, capacity = exact_steps.astype(np.int64), exact_costs.astype(np.int64), np.array(limits)[:, 0]
    values[(linear > capacity[:, None, None]).any(0)] = np.inf
    pairs = [(i, p) if (i, p) in shared else (p, i) for i, p in enumerate(parents.tolist())]
    links = np.stack([shared.get(pair, 0 * capacity) for pair in pairs], axis=1)
    is_child = (parents != np.arange(len(sites)))[:, None, None]
    products = (is_child * steps[:, :, None] * steps[parents][:, None, :]).astype(np.float64)
    return Program(sites, bits, values, steps, linear, capacity, parents, links, products, levels, trees)


def set_prices(program: Program, ceiling: float) -> tuple[Bound, Integers]:
    """Find prices of nearly the highest bound by cutting planes, and the best allocation met below the ceiling."""
    unit = np.maximum(program.capacity, 1).astype(np.float64)
    rows, scale = len(unit), ceiling
    cuts: list[list[float]] = []
    limits: list[float] = []
    best = _relax(program, np.zeros(rows))
    bounds, found = [best], NO_PICKS
    for _ in range(_MAX_CUTTING_ROUNDS):
        # The fewest bits meet every limit: their cut is needed to bound the prices.
        for picks in (*(bound.picks for bound in bounds), *([] if cuts else [np.isfinite(program.scores).argmax(1)])):
            costs, score = site_costs(program, picks).sum(1), total_score(program, picks)
            if score < ceiling and (costs <= program.capacity).all():
                found, ceiling = picks, score
            cuts.append([1.0, *((program.capacity - costs) / unit)])
            limits.append(score / scale)
        best = max([best, *bounds], key=lambda bound: bound.value)
        model = linprog([-1.0] + [0.0] * rows, A_ub=cuts, b_ub=limits, bounds=[(None, None)] + [(0, None)] * rows)
        left = ceiling - best.value
        if model.status != 0 or left < 0 or model.x[0] * scale - best.value <= _PRICE_GAP * left:
            break
        # The optimum of the cuts oscillates at first: points on the way to it need fewer rounds.
        aim = np.maximum(model.x[1:], 0.0) * scale / unit
        bounds = [_relax(program, best.prices + part * (aim - best.prices)) for part in _WAY]
    return best, found


def total_score(program: Program, picks: Integers) -> float:
    """Return the score of an allocation; ``picks [sites]`` is the index of every site's option."""
    return math.fsum(program.scores[np.arange(len(picks)), picks])


def site_costs(program: Program, picks: Integers) -> Integers:
    """Return the cost of every site, its product with its parent included, ``[rows, sites]``."""
    sites = np.arange(len(picks))
    steps = program.steps[sites, picks]
    costs: Integers = program.linear[:, sites, picks] + program.links * steps * steps[program.parents]
    return costs


def measure_rises(program: Program, bound: Bound) -> Doubles:
    """Return by how much the bound rises if a site takes an option, ``[sites, options]``."""
    rises = np.zeros_like(program.scores)
    for level in program.levels:
        rises[level] = (rises[program.parents[level]][:, None, :] + bound.excess[level]).min(2)
    return rises


def _grow_trees(
    count: int, pairs: Iterable[tuple[int, int]]
) -> tuple[Integers, tuple[Integers, ...], tuple[tuple[int, ...], ...]] | None:
    """Parents, sites by depth, and sites by tree; None if the pairs form a cycle."""
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


def _relax(program: Program, prices: Doubles) -> Bound:
    """The minimum of score plus priced cost minus the priced limits: no allocation within the limits scores lower."""
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
    return Bound(value, prices, excess, picks, _ROUNDING * len(picks) * float(magnitude))


def _weigh(prices: Doubles, costs: NDArray[Any]) -> Doubles:
    """The sum over the rows in a fixed order: a matrix product may depend on the number of threads."""
    total: Doubles = np.zeros(costs.shape[1:])
    for price, cost in zip(prices, costs, strict=True):
        total += price * cost
    return total

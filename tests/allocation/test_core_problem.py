"""The bound and the enumeration of allocations: what they leave out is not better than what they keep."""

import itertools
import math
import random

import pytest

from infoq_fx.allocation import core_problem as core_search
from infoq_fx.allocation.core_problem import search_core
from infoq_fx.allocation.cost import CostRow

BITS = (2, 3, 4, 8)


def random_program(rng, sites, pairs):
    """Scores that fall with the bits, a linear limit and one with products, and the best score within both."""
    scores = {}
    for name in sites:
        falling = sorted((rng.random() ** 3 for _ in BITS), reverse=True)
        scores[name] = {b: score - falling[-1] for b, score in zip(BITS, falling, strict=True)}
    sizes = {name: rng.randrange(1, 50) for name in sites}
    macs = {pair: rng.randrange(1, 90) for pair in pairs}
    everything = [dict(zip(sites, bits, strict=True)) for bits in itertools.product(BITS, repeat=len(sites))]

    def size(bits):
        return sum(sizes[name] * b for name, b in bits.items())

    def products(bits):
        return sum(m * bits[left] * bits[right] for (left, right), m in macs.items())

    met = rng.choice(everything)
    rows = [
        CostRow(size(met), {(name, b): sizes[name] * b for name in sites for b in BITS}, {}),
        CostRow(products(met), {}, macs),
    ]
    fitting = [bits for bits in everything if size(bits) <= size(met) and products(bits) <= products(met)]
    totals = [math.fsum(scores[name][b] for name, b in bits.items()) for bits in fitting]
    return rows, scores, fitting[totals.index(min(totals))], min(totals), max(totals)


TREES = {
    "star": [("a", "b"), ("a", "c"), ("a", "d")],
    "chain": [("a", "b"), ("b", "c"), ("c", "d"), ("d", "e")],
    "two": [("a", "b"), ("c", "d"), ("d", "e")],
}


@pytest.mark.slow
@pytest.mark.parametrize("pairs", TREES.values(), ids=TREES)
@pytest.mark.parametrize("branches", [400, 0])
def test_the_best_is_found_or_kept(pairs, branches, monkeypatch):
    monkeypatch.setattr(core_search, "_MAX_BRANCHES", branches)
    dropped = 0
    for seed in range(20):
        rows, scores, best, least, most = random_program(random.Random(seed), "abcde", pairs)
        bits, rest = search_core(rows, scores, most + 0.1)
        if branches:
            assert rest is None
            assert math.fsum(scores[name][b] for name, b in bits.items()) == pytest.approx(least, rel=1e-12)
        else:
            # Without a listing, the bound alone decides, against a ceiling that is the optimum itself.
            _, rest = search_core(rows, scores, least) if least else ({}, scores)
            assert all(best[name] in rest[name] for name in scores)
            dropped += sum(map(len, scores.values())) - sum(map(len, rest.values()))
    assert branches or dropped > 50


def test_what_it_cannot_hold_is_left_to_the_solver():
    scores = {name: {2: 1.0, 4: 0.5, 8: 0.0} for name in "abc"}
    cycle = {("a", "b"): 1, ("b", "c"): 1, ("a", "c"): 1}
    assert search_core([CostRow(100, {}, cycle)], scores, 3.0) == ({}, scores)
    huge = {("a", "b"): 10**30}
    assert search_core([CostRow(10**31, {}, huge)], scores, 3.0) == ({}, scores)


def test_a_ceiling_that_nothing_beats():
    scores = {"a": {2: 1.0, 4: 0.0}, "b": {2: 0.5, 4: 0.0}}
    rows = [CostRow(60, {("a", 2): 20, ("a", 4): 40, ("b", 2): 20, ("b", 4): 40}, {})]
    assert search_core(rows, scores, 0.5) == ({}, None)
    assert search_core(rows, scores, 0.6) == ({"a": 4, "b": 2}, None)


def test_alike_sites_are_not_listed_over_and_over():
    # 60 choose 30 allocations score the same: of equal partial ones a single one is kept.
    sites = [f"s{i}" for i in range(60)]
    scores = {name: {2: 1.0, 4: 0.0} for name in sites}
    row = CostRow(30 * 4 + 30 * 2 + 1, {(name, b): b for name in sites for b in (2, 4)}, {})
    bits, rest = search_core([row], scores, 60.0)
    assert rest is None
    assert sum(b == 4 for b in bits.values()) == 30

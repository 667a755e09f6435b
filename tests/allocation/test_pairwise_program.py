import random
from dataclasses import replace

import numpy as np
import pytest
from random_tables import every_allocation, random_budget, random_table, tie_weights

from infoq_fx.allocation import pairwise_program
from infoq_fx.allocation.cost import broken_limits, measure_cost
from infoq_fx.allocation.solver import allocate, propose
from infoq_fx.errors import OptionError
from infoq_fx.table import SensitivityTable

LIMITS = ("weight_bits", "size_bytes", "bitops", "activation_bytes")


def with_pairs(rng, table, strength=0.3):
    """The table with pairs of its weights, as large as their scores, and a quadratic form that may be indefinite."""
    options = [(name, b) for name, by_bits in table.scores.items() for b in by_bits if name.startswith("w")]
    pairs = {}
    for row, (i, a) in enumerate(options):
        for j, b in options[:row]:
            if i != j:
                size = strength * (table.scores[i][a].value * table.scores[j][b].value) ** 0.5
                pairs.setdefault((j, i), {})[b, a] = size * rng.uniform(-1, 1)
    return replace(table, pairs=pairs)


def total(table, bits):
    """By the definition."""
    single = sum(table.scores[name][b].value for name, b in bits.items() if name in table.scores)
    return single + sum(by_bits.get((bits[i], bits[j]), 0.0) for (i, j), by_bits in table.pairs.items())


def least(table, budget):
    costs = ((bits, measure_cost(table.inventory, bits)) for bits in every_allocation(table.inventory))
    return min(total(table, bits) for bits, cost in costs if not broken_limits(cost, budget))


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("is_exact", [False, True])
def test_as_exhaustive_search(seed, is_exact, monkeypatch):
    rng = random.Random(seed)
    table = with_pairs(rng, random_table(rng, weights=4, activations=2), strength=rng.choice([0.3, 1.0]))
    if seed % 3 == 0:
        table = with_pairs(rng, tie_weights(rng, table))
    budget = random_budget(rng, table.inventory, rng.sample(LIMITS, rng.randrange(1, 3)))
    if not is_exact:
        monkeypatch.setattr(pairwise_program, "_MOST_PRODUCTS", 0)
    found = allocate(table, budget)
    assert not broken_limits(measure_cost(table.inventory, found.bits), budget)
    assert all(len({found.bits[name] for name in tie}) == 1 for tie in table.inventory.ties)
    assert found.score == pytest.approx(total(table, found.bits), rel=1e-9)
    assert found.score == pytest.approx(least(table, budget), rel=1e-9, abs=1e-12)


def test_a_pin_holds_and_fixed_sites_count_in_pairs():
    rng = random.Random(7)
    table = with_pairs(rng, random_table(rng, weights=4, activations=0), strength=1.0)
    name = next(iter(table.scores))
    for bits in table.inventory[name].bits:
        found = allocate(table, 4.5, pin={name: bits})
        assert found.bits[name] == bits
        assert found.score == pytest.approx(total(table, found.bits), rel=1e-9)


def test_pairs_are_among_the_proposals_once_and_kept_in_files(tmp_path):
    rng = random.Random(3)
    table = with_pairs(rng, random_table(rng, weights=4, activations=0), strength=1.0)
    proposals = propose(table, 4.5)
    assert proposals[0] == allocate(table, 4.5)
    assert all(p.score == pytest.approx(total(table, p.bits), rel=1e-9) for p in proposals)
    table.save(tmp_path / "scores.json")
    assert SensitivityTable.load(tmp_path / "scores.json") == table


def test_pairs_of_unknown_sites_and_of_no_number_are_refused():
    table = random_table(random.Random(1), weights=2, activations=0)
    with pytest.raises(OptionError, match="site of a pair"):
        replace(table, pairs={("w0", "w9"): {(2, 2): 0.1}})
    with pytest.raises(OptionError, match="not finite"):
        replace(table, pairs={("w0", "w1"): {(2, 2): float("nan")}})


@pytest.mark.slow
def test_a_local_search_is_near_the_optimum_of_a_larger_positive_form(monkeypatch):
    """Twelve sites of three candidates: 531,441 allocations, searched in numpy."""
    rng = np.random.default_rng(0)
    from tables import make_table, weight

    widths = (2, 4, 8)
    sites = tuple(weight(f"w{i}", int(rng.integers(50, 5000)), widths) for i in range(12))
    factor = rng.normal(size=(24, 6)) * np.repeat(rng.exponential(size=12), 2)[:, None]
    factor[1::2] /= 4
    form = factor @ factor.T
    options = [(f"w{i}", b) for i in range(12) for b in widths[:2]]
    scores = {f"w{i}": dict.fromkeys(widths, 0.0) for i in range(12)}
    pairs = {}
    for row, (i, a) in enumerate(options):
        scores[i][a] = form[row, row] / 2
        for column, (j, b) in enumerate(options[:row]):
            if i != j:
                pairs.setdefault((j, i), {})[b, a] = form[row, column]
    table = replace(make_table(sites, scores), pairs=pairs)
    picks = np.stack(np.meshgrid(*[np.arange(3)] * 12, indexing="ij"), -1).reshape(-1, 12)
    numel = np.array([site.numel for site in sites])
    fitting = picks[(np.array(widths)[picks] @ numel) <= 3.5 * numel.sum()]
    rows = [factor.reshape(12, 2, 6)[i][np.minimum(fitting[:, i], 1)] * (fitting[:, i] < 2)[:, None] for i in range(12)]
    best = (np.sum(rows, 0) ** 2).sum(1) / 2
    same_site = sum((row**2).sum(1) for row in rows) / 2
    assert best.min() >= 0
    assert same_site.min() >= 0
    assert allocate(table, 3.5).score == pytest.approx(best.min(), rel=1e-6, abs=1e-9)

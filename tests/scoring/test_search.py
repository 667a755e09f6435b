import itertools
import random

import pytest
import torch
from networks import ResidualNet, randomise_norms
from random_tables import every_allocation, random_budget, random_table, tie_weights

import infoq_fx
from infoq_fx.allocation.cost import broken_limits, measure_cost
from infoq_fx.allocation.solver import allocate
from infoq_fx.errors import InfeasibleBudgetError, OptionError
from infoq_fx.scoring import refinement
from infoq_fx.scoring.search import improve_allocation, neighbours

LIMITS = ("weight_bits", "size_bytes", "bitops", "activation_bytes")


class Truth:
    """What every allocation loses: single scores other than the table's, and pairs; it counts the calls."""

    def __init__(self, table, seed, pairs=0.0):
        rng = random.Random(seed)
        self._single = {s.name: {b: rng.random() * 4.0**-b for b in s.bits} for s in table.inventory.sites}
        self._pairs = {pair: pairs * rng.uniform(-1, 1) for pair in itertools.combinations(self._single, 2)}
        self.seen = []

    def __call__(self, bits):
        self.seen.append(dict(bits))
        return self.of(bits)

    def of(self, bits):
        single = {name: self._single[name][b] for name, b in bits.items()}
        return sum(single.values()) + sum(
            strength * (single[i] * single[j]) ** 0.5 for (i, j), strength in self._pairs.items()
        )


def make_case(seed):
    rng = random.Random(seed)
    table = random_table(rng, weights=4, activations=2)
    if seed % 3 == 0:
        table = tie_weights(rng, table)
    return table, random_budget(rng, table.inventory, rng.sample(LIMITS, rng.randrange(1, 3)))


@pytest.mark.parametrize("seed", range(20))
def test_every_step_fits_is_better_and_measured(seed):
    table, budget = make_case(seed)
    start, truth = allocate(table, budget), Truth(table, seed, pairs=0.4)
    found = improve_allocation(table, start, truth, 60)
    assert len(truth.seen) <= 60
    assert len({tuple(bits.items()) for bits in truth.seen}) == len(truth.seen)  # nothing is run twice
    losses = [truth.of(bits) for bits in found]
    assert losses == sorted(losses, reverse=True)
    assert all(bits in truth.seen for bits in found)
    for bits in found:
        assert not broken_limits(measure_cost(table.inventory, bits), budget)
        assert all(bits[s.name] in s.bits for s in table.inventory.sites)
        assert all(len({bits[name] for name in tie}) == 1 for tie in table.inventory.ties)
        assert all((bits[name] == 16) == (start.bits[name] == 16) for name in bits)  # float is not searched


@pytest.mark.parametrize("seed", range(20))
def test_with_losses_that_add_up_no_change_of_two_sites_is_better(seed):
    """Where losses add up and passes are enough, the result is the best within a step of one candidate per site."""
    table, budget = make_case(seed)
    truth = Truth(table, seed)
    last = improve_allocation(table, allocate(table, budget), truth, 10_000)[-1]
    near = {site.name: set(site.bits) for site in neighbours(table.inventory, last)}
    for bits in every_allocation(table.inventory):
        is_near = all(bits[name] in near[name] for name in bits)
        if is_near and not broken_limits(measure_cost(table.inventory, bits), budget):
            assert truth.of(last) <= truth.of(bits) + 1e-12


def test_passes_limit_the_runs_and_pins_hold():
    table, budget = make_case(1)
    for passes in (1, 2, 5, 9):
        truth = Truth(table, 0)
        assert improve_allocation(table, allocate(table, budget), truth, passes)
        assert len(truth.seen) <= passes
    name = next(n for n, by_bits in table.scores.items() if n.startswith("w"))
    for bits in table.inventory[name].bits:
        try:
            start = allocate(table, budget, pin={name: bits})
        except InfeasibleBudgetError:
            continue
        found = improve_allocation(table, start, Truth(table, 0), 60, pin={name: bits})
        assert all(step[name] == bits for step in found)


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(3)
    model, images = randomise_norms(ResidualNet()).eval(), torch.randn(160, 1, 8, 8)
    prepared = infoq_fx.prepare(model, images, bits=(2, 3, 4, 8), outputs="categorical")
    return prepared, images, infoq_fx.score(prepared, images, criterion="weight_mse", progress=False)


@pytest.mark.slow
def test_a_search_is_never_worse_on_the_samples_that_judge(case):
    prepared, images, table = case
    for budget in (2.5, 3.0):
        before, after = (
            infoq_fx.refine(prepared, table, budget, images, recovery="none", search_passes=p) for p in (0, 40)
        )
        assert after.lost_nats <= before.lost_nats
        assert after.cost.weight_bits <= budget
        assert after.budget == before.budget
        total = sum(table.scores[name][b].value for name, b in after.bits.items() if name in table.scores)
        assert after.score == pytest.approx(total)
        assert after == infoq_fx.refine(prepared, table, budget, images, recovery="none", search_passes=40)


def test_what_fits_only_the_samples_of_the_search_is_dropped(case, monkeypatch):
    prepared, images, table = case
    start = infoq_fx.refine(prepared, table, 3.0, images, recovery="none")
    narrowest = {s.name: s.bits[0] for s in prepared.inventory.sites}
    monkeypatch.setattr(refinement, "improve_allocation", lambda table, start, *_, **__: [dict(start.bits), narrowest])
    found = infoq_fx.refine(prepared, table, 3.0, images, recovery="none", search_passes=10)
    assert found == start


def test_quantize_takes_passes_only_for_a_search(case):
    _, images, _ = case
    torch.manual_seed(3)
    model = randomise_norms(ResidualNet()).eval()
    options = dict(calibration_data=images, progress=False, recovery="none", bits=(2, 3, 4, 8))
    with pytest.raises(OptionError, match="give refine='search' too"):
        infoq_fx.quantize(model, 3.0, search_passes=10, **options)
    with pytest.raises(OptionError, match="at least 1"):
        infoq_fx.quantize(model, 3.0, refine="search", search_passes=0, **options)
    with pytest.raises(OptionError, match="give True, False, or 'search'"):
        infoq_fx.quantize(model, 3.0, refine="deep", **options)
    quantized = infoq_fx.quantize(model, 2.5, refine="search", search_passes=30, **options)
    assert infoq_fx.allocation_of(quantized).cost.weight_bits <= 2.5

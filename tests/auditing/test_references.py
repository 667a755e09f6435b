import itertools

import numpy as np
import pytest
import torch
from networks import ResidualNet, randomise_norms
from torch import nn

import infoq_fx
from infoq_fx.allocation.cost import broken_limits, measure_cost
from infoq_fx.auditing.differentiable import DifferentiableSearch
from infoq_fx.auditing.evolutionary import EvolutionarySearch
from infoq_fx.auditing.references import find_references
from infoq_fx.core.data import read_data
from infoq_fx.errors import OptionError
from infoq_fx.runtime.forward import RunOptions
from infoq_fx.scoring.refinement import LossRuns

SEARCHES = [EvolutionarySearch(evaluations=16, population=6, parents=3), DifferentiableSearch(steps=8)]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 6, 3),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(96, 40),
            nn.Linear(40, 4),
        )

    def forward(self, x):
        return self.layers(x)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model, images = Small().eval(), torch.randn(64, 1, 8, 8)
    with torch.no_grad():
        model.layers[6].weight *= 3
    prepared = infoq_fx.prepare(
        model, images, bits=(2, 3, 4), activation_bits=8, outputs="categorical", levels="uniform"
    )
    return prepared, read_data(images).named(prepared.input_names)


def loss_runs(prepared, data):
    return LossRuns.begin(prepared, data, None, batch_size=64, run_options=RunOptions())


def every_fitting(prepared, budget):
    weights = [s.name for s in prepared.inventory.sites if s.kind == "weight"]
    fixed = {s.name: 8 for s in prepared.inventory.sites if s.kind == "activation"}
    for widths in itertools.product((2, 3, 4), repeat=len(weights)):
        bits = {**fixed, **dict(zip(weights, widths, strict=True))}
        if not broken_limits(measure_cost(prepared.inventory, bits), budget):
            yield bits


def test_an_evolution_of_enough_evaluations_finds_the_best_of_all_that_spend_the_budget(small):
    prepared, data = small
    budget, runs = infoq_fx.Budget(weight_bits=3.0), loss_runs(prepared, data)
    fitting = list(every_fitting(prepared, budget))

    def spends(bits):
        return not any({**bits, name: bits[name] + 1} in fitting for name in bits if bits[name] < 4)

    losses = [float(runs(bits).mean()) for bits in fitting if spends(bits)]
    found = EvolutionarySearch(evaluations=60, population=12, mutation=0.3)(prepared, data, budget, None)
    assert float(runs(found).mean()) == pytest.approx(min(losses))
    assert len(losses) > 3


def test_learned_bits_lose_less_than_nine_of_ten_allocations(small):
    prepared, data = small
    budget, runs = infoq_fx.Budget(weight_bits=3.0), loss_runs(prepared, data)
    losses = [float(runs(bits).mean()) for bits in every_fitting(prepared, budget)]
    found = DifferentiableSearch(steps=120)(prepared, data, budget, None)
    assert np.mean(np.array(losses) < float(runs(found).mean())) < 0.1


@pytest.fixture(scope="module")
def residual():
    torch.manual_seed(5)
    model, images = randomise_norms(ResidualNet()).eval(), torch.randn(40, 1, 8, 8)
    return model, images


@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: search.name)
@pytest.mark.parametrize("case", ["bitops", "tie", pytest.param("own cost", marks=pytest.mark.slow)])
def test_limits_ties_pins_and_activations_hold_and_a_seed_decides(search, case, residual, monkeypatch):
    model, images = residual
    options = {"tie": [("*.conv1", "*.conv2")], "pin": {"head": 4}} if case == "tie" else {"activation_bits": (4, 8)}
    prepared = infoq_fx.prepare(model, images, bits=(2, 4, 8), outputs="categorical", **options)
    data = read_data(images).named(prepared.input_names)
    middle = measure_cost(prepared.inventory, {s.name: s.bits[len(s.bits) // 2] for s in prepared.inventory.sites})
    budget = infoq_fx.Budget(bitops=middle.bitops) if case == "bitops" else infoq_fx.Budget(weight_bits=3.5)
    if case == "own cost":  # falls with the bits: 8 bits are fast, others slow
        monkeypatch.setitem(infoq_fx.COSTS, "ms", lambda operation, left, right: 1 if left == 8 else 2)
        most = 2 * len(prepared.inventory.operations) - 2
        budget = infoq_fx.Budget(weight_bits=6.0, costs={"ms": most})
    found = search(prepared, data, budget, None)
    assert case != "tie" or found == search(prepared, data, budget, None)
    assert not broken_limits(measure_cost(prepared.inventory, found, budget.costs), budget)
    assert all(found[s.name] in s.bits for s in prepared.inventory.sites)
    for tie in prepared.inventory.ties:
        assert len({found[name] for name in tie}) == 1
    if case == "tie":
        assert prepared.inventory.ties
        assert found["head.weight"] == 4


@pytest.mark.slow
def test_an_audit_has_their_rows_and_keeps_them(small, residual, tmp_path, monkeypatch):
    model, images = residual
    options = dict(bits=(2, 4, 8), cache_dir=tmp_path, progress=False, outputs="categorical", references=SEARCHES)
    found = infoq_fx.audit(model, images, ["weight_mse"], [3.0], **options)
    assert [row.name for row in found.rows] == ["weight_mse", "uniform", "evolutionary", "differentiable"]
    assert found.recommended.name == "weight_mse"
    for row in found.rows[2:]:
        assert row.cpu_seconds > 0
        cost = measure_cost(found.tables["weight_mse"].inventory, row.allocations["3 bits"].bits)
        assert cost.weight_bits <= 3.0
    for search in SEARCHES:
        monkeypatch.setattr(type(search), "__call__", lambda *_: pytest.fail("searched again"))
    again = infoq_fx.audit(model, images, ["weight_mse"], [3.0], **options)
    assert [row.allocations for row in again.rows] == [row.allocations for row in found.rows]


def test_what_is_no_search_is_refused():
    for given, message in [
        ("evolutionary", "give a list"),
        (["evolution"], "evolutionary"),
        ([EvolutionarySearch], "holds <class"),
        (["differentiable", DifferentiableSearch()], "given twice"),
    ]:
        with pytest.raises(OptionError, match=message):
            find_references(given)
    with pytest.raises(OptionError, match="mutation"):
        EvolutionarySearch(mutation=1.5)

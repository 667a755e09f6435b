import dataclasses
import logging
import math

import numpy as np
import pytest
import torch
from logits import compute_logits
from networks import ResidualNet, randomise_norms
from torch import nn

import infoq_fx
from infoq_fx.core.data import read_data
from infoq_fx.runtime.forward import RunOptions
from infoq_fx.scoring.criteria import CRITERIA, find_criterion
from infoq_fx.scoring.criterion import Observer
from infoq_fx.scoring.information.measurement import group_labels
from infoq_fx.scoring.information.mutual_info import estimate_ksg, estimate_ross, unit_projections
from infoq_fx.scoring.information.observers import choose_default_observers, pool_features
from infoq_fx.types import Measurement


@pytest.fixture(scope="module")
def prepared_and_data():
    torch.manual_seed(1)
    images = torch.randn(96, 1, 8, 8)
    model = randomise_norms(ResidualNet()).eval()
    with torch.no_grad():
        model.head.bias -= model(images).mean(0)
        labels = model(images).argmax(1)  # what the network knows: all five classes
    prepared = infoq_fx.prepare(model, (images, labels), bits=(2, 4, 8))
    return prepared, read_data((images, labels)).named(prepared.input_names)


def measure(criterion, prepared, data, sites=None, batch_size=32):
    chosen = sites or [s for s in prepared.inventory.sites if s.is_searched and len(s.bits) > 1]
    steps = []
    measured_by = criterion.begin(prepared, data, batch_size=batch_size, run_options=RunOptions())
    found = measured_by(prepared, data, chosen, RunOptions(advance=steps.append))
    assert sum(steps) == pytest.approx(sum(len(site.bits) for site in chosen))
    return found


SLOW = {"alps", "limpq", "hawq_v2", "infoq_paper", "loss", "accuracy"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CRITERIA]
)
def test_every_criterion_keeps_the_contract(name, prepared_and_data):
    prepared, data = prepared_and_data
    criterion = find_criterion(name)
    assert criterion.name == name
    if name in ("limpq", "alps"):  # trainings
        criterion = dataclasses.replace(criterion, steps=3)
    before = {key: value.clone() for key, value in prepared.graph_module.state_dict().items()}
    given = data if criterion.needs_data else None
    whole = measure(criterion, prepared, given)
    assert all(torch.equal(value, before[key]) for key, value in prepared.graph_module.state_dict().items())
    scores = criterion.score(prepared, whole)
    sites = [s for s in prepared.inventory.sites if s.is_searched and len(s.bits) > 1]
    assert {site: set(by_bits) for site, by_bits in scores.items()} == {s.name: set(s.bits) for s in sites}
    values = [score for by_bits in scores.values() for score in by_bits.values()]
    assert all(math.isfinite(s.value) and s.value >= 0 and s.standard_error >= 0 for s in values)
    assert sum(by_bits[2].value for by_bits in scores.values()) > sum(by_bits[8].value for by_bits in scores.values())
    # Neither blocks nor a second run change a number.
    parts = [m for site in sites for m in measure(criterion, prepared, given, [site])]
    assert criterion.score(prepared, parts) == scores


def project(rows, directions):
    """In the order of the definition: a product of another order moves samples that all but tie."""
    return np.add.accumulate(rows[:, :, None] * directions, axis=1, dtype=np.float32)[:, -1].T.copy()


def by_equation(prepared, data, site, bits, observers, criterion):
    """Eq. 4 from whole runs of the module itself, hooks at the observers."""
    named = prepared.observer_nodes()

    def activations(perturbed):
        for _, quantizer in prepared.quantizer_nodes():
            quantizer.bits = bits if quantizer.site.name == perturbed else 8
        seen = {}
        handles = [
            prepared.graph_module.get_submodule(str(named[o.name].target)).register_forward_hook(
                lambda module, args, out, name=o.name: seen.__setitem__(name, out)
            )
            for o in observers
        ]
        with torch.no_grad():
            prepared.graph_module(*data.inputs.values())
        for handle in handles:
            handle.remove()
        return seen

    from infoq_fx.scoring.information.encoders import principal_components
    from infoq_fx.scoring.information.measurement import _mix

    features = principal_components(data.inputs).numpy()
    base, changed = activations(None), activations(site)
    total = change = 0.0
    for o in observers:
        estimates = []
        for seen in (base, changed):
            pooled = seen[o.name].flatten(2).mean(2) if seen[o.name].ndim > 2 else seen[o.name]
            names = [n for n, node in named.items() if node is named[o.name]]
            theta = unit_projections(pooled.shape[1], criterion.slices, _mix(criterion.seed, min(names)))
            projected = project(pooled.numpy(), theta)
            if o.measure == "task":
                estimates.append(estimate_ross(projected, data.labels.numpy(), k=3))
            else:
                phi = unit_projections(features.shape[1], criterion.slices, _mix(criterion.seed, f"input of {o.name}"))
                estimates.append(estimate_ksg(project(features, phi), projected, k=5))
        total += estimates[0].mean()
        change += abs((estimates[0] - estimates[1]).mean())
    return change / total / bits


@pytest.mark.parametrize(("site", "bits"), [("stem.0.weight", 2), ("blocks.1.conv1.weight", 2), ("head.weight", 4)])
def test_infoq_is_equation_4(site, bits, prepared_and_data):
    prepared, data = prepared_and_data
    observers = [Observer("head.input", "task"), Observer("output", "task"), Observer("blocks.0", "input")]
    criterion = infoq_fx.InfoQPaper(observers=observers, slices=32)
    downstream = {"stem.0.weight": 3, "blocks.1.conv1.weight": 2, "head.weight": 1}[site]
    used = observers if downstream == 3 else observers[2 - downstream : 2]
    scores = criterion.score(prepared, measure(criterion, prepared, data))
    expected = by_equation(prepared, data, site, bits, used, criterion)
    assert scores[site][bits].value == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_the_default_observers_are_the_papers(prepared_and_data):
    prepared, _ = prepared_and_data
    chosen = list(choose_default_observers(prepared))
    assert chosen[:2] == [Observer("head.input", "task"), Observer("output", "task")]
    assert {o.measure for o in chosen[2:]} == {"input"}
    assert all(o.name.startswith("blocks") for o in chosen[2:])


def test_more_slices_make_smaller_errors(prepared_and_data):
    prepared, data = prepared_and_data
    site = prepared.inventory["blocks.0.conv1.weight"]
    errors = []
    for slices in (16, 256):
        criterion = infoq_fx.InfoQPaper(slices=slices)
        errors.append(criterion.score(prepared, measure(criterion, prepared, data, [site]))[site.name][2])
    assert 2 < errors[0].standard_error / errors[1].standard_error < 8


def measurement(bits, change, drop):
    values = {"accuracy_drop": drop}
    for name, value in change.items():
        values |= {f"{name}:baseline": 1.0, f"{name}:change": value, f"{name}:standard_error": 0.01}
    return Measurement("stem.0.weight", bits, values)


def test_auto_takes_the_observers_whose_change_follows_the_accuracy_drop(prepared_and_data):
    prepared, _ = prepared_and_data
    drops = [30.0, 12.0, 4.0, 1.0, 0.0]
    follows = [0.3, 0.12, 0.05, 0.01, 0.0]
    does_not = [0.01, 0.3, 0.0, 0.2, 0.1]
    found = [
        measurement(bits, {"task:output": a, "input:blocks.0": b}, drop)
        for bits, a, b, drop in zip((2, 3, 4, 5, 6), follows, does_not, drops, strict=True)
    ]
    criterion = infoq_fx.InfoQPaper(observers="auto")
    r = criterion.correlations(found)
    assert r["task:output"] == pytest.approx(np.corrcoef(follows, drops)[0, 1])
    assert r["task:output"] > 0.7 > r["input:blocks.0"]
    scores = criterion.score(prepared, found)["stem.0.weight"]
    assert scores[2].value == pytest.approx(0.3 / 2)
    assert scores[5].value == pytest.approx(0.01 / 5)


def test_auto_runs_on_a_model(prepared_and_data, caplog):
    prepared, data = prepared_and_data
    with caplog.at_level(logging.INFO):
        table = infoq_fx.score(
            prepared, data, criterion=infoq_fx.InfoQPaper(observers="auto", slices=8), progress=False
        )
    assert "observers='auto' chose" in caplog.text
    assert len(table.scores) == 6


def test_bare_names_measure_both(prepared_and_data):
    prepared, data = prepared_and_data
    site = prepared.inventory["stem.0.weight"]
    found = measure(infoq_fx.InfoQPaper(observers=["blocks.0", "output"], slices=8), prepared, data, [site])
    assert {"input:blocks.0:change", "task:blocks.0:change"} <= set(found[0].values)


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.second((self.first(x) * 0).relu())


def test_constant_activations_carry_no_information_and_do_no_harm():
    prepared = infoq_fx.prepare(Constant().eval(), X)
    table = infoq_fx.score(prepared, X, observers=["second.input", "output"], progress=False)
    assert {score.value for by_bits in table.scores.values() for score in by_bits.values()} == {0.0}


X = torch.randn(64, 4)


def test_many_classes_are_grouped():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 60)).eval()
    x, labels = torch.randn(200, 4), torch.randperm(200) % 60
    prepared = infoq_fx.prepare(model, (x, labels), bits=(2, 8))
    data = read_data((x, labels)).named(prepared.input_names)
    found = measure(infoq_fx.InfoQPaper(slices=16), prepared, data)
    groups = group_labels(prepared, labels, compute_logits(prepared, data, batch_size=64), 0)
    assert len(np.unique(groups)) <= 200 // 50
    assert all(len(np.unique(groups[labels.numpy() == c])) == 1 for c in range(60))
    assert all(math.isfinite(value) for m in found for value in m.values.values())


def test_eagl_is_the_entropy_lost():
    model = nn.Sequential(nn.Linear(8, 4, bias=False)).eval()
    model[0].weight.data = torch.tensor([[-127.0, -42.0, 42.0, 126.0] * 2] * 4)
    prepared = infoq_fx.prepare(model, example_inputs=(torch.zeros(2, 8),), bits=(2, 8), activation_bits=None)
    found = measure(find_criterion("eagl"), prepared, None)
    # Four equally frequent values hold 2 bits.
    assert found[0].values["baseline_entropy_bits"] == pytest.approx(2.0)
    assert find_criterion("eagl").score(prepared, found)["0.weight"][8].value == 0.0


def test_pooling_keeps_channels_and_features():
    prepared = infoq_fx.prepare(nn.Sequential(nn.Conv1d(3, 5, 1), nn.ReLU()).eval(), torch.randn(16, 3, 7))
    node = prepared.observer_nodes()["1"]
    assert pool_features(torch.zeros(2, 5, 7), node).shape == (2, 5)
    output = next(iter(prepared.graph_module.graph.nodes))
    assert pool_features(torch.zeros(2, 7, 5), output).shape == (2, 5)
    assert pool_features(torch.zeros(2, 5, 3, 4), output).shape == (2, 5)
    assert pool_features(torch.zeros(2), output).shape == (2, 1)

"""Criteria that compare outputs, InfoQ among them, against the definitions; and criteria of a user's own."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from logits import compute_logits, diverge
from networks import ResidualNet, randomise_norms
from torch import nn

import infoq_fx
from infoq_fx.core.data import read_data
from infoq_fx.quantization.quantizers import Quantizer
from infoq_fx.runtime.forward import RunOptions
from infoq_fx.scoring import criteria
from infoq_fx.scoring.output_measure import INFORMATION_LOSS, LOSS_OVER_PAIRS
from infoq_fx.scoring.sensitivity import Resources, measure_sensitivity
from infoq_fx.types import Inventory, Measurement


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(1)
    images = torch.randn(96, 1, 8, 8)
    model = randomise_norms(ResidualNet()).eval()
    with torch.no_grad():
        model.head.bias -= model(images).mean(0)
        labels = (model(images) + torch.randn(96, 5)).argmax(1)
    prepared = infoq_fx.prepare(model, (images, labels), bits=(2, 4, 8))
    return model, prepared, read_data((images, labels)).named(prepared.input_names)


def logits_at(prepared, data, bits):
    """From the module itself."""
    module = copy.deepcopy(prepared.graph_module)
    for quantizer in module.modules():
        if isinstance(quantizer, Quantizer):
            quantizer.bits = bits.get(quantizer.site.name, 8)
    with torch.no_grad():
        return module(*data.inputs.values()).double().numpy()


def log_softmax(z):
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def by_definition(name, base, found, in_float, labels):
    log_p, log_q, log_f = log_softmax(base), log_softmax(found), log_softmax(in_float)
    rows = np.arange(len(labels))
    per_sample = {
        "output_kl": (np.exp(log_p) * (log_p - log_q)).sum(1),
        "output_sqnr": ((base - found) ** 2).sum(1) / (base**2).sum(1).mean(),
        "loss": log_p[rows, labels] - log_q[rows, labels],
        "accuracy": 100.0 * ((base.argmax(1) == labels) * 1.0 - (found.argmax(1) == labels)),
        INFORMATION_LOSS: (np.exp(log_f) * (log_p - log_q)).sum(1),
        LOSS_OVER_PAIRS: diverge_over_pairs(log_f, log_q - log_f) - diverge_over_pairs(log_f, log_p - log_f),
    }[name]
    return per_sample.mean(), per_sample.std() / math.sqrt(len(labels))


def diverge_over_pairs(log_p, changes):
    """E KL(p' || q') of every change applied to every p', one at a time."""
    nats = []
    for change in changes:
        log_q = log_softmax(log_p + change)
        nats.append((np.exp(log_p) * (log_p - log_q)).sum(1).mean())
    return np.array(nats)


@pytest.mark.parametrize("name", ["output_kl", "output_sqnr", "loss", "accuracy"])
@pytest.mark.parametrize("site", ["stem.0.weight", "blocks.1.conv1.weight", "head.weight"])
def test_it_is_what_the_definition_says(name, site, case):
    model, prepared, data = case
    with torch.no_grad():
        in_float = model(*data.inputs.values()).double().numpy()
    base, found = (logits_at(prepared, data, bits) for bits in ({}, {site: 2}))
    mean, error = by_definition(name, base, found, in_float, data.labels.numpy())
    score = infoq_fx.score(prepared, data, criterion=name, recovery="none", progress=False).scores[site]
    assert score[2].value == pytest.approx(max(0.0, mean), rel=1e-4, abs=1e-6)
    assert score[2].standard_error == pytest.approx(error, rel=1e-3)
    assert score[8].value == 0


@pytest.mark.parametrize("site", ["stem.0.weight", "blocks.1.conv1.weight", "head.weight"])
def test_infoq_measures_losses_and_losses_over_pairs(site, case):
    model, prepared, data = case
    with torch.no_grad():
        in_float = model(*data.inputs.values()).double().numpy()
    _, measured = measure_sensitivity(prepared, data, infoq_fx.InfoQ(), Resources(progress=False))
    for bits in (2, 4):
        (values,) = (m.values for m in measured if (m.site, m.bits) == (site, bits))
        base, found = (logits_at(prepared, data, given) for given in ({}, {site: bits}))
        for name in (INFORMATION_LOSS, LOSS_OVER_PAIRS):
            mean, error = by_definition(name, base, found, in_float, data.labels.numpy())
            assert values[name] == pytest.approx(mean, rel=1e-3, abs=1e-6)
            assert values[f"{name}:standard_error"] == pytest.approx(error, rel=1e-2)


def test_infoq_measures_two_bit_widths_and_scores_all(case):
    model, _, data = case
    prepared = infoq_fx.prepare(model, data, bits=(2, 3, 5, 6, 8))
    table, measured = measure_sensitivity(prepared, data, infoq_fx.InfoQ(), Resources(progress=False))
    assert {m.bits for m in measured} == {2, 3}
    for losses in table.scores.values():
        values = [losses[bits].value for bits in (2, 3, 5, 6, 8)]
        assert values == sorted(values, reverse=True)
        assert values[-1] == 0 < values[-2]


def test_without_labels_predictions_serve(case):
    _, prepared, data = case
    images = next(iter(data.inputs.values()))
    base, found = (logits_at(prepared, data, bits) for bits in ({}, {"stem.0.weight": 2}))
    table = infoq_fx.score(prepared, images, criterion="accuracy", progress=False)
    changed = 100 * np.mean(base.argmax(1) != found.argmax(1))
    assert table.scores["stem.0.weight"][2].value == pytest.approx(changed)


def test_criteria_of_one_measurement_share_the_cache(case, tmp_path, monkeypatch):
    _, prepared, data = case
    infoq_fx.score(prepared, data, criterion="output_kl", cache_dir=tmp_path, progress=False)
    monkeypatch.setattr(criteria.OutputKL, "begin", lambda *_, **__: pytest.fail("measured again"))
    for shared in (criteria.Loss, criteria.Accuracy, criteria.OutputSQNR, infoq_fx.InfoQ):
        monkeypatch.setattr(shared, "begin", lambda *_, **__: pytest.fail("measured again"))
        infoq_fx.score(prepared, data, criterion=shared(), cache_dir=tmp_path, progress=False)


def test_no_more_samples_than_asked_for_are_looked_at(case):
    _, prepared, data = case
    few, spread = infoq_fx.InfoQ(samples=32), data.select(torch.arange(32) * 3)
    assert infoq_fx.score(prepared, data, criterion=few, progress=False).settings["samples"] == 32
    assert (
        infoq_fx.score(prepared, data, criterion=few, recovery="none", progress=False).scores
        == infoq_fx.score(prepared, spread, recovery="none", progress=False).scores
    )
    with pytest.raises(infoq_fx.OptionError, match="at least 1"):
        infoq_fx.score(prepared, data, criterion=infoq_fx.InfoQ(samples=0), progress=False)


def test_observers_add_what_sliced_information_loses_beyond_its_noise():
    values = {INFORMATION_LOSS: 0.2, f"{INFORMATION_LOSS}:standard_error": 0.03}
    for key, change in (("task:output", 0.5), ("input:a", 0.01)):
        values |= {f"{key}:change": change, f"{key}:standard_error": 0.04, f"{key}:baseline": 1.0}
    criterion, prepared = (
        infoq_fx.InfoQ(observers=["a"], smi_weight=0.5),
        SimpleNamespace(inventory=Inventory((), (), 0), quantizer_nodes=tuple),
    )
    found = criterion.score(prepared, [Measurement("a", 2, values)])["a"][2]
    assert found.value == pytest.approx(0.2 + 0.5 * (0.5 - 2 * 0.04))
    assert found.standard_error == pytest.approx(math.sqrt(0.03**2 + 2 * (0.5 * 0.04) ** 2))


def test_infoq_with_observers_measures_both(case):
    _, prepared, data = case
    criterion = infoq_fx.InfoQ(observers=["blocks.0"], slices=8, smi_weight=0.0)
    table, measured = measure_sensitivity(prepared, data, criterion, Resources(progress=False))
    plain = infoq_fx.score(prepared, data, recovery="none", progress=False)
    upstream = next(m for m in measured if (m.site, m.bits) == ("stem.0.weight", 2))
    assert {"input:blocks.0:change", "task:blocks.0:change", INFORMATION_LOSS} <= set(upstream.values)
    for site in ("stem.0.weight", "head.weight"):
        assert table.scores[site][2].value == pytest.approx(plain.scores[site][2].value, rel=1e-9)


def test_a_single_column_is_a_quantity():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1)).eval()
    x = torch.randn(200, 4)
    table = infoq_fx.score(infoq_fx.prepare(model, x, bits=(2, 4, 8)), x, progress=False)
    assert all(by_bits[2].value > by_bits[4].value > 0 for by_bits in table.scores.values())
    y, z = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.5], [2.0]])
    assert diverge(y, z, torch.tensor([2.0])).tolist() == pytest.approx([0.25 / 4, 0.0])


def test_terms_of_the_papers_equation_add_up(case):
    _, prepared, data = case
    site = prepared.inventory["blocks.0.conv1.weight"]
    found = {}
    for terms in ("both", "input", "task"):
        criterion = infoq_fx.InfoQPaper(observers=["blocks.1", "output"], slices=16, terms=terms, divide_by_bits=False)
        measure = criterion.begin(prepared, data, batch_size=32, run_options=RunOptions())
        measured = measure(prepared, data, [site], RunOptions())[0].values
        total = sum(v for k, v in measured.items() if k.endswith(":baseline"))
        change = sum(v for k, v in measured.items() if k.endswith(":change"))
        found[terms] = total, change
        score = criterion.score(prepared, [Measurement(site.name, 2, measured)])[site.name][2]
        assert score.value == pytest.approx(change / max(total, 1e-3))
    assert found["both"] == pytest.approx([a + b for a, b in zip(found["input"], found["task"], strict=True)])


def test_terms_are_checked(case):
    with pytest.raises(infoq_fx.OptionError, match="terms"):
        infoq_fx.InfoQPaper(terms="all")


def test_input_terms_alone_score_the_classifier_too(case):
    _, prepared, data = case
    table = infoq_fx.score(prepared, data, criterion=infoq_fx.InfoQPaper(terms="input", slices=8), progress=False)
    assert "head.weight" in table.scores


def test_weight_mse_is_relative_power():
    model = nn.Sequential(nn.Linear(2, 1, bias=False)).eval()
    model[0].weight.data = torch.tensor([[1.0, -2.0]])
    prepared = infoq_fx.prepare(model, example_inputs=(torch.zeros(2, 2),), bits=(2, 8), activation_bits=None)
    table = infoq_fx.score(prepared, criterion="weight_mse", progress=False)
    assert table.scores["0.weight"][2].value == pytest.approx(0.0)  # 1 and -2 are integers of 2 bits


# A user's own ---------------------------------------------------------------------------------------


def spread_of_logits(prepared, data, site, bits):

    return float((compute_logits(prepared, data, {site.name: bits}) - compute_logits(prepared, data)).abs().max())


def test_a_function_is_a_criterion(case, tmp_path):
    _, prepared, data = case
    table = infoq_fx.score(prepared, data, criterion=spread_of_logits, progress=False)
    assert table.criterion == "spread_of_logits"
    assert table.scores["head.weight"][2].value > table.scores["head.weight"][8].value == 0
    infoq_fx.allocate(table, 3.0)


def test_a_functions_scores_are_found_again_under_its_version_only(case, tmp_path):
    _, prepared, data = case
    calls = []

    def counted(prepared, data, site, bits):
        calls.append(site)
        return 2.0**-bits

    def score(**options):
        calls.clear()
        criterion = infoq_fx.FunctionCriterion(counted, **options)
        infoq_fx.score(prepared, data, criterion=criterion, cache_dir=tmp_path, progress=False)
        return len(calls)

    assert score(version="1") == 18
    assert score(version="1") == 0
    assert score(version="2") == 18
    assert score() == 18
    assert score() == 18


@pytest.mark.parametrize("value", [math.nan, None, "much"])
def test_a_function_must_return_a_number(value, case):
    _, prepared, data = case
    with pytest.raises(infoq_fx.OptionError, match="return a finite number"):
        infoq_fx.score(prepared, data, criterion=lambda *_: value, progress=False)


def test_observers_are_measured_on_more_samples():
    assert infoq_fx.InfoQ().samples == 96
    assert infoq_fx.InfoQ(observers=["blocks.0"]).samples == 1024
    assert infoq_fx.InfoQ(observers=["blocks.0"], samples=64).samples == 64
    assert infoq_fx.InfoQ(samples=None).samples is None

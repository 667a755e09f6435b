import pytest
import torch
from logits import compute_logits
from networks import ResidualNet, randomise_norms
from torch import nn

import infoq_fx
from infoq_fx.core.data import read_data
from infoq_fx.finetuning.training_loop import update
from infoq_fx.quantization.histogram import significant_bits_of
from infoq_fx.recovery.step import StepContext
from infoq_fx.recovery.steps import output_tuning as tuning
from infoq_fx.recovery.steps.output_tuning import OutputTuning
from infoq_fx.recovery.steps.second_order_rounding import SecondOrderRounding

CONTEXT = StepContext(batch_size=16)


@pytest.fixture(scope="module")
def rounded():
    torch.manual_seed(1)
    model = randomise_norms(ResidualNet()).eval()
    images = torch.randn(96, 1, 8, 8)
    prepared = infoq_fx.prepare(model, images, bits=(2, 3, 8))
    data = read_data(images).named(prepared.input_names)
    sites = [site for site in prepared.inventory.sites if site.kind == "weight"]
    bits = {site.name: 8 for site in prepared.inventory.sites} | {s.name: 2 + i % 2 for i, s in enumerate(sites)}
    return SecondOrderRounding().recover(prepared, bits, data, CONTEXT), data, bits


def stored(prepared, bits):
    return infoq_fx.convert(prepared, infoq_fx.Allocation(bits=bits)).state_dict()


@pytest.mark.slow
def test_integers_stay_and_scales_and_biases_learn(rounded):
    prepared, data, bits = rounded
    tuned = OutputTuning(epochs=10, learning_rate=0.01, scale_rate=3.0).recover(prepared, bits, data, CONTEXT)
    before, after = stored(prepared, bits), stored(tuned, bits)
    weights = [name for name in bits if name.endswith("weight")]
    assert all(torch.equal(before[name], after[name]) for name in weights)
    assert any(not torch.equal(before[f"{name}_scale"], after[f"{name}_scale"]) for name in weights)
    biases = [name for name in before if name.endswith("bias")]
    assert biases
    assert sum(not torch.equal(before[name], after[name]) for name in biases) > len(biases) / 2
    for name in weights:
        digits = {significant_bits_of(float(scale)) for scale in before[f"{name}_scale"]}
        assert max(significant_bits_of(float(s)) for s in after[f"{name}_scale"]) <= max(5, *digits)
    assert tuned.origin is prepared.origin


def test_what_is_tuned_is_what_conversion_computes(rounded):
    prepared, data, bits = rounded
    tuned = OutputTuning(epochs=2, learning_rate=0.01).recover(prepared, bits, data, CONTEXT)
    quantized = infoq_fx.convert(tuned, infoq_fx.Allocation(bits=bits))
    with torch.no_grad():
        torch.testing.assert_close(quantized(data.inputs["x"]), compute_logits(tuned, data, bits), atol=1e-5, rtol=0)


def test_what_stays_are_averages(rounded, monkeypatch):
    prepared, data, bits = rounded
    left = []

    def record(training, optimizer, gradients, done):
        update(training, optimizer, gradients, done)
        left[:] = zip([x.clone() for x in optimizer.average], training.learned, strict=True)

    monkeypatch.setattr(tuning, "update", record)
    OutputTuning(epochs=3, learning_rate=0.01).recover(prepared, bits, data, CONTEXT)
    assert left
    assert all(torch.equal(average, learned.parameter) for average, learned in left)


def test_scales_can_be_left_alone(rounded):
    prepared, data, bits = rounded
    tuned = OutputTuning(epochs=2, scale_rate=0.0).recover(prepared, bits, data, CONTEXT)
    before, after = stored(prepared, bits), stored(tuned, bits)
    scales = [name for name in before if name.endswith("weight_scale")]
    assert all(torch.equal(before[name], after[name]) for name in scales)


@pytest.mark.slow
def test_biases_alone_find_a_shift_that_was_hidden():
    # A linear layer whose bias was spoiled: with everything else right, tuning finds it again.
    torch.manual_seed(0)
    model = nn.Linear(4, 3).eval()
    data = torch.randn(256, 4)
    prepared = infoq_fx.prepare(model, data, bits=8)
    bits = {site.name: 8 for site in prepared.inventory.sites}
    from infoq_fx.graph.layers import read_tensor
    from infoq_fx.recovery.parameters import fork, set_parameter

    spoiled = fork(prepared)
    set_parameter(spoiled, "bias", read_tensor(prepared.graph_module, "bias") + torch.tensor([0.5, -0.5, 0.0]))
    named = read_data(data).named(prepared.input_names)
    tuned = OutputTuning(epochs=60, learning_rate=0.05, scale_rate=0.0).recover(spoiled, bits, named, CONTEXT)
    found = read_tensor(tuned.graph_module, "bias") - read_tensor(prepared.graph_module, "bias")
    assert (found - found.mean()).abs().max() < 0.02  # outputs are logits: a common shift changes nothing

"""The whole pipeline through the public API, and every kind of invalid input."""

import itertools
from dataclasses import replace

import pytest
import torch
from networks import ResidualNet, randomise_norms
from torch import nn

import infoq_fx
from infoq_fx.errors import (
    CalibrationDataError,
    InfeasibleBudgetError,
    OptionError,
    UnsupportedModelError,
)


def quantize(model, budget=4.0, data=None, **options):
    return infoq_fx.quantize(model, budget, calibration_data=data, progress=False, **options)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return randomise_norms(ResidualNet()).eval()


@pytest.fixture(scope="module")
def samples():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(64, 1, 8, 8, generator=generator), torch.randint(0, 5, (64,), generator=generator)


@pytest.fixture(scope="module")
def prepared_and_table(model, samples):
    prepared = infoq_fx.prepare(model, samples)
    return prepared, infoq_fx.score(prepared, samples, progress=False)


@pytest.fixture(scope="module")
def nearest_table(prepared_and_table, samples):
    """Scores for weights rounded to nearest."""
    return infoq_fx.score(prepared_and_table[0], samples, recovery="none", progress=False)


@pytest.mark.parametrize("budget", [2.5, 3, 4.0, 6])
def test_the_budget_holds_and_more_bits_come_closer_to_float(budget, model, samples, prepared_and_table, nearest_table):
    prepared, table = prepared_and_table[0], nearest_table
    allocation = infoq_fx.allocate(table, budget)
    weights = [site for site in prepared.inventory.sites if site.kind == "weight"]
    spent = sum(site.numel * allocation.bits[site.name] for site in weights)
    assert spent <= budget * sum(site.numel for site in weights)
    quantized = infoq_fx.convert(prepared, allocation)
    with torch.no_grad():
        error = (quantized(samples[0]) - model(samples[0])).norm() / model(samples[0]).norm()
    assert error < {2.5: 1.0, 3: 0.7, 4.0: 0.4, 6: 0.15}[budget]


def test_one_call_is_the_stages_together(model, samples, prepared_and_table):
    prepared, table = prepared_and_table
    for refine in (True, False):
        allocation = infoq_fx.refine(prepared, table, 3.5, samples) if refine else infoq_fx.allocate(table, 3.5)
        whole = quantize(model, 3.5, samples, refine=refine)
        recovered = infoq_fx.recover(prepared, allocation, samples, progress=False)
        staged = infoq_fx.convert(recovered, allocation)
        assert infoq_fx.allocation_of(whole) == replace(allocation, recovered_by=recovered.recovered_by)
        assert torch.equal(whole(samples[0]), staged(samples[0]))


def test_the_table_saves_loads_and_allocates_the_same(prepared_and_table, tmp_path):
    _, table = prepared_and_table
    table.save(tmp_path / "scores.json")
    loaded = infoq_fx.SensitivityTable.load(tmp_path / "scores.json")
    assert infoq_fx.allocate(loaded, 3.0) == infoq_fx.allocate(table, 3.0)


def test_converting_twice_leaves_the_prepared_model_alone(prepared_and_table, nearest_table, samples):
    prepared, table = prepared_and_table[0], nearest_table
    first = infoq_fx.convert(prepared, infoq_fx.allocate(table, 3.0))
    infoq_fx.convert(prepared, infoq_fx.allocate(table, 6.0))
    again = infoq_fx.convert(prepared, infoq_fx.allocate(table, 3.0))
    assert torch.equal(first(samples[0]), again(samples[0]))


def test_a_model_in_training_mode_is_quantized_for_inference(samples):
    torch.manual_seed(1)
    training = randomise_norms(ResidualNet()).train()
    quantized = quantize(training, 8, samples)
    assert training.training
    training.eval()
    with torch.no_grad():
        expected = training(samples[0])
    assert (quantized(samples[0]) - expected).norm() < 0.1 * expected.norm()


@pytest.mark.slow
def test_several_limits_and_joint_activation_bits(model, samples):
    budget = infoq_fx.Budget(weight_bits=4.5, bitops=1_000_000 * 16, compression=7.0)
    quantized = quantize(model, budget, samples, bits=(2, 4, 8), activation_bits=(4, 8))
    allocation = infoq_fx.allocation_of(quantized)
    assert allocation.cost.weight_bits <= 4.5
    assert allocation.cost.bitops <= 16_000_000
    assert allocation.cost.compression >= 7
    assert set(allocation.bits.values()) <= {2, 4, 8}
    assert {allocation.bits[name] for name in allocation.bits if name.endswith(".input")} <= {4, 8}


@pytest.mark.slow
def test_without_data_weights_alone_by_their_error(model, samples):
    with pytest.warns(UserWarning, match="no calibration data"):
        quantized = quantize(model, 5.0, example_inputs=(samples[0][:2],))
    allocation = infoq_fx.allocation_of(quantized)
    assert allocation.criterion == "weight_mse"
    assert all(name.endswith("weight") for name in allocation.bits)
    assert (quantized(samples[0]) - model(samples[0])).norm() < 0.5 * model(samples[0]).norm()
    program = torch.export.export(model, (samples[0][:3],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with pytest.warns(UserWarning, match="no calibration data"):
        assert infoq_fx.allocation_of(quantize(program, 5.0)).bits == allocation.bits
    with (
        pytest.warns(UserWarning, match="no calibration data"),
        pytest.raises(OptionError, match="example_inputs"),
    ):
        quantize(model, 5.0)


@pytest.mark.slow
def test_a_program_with_a_fixed_batch_is_run_in_such_batches(model, samples):
    program = torch.export.export(model, (samples[0][:6],))
    quantized = quantize(program, 4.0, samples)
    assert quantized(samples[0][:6]).shape == (6, 5)


def test_ignored_layers_keep_their_float_weights(model, samples):
    quantized = quantize(model, 4.0, samples, ignore=["head", "blocks.0"])
    assert torch.equal(quantized.get_parameter("head.weight"), model.head.weight)
    assert "blocks.0.conv1.weight" not in infoq_fx.allocation_of(quantized).bits


@pytest.mark.slow
def test_pins_hold(model, samples):
    bits = infoq_fx.allocation_of(quantize(model, 3.0, samples, pin={"stem": 8, "head.weight": 2})).bits
    assert (bits["stem.0.weight"], bits["head.weight"]) == (8, 2)


class Small(nn.Module):
    """The names of the residual network, prepared faster."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Conv2d(1, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3)), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x).relu()).relu().mean((2, 3)))


class NoLayer(nn.Module):
    def forward(self, x):
        return x.relu().mean((2, 3))


def endless():
    return (torch.randn(512, 1, 8, 8) for _ in itertools.count())


X = torch.randn(32, 1, 8, 8)
BAD = {
    "no_layer": (dict(model=NoLayer()), UnsupportedModelError, "no layer to quantize"),
    "empty_data": (dict(data=[]), CalibrationDataError, "is empty"),
    "endless_data": (dict(data=endless()), CalibrationDataError, "has not ended"),
    "nan_input": (dict(data=X / 0), CalibrationDataError, "NaN or infinity"),
    "wrong_shape": (dict(data=torch.randn(32, 3, 8, 8)), CalibrationDataError, "rejects a calibration batch"),
    "wrong_dtype": (dict(data=X.to(torch.int64)), CalibrationDataError, "rejects a calibration batch"),
    "few_labels": (
        dict(data=(X, torch.zeros(3, dtype=torch.int64))),
        CalibrationDataError,
        "32 samples but 3 labels",
    ),
    "high_label": (
        dict(data=(X, torch.full((32,), 7)), outputs="categorical"),
        CalibrationDataError,
        "the model has 5 classes",
    ),
    "few_samples": (dict(data=X[:4], criterion="infoq_paper"), CalibrationDataError, "needs more than 6 samples"),
    "two_inputs": (dict(data=[((X, X), None)]), CalibrationDataError, "rejects a calibration batch"),
    "negative_budget": (dict(budget=-1.0), OptionError, "positive finite"),
    "zero_budget": (dict(budget=0), OptionError, "positive finite"),
    "nan_budget": (dict(budget=float("nan")), OptionError, "positive finite"),
    "text_budget": (dict(budget="3"), OptionError, "budget"),
    "low_budget": (dict(budget=1.5), InfeasibleBudgetError, "all layers at 2 bits"),
    "high_compression": (dict(budget=infoq_fx.Budget(compression=20)), InfeasibleBudgetError, "compression"),
    "pinned_too_high": (dict(budget=3.0, pin={"*": 8}), InfeasibleBudgetError, "8"),
    "one_bit": (dict(bits=(1, 2)), OptionError, "bits holds 1"),
    "nine_bits": (dict(activation_bits=9), OptionError, "activation_bits holds 9"),
    "half_bit": (dict(bits=(2.5,)), OptionError, r"bits holds 2\.5"),
    "no_bits": (dict(bits=()), OptionError, "bits is empty"),
    "pin_bits": (dict(pin={"head": 9}), OptionError, r"pin\[.head.\] holds 9"),
    "ignored_layer": (dict(ignore=["haed"]), OptionError, "'head'"),
    "pinned_layer": (dict(pin={"block": 4}), OptionError, "unknown layer in pin 'block'"),
    "observer": (dict(observers=["head.inptu"]), OptionError, r"'head\.input'"),
    "no_observer": (dict(observers=[]), OptionError, "give a list of names"),
    "measure": (dict(observers=[infoq_fx.Observer("output", "both")]), OptionError, "'task'"),
    "blind_observer": (
        dict(criterion="infoq_paper", observers=["stem"]),
        OptionError,
        "no observer downstream; add 'output'",
    ),
    "criterion": (dict(criterion="infoQ"), OptionError, r"unknown criterion 'infoQ'; nearest of \d+: 'infoq'"),
    "encoder": (dict(criterion="infoq_paper", encoder="dinov3"), OptionError, "'dinov2'"),
    "encoder_output": (
        dict(observers=["blocks.0"], encoder=lambda x: x.argmax(-1)),
        OptionError,
        "return a float tensor",
    ),
    "encoder_alone": (dict(encoder="pca"), OptionError, "name observers too"),
    "encoder_of_eagl": (dict(criterion="eagl", encoder="dinov2"), OptionError, "belong to criterion='infoq' or 'inf"),
    "alpha": (dict(alpha=-1.0), OptionError, "alpha"),
}


QUICK = {"alpha", "high_label", "two_inputs", "encoder_alone"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in BAD]
)
def test_bad_input_is_a_typed_error_with_cause_and_remedy(name, samples):
    options, kind, message = BAD[name]
    chosen = {"model": Small().eval(), "data": samples, "budget": 4.0, **options}
    with pytest.raises(kind, match=message) as caught:
        quantize(chosen.pop("model"), chosen.pop("budget"), chosen.pop("data"), **chosen)
    assert isinstance(caught.value, infoq_fx.InfoqError)


def test_labels_are_checked_against_a_program_too(model, samples):
    program = torch.export.export(model, (samples[0][:3],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with pytest.raises(CalibrationDataError, match=r"takes torch\.float32 \['samples', 1, 8, 8\]"):
        quantize(program, 4.0, torch.randn(32, 1, 9, 9))


def test_an_allocation_for_another_model_is_refused(prepared_and_table):
    prepared, _ = prepared_and_table
    with pytest.raises(OptionError, match=r"gives site 'stem\.0\.weight' no bit-width"):
        infoq_fx.convert(prepared, infoq_fx.Allocation(bits={"conv1.weight": 4}))


@pytest.mark.slow
def test_data_and_model_may_live_on_different_devices(model, samples):
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        quantized = quantize(model, 4.0, samples, device=device)
        assert {b.device.type for b in quantized.buffers()} == {device}

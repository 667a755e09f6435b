"""Depthwise layers' inputs are equalized before calibration: no integer of a weight changes, clamps hold."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import infoq_fx
from infoq_fx.core.data import CalibrationData
from infoq_fx.finetuning.trainable import float_copy
from infoq_fx.graph import calibration
from infoq_fx.graph.calibration import calibrate
from infoq_fx.graph.layers import read_tensor
from infoq_fx.quantization.numerics import quantize
from infoq_fx.recovery.ranges import equalization
from infoq_fx.recovery.ranges.groups import find_groups
from infoq_fx.recovery.segments import find_segments


def make_model(clamp):
    """An inverted bottleneck whose channels have ranges from 6 down to 6 / 32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 1), clamp, nn.Conv2d(12, 12, 3, groups=12), nn.ReLU(), nn.Conv2d(12, 5, 1))
    factors = torch.exp2(-torch.linspace(0, 5, 12))
    with torch.no_grad():
        model[0].weight *= 3 * factors[:, None, None, None]
        model[0].bias *= factors
        model[2].weight /= factors[:, None, None, None]
    return model.eval()


def prepare(model, x, bits=8):
    return infoq_fx.prepare(model, x, bits=(4, 8), activation_bits=bits, levels="uniform")


@pytest.fixture
def without_scale_factors(monkeypatch):
    """Calibration that multiplies no whole tensor."""
    monkeypatch.setattr("infoq_fx.graph.calibration.find_scale_groups", lambda graph_module: {})


def weight_of(prepared, path):
    return read_tensor(prepared.graph_module, path)


@pytest.fixture
def images():
    return torch.randn(64, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def without(monkeypatch):
    monkeypatch.setattr("infoq_fx.api.find_depthwise", lambda *_, **__: None)


def error_of(prepared, model, x, bits):
    quantized = infoq_fx.convert(prepared, infoq_fx.Allocation(bits={s.name: bits for s in prepared.inventory.sites}))
    with torch.no_grad():
        return float((quantized(x) - model(x)).square().mean())


@pytest.mark.usefixtures("without_scale_factors")
@pytest.mark.parametrize(
    "clamp",
    [
        nn.ReLU6(),
        pytest.param(nn.ReLU(), marks=pytest.mark.slow),
        pytest.param(nn.Hardtanh(-6, 6), marks=pytest.mark.slow),
    ],
    ids=["relu6", "relu", "hardtanh"],
)
def test_the_float_model_and_all_integers_of_weights_stay(clamp, images, monkeypatch):
    model = make_model(clamp)
    found = prepare(model, images)
    without(monkeypatch)
    plain = prepare(model, images)
    with torch.no_grad():
        assert torch.equal(float_copy(found)(images), float_copy(plain)(images))
    changed = set()
    for (node, new), (_, old) in zip(found.quantizer_nodes(), plain.quantizer_nodes(), strict=True):
        if new.site.kind == "weight":
            path = str(node.all_input_nodes[0].target)
            weights = weight_of(found, path), weight_of(plain, path)
            changed |= set() if torch.equal(*weights) else {path}
            integers = [quantize(w, module.qparams_at(4)) for w, module in zip(weights, (new, old), strict=True)]
            assert torch.equal(*integers)
    assert changed == {"0.weight", "2.weight"}
    assert error_of(found, model, images, 8) < 0.7 * error_of(plain, model, images, 8)


@pytest.mark.usefixtures("without_scale_factors")
def test_values_at_the_bound_of_a_clamp_stay_there(images):
    """A channel that the clamp limits keeps its factor; unseen values of others are cut above all that were seen."""
    model = make_model(nn.ReLU6())
    found = prepare(model, images)
    factors = (weight_of(found, "0.weight") / model[0].weight).detach().flatten(1)[:, 0]
    with torch.no_grad():
        reached = model[:2](images).amax((0, 2, 3))
    assert bool((factors * reached <= 6).all())
    assert float(factors[reached >= 6].max()) == 1
    assert float(factors.max()) >= 8


def make_pair(between):
    """Two channels, passed on as they are to a depthwise layer."""
    model = nn.Sequential(
        nn.Conv2d(2, 2, 1, bias=False),
        between,
        nn.Conv2d(2, 2, 1, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(2, 3),
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2)[..., None, None])
        model[2].weight.fill_(1.0)
    return model.eval()


@pytest.mark.usefixtures("without_scale_factors")
def test_rare_values_among_many_samples_meet_no_clamp():
    model = make_pair(nn.ReLU6())
    x = torch.rand(512, 2, 1, 1) * torch.tensor([6.0, 0.09]).reshape(1, 2, 1, 1)
    x[1::50, 1] = 5.0
    with torch.no_grad():
        assert torch.equal(float_copy(prepare(model, x))(x), model(x))


def test_rare_values_of_a_channel_do_not_widen_the_range_of_all(monkeypatch):
    model = make_pair(nn.ReLU())
    x = torch.rand(512, 2, 1, 1) * torch.tensor([6.0, 0.09]).reshape(1, 2, 1, 1)
    x[1::50, 1] = 5.0  # in few of the samples that factors are chosen on, or in none
    found = prepare(model, x)
    without(monkeypatch)
    assert error_of(found, model, x, 8) < 1.2 * error_of(prepare(model, x), model, x, 8)


@pytest.mark.usefixtures("without_scale_factors")
@pytest.mark.parametrize("largest", [0.0937500149011612, 0.09375, 0.0937499925494194])
def test_a_factor_that_round_off_alone_allows_is_not_taken(largest):
    model, x = make_pair(nn.ReLU6()), torch.rand(64, 2, 1, 1) * torch.tensor([6.0, largest]).reshape(1, 2, 1, 1)
    x[5, 1], x[6, 0] = largest, 6.0
    with torch.no_grad():
        assert torch.equal(float_copy(prepare(model, x))(x), model(x))


def test_grouped_layers_that_mix_channels_are_not_depthwise(images, monkeypatch):
    monkeypatch.setattr(equalization, "find_groups", None)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert prepare(model.eval(), images).inventory.sites


def test_models_without_depthwise_layers_are_not_run(images, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError

    monkeypatch.setattr(equalization, "equalize_groups", refuse)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    assert prepare(model, images).inventory.sites


@pytest.mark.usefixtures("without_scale_factors")
@pytest.mark.parametrize("samples", [1, 64])
def test_one_pass_calibrates_the_equalized_model(images, samples):
    """The pass that finds the ranges fills the histograms of the multiplied tensors too."""
    data = CalibrationData({"input": images[:samples]}, None, False)
    found = prepare(make_model(nn.ReLU6()), images[:samples], bits=(2, 4, 8))
    again = prepare(make_model(nn.ReLU6()), images[:samples], bits=(2, 4, 8))
    calibrate(again, replace(data, inputs={again.input_names[0]: images[:samples]}), batch_size=7)
    for (_, one), (_, other) in zip(found.quantizer_nodes(), again.quantizer_nodes(), strict=True):
        assert one.calibrated_bits == other.calibrated_bits
        for bits in one.calibrated_bits:
            assert torch.equal(one.qparams_at(bits).scale, other.qparams_at(bits).scale)
            assert torch.equal(one.qparams_at(bits).zero_point, other.qparams_at(bits).zero_point)


@pytest.mark.slow
def test_many_samples_hold_few_values_each(images, monkeypatch):
    monkeypatch.setattr(calibration, "_VALUES_HELD", 64 * 100)
    model = make_model(nn.ReLU6())
    found, all_held = prepare(model, images), []
    monkeypatch.setattr(
        calibration, "_hold", lambda *given, _hold=calibration._hold: all_held.append(_hold(*given)) or all_held[-1]
    )
    again = prepare(model, images)
    assert max(held.values.shape[1] for held in all_held) <= 100
    assert error_of(again, model, images, 8) == error_of(found, model, images, 8)


@pytest.mark.parametrize("axis", [1, 3])
def test_no_more_is_held_than_is_counted(axis):
    """A view would hold the values of the whole batch."""
    x = torch.randn(4, 6, 20, 30)
    held = calibration._hold(x, axis, 50)
    assert held.values.shape[1] <= 50
    assert held.values.untyped_storage().nbytes() == 4 * held.values.numel()
    expected = torch.arange(x.shape[axis]).reshape([-1 if i == axis else 1 for i in range(4)]).expand(x.shape)[0]
    stride = calibration.coprime_stride(3600, 50)
    assert torch.equal(held.channels, expected.flatten()[::stride])
    assert torch.equal(held.values, x.flatten(1)[:, ::stride])


@pytest.mark.slow
def test_many_rows_of_a_sample_hold_no_more_than_a_few(monkeypatch):
    """Frames or windows that are folded into the samples' axis."""

    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = make_model(nn.ReLU6())

        def forward(self, x):
            return self.layers(x.reshape(-1, 3, 9, 9)).reshape(x.shape[0], -1)

    monkeypatch.setattr(calibration, "_VALUES_HELD", 32 * 400)
    all_held = []
    hold = calibration._hold
    monkeypatch.setattr(calibration, "_hold", lambda *given: all_held.append(hold(*given)) or all_held[-1])
    prepare(Frames().eval(), torch.randn(32, 8, 3, 9, 9))
    by_site = max(held.values.numel() for held in all_held)
    assert 32 * 100 < by_site <= 32 * 400


def test_ranges_alone_hold_no_values(images):
    prepared = prepare(make_model(nn.ReLU6()), images)
    layers = [layer for segment in find_segments(prepared) for layer in segment.layers]
    data = CalibrationData({prepared.input_names[0]: images}, None, False)
    found = equalization.measure_channels(prepared, find_groups(prepared, layers), data, map, batch_size=8, values=0)
    assert found
    assert all(x.values.untyped_storage().nbytes() == 0 for x in found.values())


def test_a_value_that_is_not_finite_is_told(images):
    model = make_model(nn.ReLU())
    with torch.no_grad():
        model[0].weight.mul_(1e38)
    images[3] *= 1e6
    with pytest.raises(infoq_fx.CalibrationDataError, match="is NaN or infinite for a calibration batch"):
        prepare(model, images)


@pytest.mark.slow
def test_threads_change_no_factor(images):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = prepare(make_model(nn.ReLU6()), images, bits=(2, 4, 8))
    finally:
        torch.set_num_threads(before)
    alone = prepare(make_model(nn.ReLU6()), images, bits=(2, 4, 8))
    for (path, a), (_, b) in zip(
        found.graph_module.state_dict().items(), alone.graph_module.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), path


@pytest.mark.slow
def test_a_file_gives_the_bits_of_torch(images, tmp_path):
    quantized = infoq_fx.quantize(make_model(nn.ReLU6()), 5, calibration_data=images, progress=False)
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    assert infoq_fx.verify_onnx(path, quantized, images).is_sound

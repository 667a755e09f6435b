"""Features: activations that finetuning compares with the float model's."""

import pytest
import torch
from finetuned import assert_same, convert, prepared_of, quick, small
from torch import fx, nn

import infoq_fx
from infoq_fx.errors import OptionError
from infoq_fx.finetuning.features import find_features, run_with_features
from infoq_fx.finetuning.retraining import to_trainable
from infoq_fx.finetuning.trainable import float_copy


def layer_inputs(model, names, x):
    """The inputs of modules, by hooks on the user's own model."""
    found = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0]}))
    with torch.no_grad():
        model(x)
    return found


def make_chain():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU6(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    return model.eval(), x, infoq_fx.prepare(model, x, bits=(2, 8), activation_bits=(2, 8))


def test_the_loss_is_the_mean_squared_error_relative_to_the_variance(monkeypatch):
    """Read by hooks on the model itself; without factors of whole tensors both have the same units."""
    monkeypatch.setattr("infoq_fx.graph.calibration.find_scale_groups", lambda graph_module: {})
    model, x, prepared = make_chain()
    student = to_trainable(convert(prepared, 2, 2))
    features = find_features(prepared, student, [{"input": x[:25]}, {"input": x[25:]}], 3.0)
    expected = layer_inputs(model, ["0", "2", "5"], x)
    ours = run_with_features(student, {"input": x})[1]
    total = torch.zeros(len(x), dtype=torch.float64)
    for name in ("0", "2", "5"):
        variance = expected[name].double().var(correction=0)
        assert features.variances[f"{name}.input"] == pytest.approx(float(variance), rel=1e-5)
        total += (ours[f"{name}.input"] - expected[name]).double().square().flatten(1).mean(1) / variance
    others = set(features.variances) - {"0.input", "2.input", "5.input"}
    theirs = run_with_features(features.float_model, {"input": x})[1]
    for name in others:
        error = (ours[name] - theirs[name]).double().square().flatten(1).mean(1)
        total += error / features.variances[name]
    found = features.measure(ours, theirs)
    torch.testing.assert_close(found, 3.0 * total.mean() / len(features.variances), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "case", ["residual", *(pytest.param(case, marks=pytest.mark.slow) for case in ("norm_first", "tied"))]
)
def test_a_tapped_model_computes_what_the_float_model_does(case):
    _, x, prepared = prepared_of(case)
    student = to_trainable(convert(prepared))
    inputs = {"x": x}
    features = find_features(prepared, student, [inputs], 1.0)
    with torch.no_grad():
        outputs, theirs = run_with_features(features.float_model, inputs)
        assert torch.equal(outputs[0], float_copy(prepared)(x))
        (ours,), _ = run_with_features(student, inputs)
        assert torch.equal(ours, student(x))
    assert all(x.shape == theirs[site].shape for site, x in run_with_features(student, inputs)[1].items())
    assert not any(torch.equal(theirs[site], torch.zeros(())) for site in features.variances)


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"augment": lambda inputs, generator: inputs}, marks=pytest.mark.slow)]
)
def test_activations_come_nearer_to_those_of_the_float_model(options):
    quantized, x = small()
    prepared = prepared_of("residual")[2]
    before = {name: value.clone() for name, value in quantized.state_dict().items()}
    errors = []
    for weight in (0.0, 30.0):
        tuned = quick(quantized, x, epochs=4, learning_rate=0.03, feature_weight=weight, **options)
        student = to_trainable(tuned)
        features = find_features(prepared, student, [{"x": x}], 1.0)
        runs = (run_with_features(module, {"x": x})[1] for module in (student, features.float_model))
        errors.append(float(features.measure(*runs).detach()))
    assert errors[1] < 0.9 * errors[0]
    assert all(torch.equal(value, before[name]) for name, value in quantized.state_dict().items())


@pytest.mark.slow
def test_threads_and_a_given_teacher_change_nothing():
    quantized, x = small()
    first = quick(quantized, x, feature_weight=10.0, memory_limit=200_000)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        teacher = prepared_of("residual")[2]
        assert_same(quick(quantized, x, feature_weight=10.0, memory_limit=200_000, teacher=teacher), first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_checkpoint_knows_the_weight(tmp_path):
    quantized, x = small()
    quick(quantized, x, epochs=1, feature_weight=10.0, checkpoint=tmp_path / "state.pt")
    with pytest.raises(OptionError, match=r"feature_weight=10\.0 instead of 0"):
        quick(quantized, x, epochs=1, checkpoint=tmp_path / "state.pt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_weight": -1.0}, "give a number from 0 up"),
        ({"feature_weight": float("nan")}, "give a number from 0 up"),
        ({"feature_weight": True}, "give a number from 0 up"),
        ({"feature_weight": 1.0, "label_weight": 1}, "give a smaller label_weight"),
        ({"feature_weight": 1.0, "teacher": nn.Identity()}, "teacher is a Identity; give what prepare"),
    ],
)
def test_other_weights_and_teachers_are_refused(options, message):
    quantized, x = small()
    with pytest.raises(OptionError, match=message):
        quick(quantized, x, **options)


class Folded(nn.Module):
    """Time first inside, or steps folded into the samples' axis."""

    def __init__(self, *, is_folded):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.is_folded = is_folded

    def forward(self, x):
        batch = x.shape[0]
        x = x.reshape(-1, 4) if self.is_folded else x.transpose(0, 1)
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(x.reshape(batch, -1, 6).mean(1) if self.is_folded else x.mean(0))


@pytest.mark.parametrize("is_folded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_samples_need_not_be_the_first_axis(is_folded):
    torch.manual_seed(0)
    x = torch.randn(48, 6, 4)
    prepared = infoq_fx.prepare(Folded(is_folded=is_folded).eval(), x, bits=(3, 8), activation_bits=(3, 8))
    student = to_trainable(convert(prepared, 3, 3))
    found = [find_features(prepared, student, [{"x": part} for part in x.split(n)], 1.0) for n in (4, 6, 48)]
    assert {"first.input", "second.input", "head.input"} <= set(found[0].variances)
    assert all(features.variances == pytest.approx(found[0].variances) for features in found)
    losses = []
    for n in (4, 6, 48):
        runs = [[run_with_features(m, {"x": part})[1] for m in (student, found[0].float_model)] for part in x.split(n)]
        losses.append(float(sum(found[0].measure(*run).detach() for run in runs)) / len(runs))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_a_teacher_with_other_factors_is_refused(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(64, 8)
    with torch.no_grad():
        model[0].weight[0] *= 60
        model[2].weight[:, 0] /= 60
    prepared = infoq_fx.prepare(model, x, bits=8, activation_bits=8)
    allocation = infoq_fx.Allocation(bits={site.name: 8 for site in prepared.inventory.sites})
    recovered = infoq_fx.recover(prepared, allocation, x, recovery=["range_equalization"], progress=False)
    assert recovered.recovered_by == ("range_equalization",)
    quantized = infoq_fx.convert(recovered, allocation)
    with pytest.raises(OptionError, match="has other parameters than that; leave teacher out"):
        quick(quantized, x, epochs=1, feature_weight=1.0, teacher=prepared)
    infoq_fx.save_quantized(quantized, tmp_path / "model.pt2")
    loaded = infoq_fx.load_quantized(tmp_path / "model.pt2")
    with pytest.raises(OptionError, match="which range_equalization changed behind the given teacher; leave"):
        quick(loaded, x, epochs=1, feature_weight=1.0, teacher=prepared)
    assert_same(
        quick(quantized, x, epochs=1, feature_weight=1.0, teacher=recovered),
        quick(quantized, x, epochs=1, feature_weight=1.0),
    )


def test_a_teacher_of_another_width_is_refused():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, 4)).eval() for n in (6, 9)]
    x = torch.randn(64, 8)
    prepared, other = (infoq_fx.prepare(model, x, bits=(3, 8)) for model in models)
    quantized = convert(prepared, 3, 8)
    with pytest.raises(OptionError, match="has other parameters than that; leave teacher out"):
        quick(quantized, x, feature_weight=1.0, teacher=other)
    with pytest.raises(OptionError, match=r"the activation '2.input' is \[\d+, 9\] in the float model and \[\d+, 6\]"):
        find_features(other, to_trainable(quantized), [{"input": x}], 1.0)


@pytest.mark.slow
def test_values_that_do_not_vary_are_not_compared():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Hardtanh(0.1, 0.1000001), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(64, 8)
    prepared = infoq_fx.prepare(model.eval(), x, bits=(3, 8))
    features = find_features(prepared, to_trainable(convert(prepared, 3, 8)), [{"input": x}], 1.0)
    assert "2.input" not in features.variances
    assert "4.input" in features.variances


@pytest.mark.slow
def test_convolutions_are_finetuned_inside_inference_mode():
    _, x, prepared = make_chain()
    quantized = convert(prepared, 2, 8)
    expected = quick(quantized, x, epochs=1, feature_weight=1.0)
    with torch.inference_mode():
        assert_same(quick(quantized, x, epochs=1, feature_weight=1.0), expected)


def test_a_model_with_float_activations_has_nothing_to_compare():
    _, x, prepared = prepared_of("weights_only")
    with pytest.raises(OptionError, match="compares activations that are quantized, and the model has none"):
        quick(convert(prepared), x, feature_weight=1.0)


@pytest.mark.slow
def test_taps_are_no_quantizers():
    _, x, prepared = make_chain()
    features = find_features(prepared, to_trainable(convert(prepared)), [{"input": x}], 1.0)
    assert isinstance(features.float_model, fx.GraphModule)
    assert not any("Quantizer" in type(module).__name__ for module in features.float_model.modules())

"""Range equalization: the float model keeps its outputs to the last bit, the quantized one gets closer to them."""

import pytest
import torch
from logits import compute_float_logits, compute_logits
from torch import nn
from torch.nn import functional

import infoq_fx
from infoq_fx.core.data import read_data
from infoq_fx.errors import OptionError
from infoq_fx.graph.float_interpreter import read_weight
from infoq_fx.quantization.histogram import significant_bits_of
from infoq_fx.recovery.ladder import recover_accuracy
from infoq_fx.recovery.step import StepContext
from infoq_fx.recovery.steps.bias_correction import BiasCorrection
from infoq_fx.recovery.steps.range_equalization import RangeEqualization
from infoq_fx.recovery.steps.second_order_rounding import SecondOrderRounding
from infoq_fx.runtime.forward import RunOptions

pytestmark = pytest.mark.slow  # of features that few models meet

STEP = RangeEqualization()


@pytest.fixture(autouse=True)
def without_preparation(monkeypatch):
    """The step alone, without what `prepare` does for depthwise layers."""
    monkeypatch.setattr("infoq_fx.api.find_depthwise", lambda *_, **__: None)


class Sequence(nn.Sequential):
    """Layers in a row, the mean over space at the end."""

    def forward(self, x):
        x = super().forward(x)
        return x.mean((2, 3)) if x.ndim == 4 else x


def prepare(model, x):
    prepared = infoq_fx.prepare(model.eval(), x, bits=(4, 8), levels="uniform")
    return prepared, read_data(x).named(prepared.input_names)


def equalize(prepared, data, bits=None, step=STEP, run_options=None):
    return step.recover(prepared, bits or {}, data, StepContext(batch_size=16, run_options=run_options or RunOptions()))


def float_weights(prepared):
    return {module.site.name: read_weight(prepared, node) for node, module in prepared.quantizer_nodes()
            if module.site.kind == "weight"}  # fmt: skip


def find_changed(before, after):
    after = float_weights(after)
    return {name for name, weight in float_weights(before).items() if not torch.equal(weight, after[name])}


def unbalance(first, octaves=6):
    """Channels whose ranges span many octaves, as a batch norm folded into a layer leaves them."""
    with torch.no_grad():
        factors = torch.exp2(torch.linspace(-octaves, 0, len(first.weight)))
        first.weight *= factors.reshape(-1, *[1] * (first.weight.ndim - 1))
        first.bias *= factors


def rebalance(second, octaves=6):
    """The inverse, for the input channels of the layer behind, dense or depthwise."""
    axis = 0 if getattr(second, "groups", 1) > 1 else 1
    factors = torch.exp2(torch.linspace(octaves, 0, second.weight.shape[axis]))
    with torch.no_grad():
        second.weight *= factors.reshape([-1 if i == axis else 1 for i in range(second.weight.ndim)])


def measure_error(prepared, data, bits=None):
    in_float = compute_float_logits(prepared.origin or prepared, data, batch_size=16)
    return float((compute_logits(prepared, data, bits) - in_float).square().mean())


def assert_same_float(prepared, found, data):
    before = compute_float_logits(prepared, data, batch_size=16)
    for model in (found, found.origin):
        assert torch.equal(compute_float_logits(model, data, batch_size=16), before)


def make_unbalanced(*layers):
    model = Sequence(*layers)
    first, second = (layer for layer in model if hasattr(layer, "weight"))
    unbalance(first)
    rebalance(second)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "behind",
    [
        lambda: [nn.ReLU(), nn.Conv2d(8, 8, 3)],
        lambda: [nn.LeakyReLU(), nn.Conv2d(8, 8, 3, groups=8, padding=1)],
        pytest.param(
            lambda: [nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.Conv2d(8, 4, 1, bias=False)], marks=pytest.mark.slow
        ),
        lambda: [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)],
    ],
    ids=["relu", "depthwise", "max-pool", "flatten"],
)
def test_a_hidden_scale_is_found_and_the_float_model_stays_to_the_last_bit(behind, images):
    prepared, data = prepare(make_unbalanced(nn.Conv2d(1, 8, 3), *behind()), images[0])
    found = equalize(prepared, data)
    assert find_changed(prepared, found) == set(float_weights(prepared))
    assert_same_float(prepared, found, data)
    assert measure_error(found, data) < 0.3 * measure_error(prepared, data)


@pytest.mark.slow
def test_grouped_convolutions_meet_their_own_channels(images):
    first, second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 6, 3, groups=2)
    unbalance(first)
    factors = torch.exp2(torch.linspace(6, 0, 8)).reshape(2, 1, 4, 1, 1)
    with torch.no_grad():
        second.weight.copy_((second.weight.reshape(2, 3, 4, 3, 3) * factors).reshape(6, 4, 3, 3))
    prepared, data = prepare(Sequence(first, nn.ReLU(), second), images[0])
    found = equalize(prepared, data)
    assert_same_float(prepared, found, data)
    assert measure_error(found, data) < 0.3 * measure_error(prepared, data)


def test_linear_layers_in_a_chain():
    torch.manual_seed(3)
    layers = [nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)]
    for i in (0, 2):
        unbalance(layers[i])
        rebalance(layers[i + 2])
    prepared, data = prepare(nn.Sequential(*layers), torch.randn(128, 7, 6))  # tokens
    found = equalize(prepared, data)
    assert len(find_changed(prepared, found)) == 3
    assert_same_float(prepared, found, data)
    assert measure_error(found, data) < 0.3 * measure_error(prepared, data)


def test_factors_are_powers_of_two_and_the_first_integers_stay(images):
    prepared, data = prepare(make_unbalanced(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), images[0])
    with torch.no_grad():
        prepared.graph_module.get_parameter("0.weight")[3] = 0.0  # dead
        prepared.graph_module.get_parameter("0.bias")[3] = 0.0
    found = equalize(prepared, data)
    before, after = (float_weights(model)["0.weight"].flatten(1) for model in (prepared, found))
    octaves = (after / before)[:, 0].nan_to_num(1.0).log2()
    assert torch.equal(octaves, octaves.round())
    assert octaves[0] >= octaves[-1] + 4
    assert octaves[3] == 0
    assert octaves.abs().max() <= 6
    assert torch.equal(float_weights(prepared)["2.weight"][:, 3], float_weights(found)["2.weight"][:, 3])
    for (_, old), (_, new) in zip(prepared.quantizer_nodes(), found.quantizer_nodes(), strict=True):
        assert new.calibrated_bits == old.calibrated_bits
        for bits in old.calibrated_bits if old.site.name == "0.weight" else ():
            assert torch.equal(new.qparams_at(bits).scale, old.qparams_at(bits).scale * octaves.exp2())


@pytest.fixture
def without_factors(monkeypatch):
    """Calibration that leaves the weights as they are."""
    for module in ("graph.calibration", "recovery.steps.range_equalization"):
        monkeypatch.setattr(f"infoq_fx.{module}.find_scale_groups", lambda graph_module: {})


@pytest.mark.slow
@pytest.mark.usefixtures("without_factors")
def test_new_ranges_are_calibrated_as_those_of_a_model_prepared_afresh(images):
    prepared, data = prepare(make_unbalanced(nn.Conv2d(1, 8, 3), nn.LeakyReLU(), nn.Conv2d(8, 8, 3)), images[0])
    found = equalize(prepared, data)
    model = Sequence(nn.Conv2d(1, 8, 3), nn.LeakyReLU(), nn.Conv2d(8, 8, 3))
    with torch.no_grad():
        for name, value in model.named_parameters():
            path, _, last = name.rpartition(".")
            value.copy_(getattr(found.origin.graph_module.get_submodule(path), last))
    afresh, _ = prepare(model, images[0])
    pairs = list(zip(afresh.quantizer_nodes(), found.quantizer_nodes(), strict=True))
    assert any(old.site.name.endswith(".output") for (_, old), _ in pairs)
    for (_, old), (_, new) in pairs:
        for bits in old.calibrated_bits:
            assert torch.equal(new.qparams_at(bits).scale, old.qparams_at(bits).scale), old.site.name
            assert torch.equal(new.qparams_at(bits).zero_point, old.qparams_at(bits).zero_point)


def test_scales_that_are_powers_of_two_stay_so(images):
    prepared, data = prepare(make_unbalanced(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), images[0])
    found = equalize(prepared, data)
    assert find_changed(prepared, found)
    for model in (prepared, found):
        quantizers = {module.site.name: module for _, module in model.quantizer_nodes()}
        between = quantizers["2.input"]
        assert all(significant_bits_of(float(between.qparams_at(bits).scale)) == 1 for bits in between.calibrated_bits)


@pytest.mark.usefixtures("without_factors")
def test_a_pair_is_refused_where_it_does_not_help(monkeypatch):
    """Ranges differ, but all values and weights lie nearly on their grids as they are."""
    x = torch.randint(0, 256, (64, 2, 4, 4)).float()
    x[:, 1] = (x[:, 1] / 64).floor()
    x = (x + 0.02 * torch.rand_like(x)).clamp(max=255.0)
    model = Sequence(nn.Conv2d(2, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2)[..., None, None])
        model[2].weight.copy_(torch.tensor([[-8.0, 5.0], [3.0, -8.0], [7.0, -8.0]])[..., None, None])
    prepared, data = prepare(model, x)
    bits = {"2.weight": 4}
    found = equalize(prepared, data, bits)
    assert find_changed(prepared, found) == set()
    assert found.origin is prepared
    assert measure_error(found, data, bits) == measure_error(prepared, data, bits)
    equal = torch.tensor([1.0, 64.0]), 0.5  # the factors that make ranges equal
    monkeypatch.setattr("infoq_fx.recovery.ranges.equalization.choose_factors", lambda *_: equal)
    forced = equalize(prepared, data, bits)
    assert len(find_changed(prepared, forced)) == 2
    assert measure_error(forced, data, bits) > 1.02 * measure_error(prepared, data, bits)


class Shared(nn.Module):
    """What the first layer gives is read twice, its weight in ``tied`` by two layers."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        unbalance(self.first)
        rebalance(self.second)

    def forward(self, x):
        hidden = self.first(x).relu()
        if self.kind == "tied":
            return self.second(hidden) + functional.linear(x, self.first.weight)
        if self.kind == "bias":
            return self.second(hidden) + self.first.bias
        return self.second(hidden) + (hidden if self.kind == "residual" else 0)


@pytest.mark.parametrize(("kind", "changed"), [("residual", 0), ("tied", 0), ("bias", 0), ("none", 2)])
def test_what_something_else_reads_is_left_alone(kind, changed):
    prepared, data = prepare(Shared(kind), torch.randn(64, 8))
    assert len(find_changed(prepared, equalize(prepared, data))) == changed


class SpaceAsChannels(nn.Module):
    """A linear layer over the columns of an image, whose ranges differ; as many as there are channels."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 1, bias=False), nn.Linear(8, 8)
        rebalance(self.second)

    def forward(self, x):
        return self.second(self.first(x).relu()).mean((2, 3))


def test_curves_and_other_axes_let_no_factor_through(images):
    models = [make_unbalanced(nn.Conv2d(1, 8, 3), nn.Hardswish(), nn.Conv2d(8, 8, 3)), SpaceAsChannels()]
    unequal = images[0] * torch.exp2(torch.linspace(-6, 0, 8))
    for model in models:
        prepared, data = prepare(model, unequal)
        shares = []
        found = equalize(prepared, data, run_options=RunOptions(advance=shares.append))
        assert find_changed(prepared, found) == set()
        assert found.origin is prepared
        assert sum(shares) == pytest.approx(1.0)


@pytest.mark.parametrize("clamp", [nn.ReLU6(), nn.Hardtanh(-6, 6)], ids=["relu6", "hardtanh"])
def test_clamps_let_factors_through_that_no_value_meets(clamp, images):
    model = make_unbalanced(nn.Conv2d(1, 8, 3), clamp, nn.Conv2d(8, 8, 3))
    with torch.no_grad():
        model[0].weight[-1] *= 20  # a channel that the clamp cuts
    prepared, data = prepare(model, images[0])
    found = equalize(prepared, data)
    assert find_changed(prepared, found) == {"0.weight", "2.weight"}
    assert_same_float(prepared, found, data)
    assert measure_error(found, data) < 0.5 * measure_error(prepared, data)


class Stage(nn.Module):
    """Two residual blocks whose sums have channels of very different ranges."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 5, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)) for _ in range(2))
        for made in (self.stem, *(block[2] for block in self.blocks)):
            unbalance(made)
        for read in (self.head, *(block[0] for block in self.blocks)):
            rebalance(read)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x).mean((2, 3))


def test_residual_additions_share_their_factors(images):
    torch.manual_seed(0)
    prepared, data = prepare(Stage(), images[0])
    found = equalize(prepared, data)
    assert_same_float(prepared, found, data)
    assert {"stem.weight", "head.weight", "blocks.0.2.weight", "blocks.1.0.weight"} <= find_changed(prepared, found)
    assert measure_error(found, data) < 0.1 * measure_error(prepared, data)


def test_it_comes_before_other_steps(images):
    prepared, data = prepare(make_unbalanced(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), images[0])
    bits = dict.fromkeys(float_weights(prepared), 4)
    context = StepContext(batch_size=16)
    with pytest.raises(OptionError, match="put it first in the list"):
        equalize(BiasCorrection().recover(prepared, bits, data, context), data, bits)
    once = equalize(prepared, data, bits)
    assert_same_float(prepared, equalize(once, data, bits), data)
    corrected = BiasCorrection().recover(once, bits, data, context)
    assert corrected.origin is once.origin
    assert measure_error(corrected, data, bits) <= measure_error(once, data, bits)


def test_it_recovers_accuracy_and_converts(images):
    model = make_unbalanced(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3))
    nn.init.zeros_(model[0].bias)  # others are rounded to integers when they are converted
    nn.init.zeros_(model[2].bias)
    prepared, data = prepare(model, images[0])
    table = infoq_fx.score(prepared, images[0], criterion="weight_mse", progress=False)
    allocation = infoq_fx.allocate(table, 4.0)
    found = recover_accuracy(prepared, allocation.bits, data, [STEP], progress=False)
    assert found.recovered_by == ("range_equalization",)
    with torch.no_grad():
        logits = infoq_fx.convert(found, allocation)(images[0])
    torch.testing.assert_close(logits, compute_logits(found, data, allocation.bits))
    assert not torch.allclose(logits, compute_logits(prepared, data, allocation.bits), atol=1e-3)
    both = recover_accuracy(prepared, allocation.bits, data, [STEP, SecondOrderRounding()], progress=False)
    assert both.recovered_by == ("range_equalization", "second_order_rounding")
    assert measure_error(both, data, allocation.bits) < measure_error(found, data, allocation.bits)


@pytest.mark.slow
def test_residual_net_is_not_harmed_and_results_repeat(residual_net, images):
    prepared, data = prepare(residual_net, images[0])
    bits = {site.name: 4 for site in prepared.inventory.sites if site.kind == "weight"}
    shares = []
    found = equalize(prepared, data, bits, run_options=RunOptions(threads=2, advance=shares.append))
    again = equalize(prepared, data, bits)
    assert sum(shares) == pytest.approx(1.0)
    assert find_changed(found, again) == set()
    assert find_changed(prepared, found) <= {f"blocks.{i}.conv{j}.weight" for i in (0, 1) for j in (1, 2)}
    before = compute_float_logits(prepared, data, batch_size=16)
    assert torch.equal(compute_float_logits(found, data, batch_size=16), before)


def test_options_out_of_range():
    with pytest.raises(OptionError, match="samples"):
        RangeEqualization(samples=0)


class Block(nn.Module):
    """A norm, GELU between layers, a norm by hand before two layers, and a gate; outliers in two channels of each."""

    def __init__(self, outliers=True):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.scale = nn.Parameter(torch.ones(16))
        self.gate, self.value, self.last = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 4)
        large = torch.tensor([40.0, 90.0])
        with torch.no_grad():
            for made, read in (
                ((self.norm.weight, [self.up]), (self.scale, [self.gate, self.value])) if outliers else ()
            ):
                made[:2] *= large
                for layer in read:
                    layer.weight[:, :2] /= large
            if outliers:
                self.up.bias[:2] += large
                self.down.weight[:, :2] /= large
                self.value.weight[:2] *= large[:, None]
                self.last.weight[:, :2] /= large

    def forward(self, x):
        x = self.down(functional.gelu(self.up(self.norm(x))))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * self.scale
        return self.last(functional.silu(self.gate(x)) * self.value(x))


def count_products(prepared):
    return sum(node.target is torch.ops.aten.mul.Tensor for node in prepared.graph_module.graph.nodes)


def test_outliers_move_through_norms_and_gates_and_behind_a_curve(tmp_path):
    """To the last bit in float; the product behind GELU is the only node that is added, and only where it pays."""
    x = torch.randn(128, 5, 16)
    prepared, data = prepare(Block(), x)
    found = equalize(prepared, data)
    assert_same_float(prepared, found, data)
    assert find_changed(prepared, found) == set(float_weights(prepared))
    assert measure_error(found, data) < 0.02 * measure_error(prepared, data)
    assert count_products(found) == count_products(prepared) + 1
    bits = {site.name: 8 for site in prepared.inventory.sites}
    quantized = infoq_fx.convert(found, infoq_fx.Allocation(bits=bits))
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    assert infoq_fx.verify_onnx(path, quantized, x).is_sound
    plain, _ = prepare(Block(outliers=False), x)
    assert count_products(equalize(plain, data)) == count_products(plain)
    both = recover_accuracy(prepared, bits, data, [STEP, SecondOrderRounding()], progress=False)
    assert both.recovered_by[0] == STEP.name

"""Channels and inputs of zeros: what such a channel computes is its bias, which has to be stored well."""

import math

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import infoq_fx
from infoq_fx.core.data import read_data
from infoq_fx.finetuning import training_loop
from infoq_fx.finetuning.retraining import to_quantized, to_trainable
from infoq_fx.finetuning.trainable import LearnedStepQuantizer
from infoq_fx.graph.layers import LAYER_OPS, read_tensor
from infoq_fx.graph.model_inputs import fit_data
from infoq_fx.graph.passes.quantize_biases import fit_weight_scale
from infoq_fx.quantization.custom_ops import dequantize_op, quantize_dequantize_op
from infoq_fx.quantization.histogram import significant_bits_of
from infoq_fx.recovery.step import StepContext
from infoq_fx.recovery.steps.block_reconstruction import BlockReconstruction
from infoq_fx.recovery.steps.second_order_rounding import SecondOrderRounding

pytestmark = pytest.mark.slow  # of features that few models meet

DEAD = 4

LAYERS = {
    "conv": (lambda: nn.Conv2d(3, 8, 3, padding=1), 0),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2), 0),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), 0),
    "transposed": (lambda: nn.ConvTranspose2d(3, 8, 2, stride=2), 1),
    "transposed in groups": (lambda: nn.ConvTranspose2d(4, 8, 2, groups=2), 1),
    "linear": (lambda: nn.Linear(12, 8), 0),
}
QUICK = {"linear"}
KINDS = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in LAYERS]


def clear(layer, axis):
    """Zeros in the first channels, and small biases of all channels."""
    with torch.no_grad():
        layer.weight.movedim(axis, 0)[:DEAD] = 0
        layer.bias.copy_(torch.linspace(0.011, 0.45, 8) * torch.tensor([1.0, -1.0] * 4))
    return layer


def inputs_of(layer, scale=255.0, count=32):
    shape = (layer.in_features,) if isinstance(layer, nn.Linear) else (layer.in_channels, 5, 5)
    return torch.rand(count, *shape) * scale


def quantize(model, data, bits, **options):
    return infoq_fx.quantize(model, float(bits), calibration_data=data, bits=bits, progress=False, **options)


def decibels(wanted, found):
    noise = float((wanted - found).double().square().sum())
    return 10 * math.log10(float(wanted.double().square().sum()) / noise) if noise else math.inf


def stored_biases(quantized):
    """Value, integers and scale of every int32 bias, with the scale of its layer's input and weight."""
    for node in quantized.graph.nodes:
        op = LAYER_OPS.get(node.target)
        bias = None if op is None else op.bias_of(node)
        if bias is not None and bias.target is dequantize_op:
            integers, unit = (read_tensor(quantized, operand) for operand in bias.all_input_nodes)
            weight = read_tensor(quantized, node.args[op.weight].args[1])
            yield dequantize_op(integers, unit, *bias.args[2:]), integers, unit, node.args[op.source].args[1], weight


def run_file(quantized, x, path, level):
    infoq_fx.export_onnx(quantized, path)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(found)


@pytest.mark.parametrize("recovery", ["none", pytest.param("fast", marks=pytest.mark.slow)])
@pytest.mark.parametrize("bits", [2, pytest.param(4, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_channel_of_zeros_is_its_bias(kind, bits, recovery, tmp_path):
    make, axis = LAYERS[kind]
    layer = clear(make(), axis)
    x = inputs_of(layer)
    quantized = quantize(layer, x, bits, recovery=recovery)
    with torch.no_grad():
        wanted, found = layer(x), quantized(x)
    own = wanted.movedim(1, 0).flatten(1)
    dead = (own == own[:, :1]).all(1)
    assert dead.sum() >= DEAD
    assert decibels(wanted[:, dead], found[:, dead]) > 90
    for _, integers, unit, input_scale, scale in stored_biases(quantized):
        assert torch.equal(unit, scale * input_scale)
        assert (integers[dead].abs() >= 1 << 16).all()
        assert (integers[dead].abs() < 1 << 21).all()
        assert {significant_bits_of(float(s)) for s in scale[dead]} == {1}
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        of_file = run_file(quantized, x, tmp_path / "model.onnx", getattr(onnxruntime.GraphOptimizationLevel, level))
        assert decibels(found[:, dead], of_file[:, dead]) > 110
        assert np.isfinite(of_file.numpy()).all()


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_zeros_is_its_bias(kind, bits):
    make, _ = LAYERS[kind]
    layer = make()
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.mul_(1e-3)
    x = inputs_of(layer)
    with torch.no_grad():
        assert decibels(layer(x), quantize(layer, x, bits)(x)) > 90


class DeadReLU(nn.Module):
    """A layer whose input is all zeros: behind a ReLU that lets nothing through."""

    def __init__(self, kind):
        super().__init__()
        make, axis = LAYERS[kind]
        self.second = make()
        inner = inputs_of(self.second).shape[1]
        flat = isinstance(self.second, nn.Linear)
        self.first = nn.Linear(6, inner) if flat else nn.Conv2d(2, inner, 3, padding=1)
        nn.init.constant_(self.first.bias, -50.0)
        with torch.no_grad():
            self.second.weight.movedim(axis, 0)[0] = 0
            self.second.weight.movedim(axis, 0)[1] *= 1e-3

    def forward(self, x):
        return self.second(self.first(x).relu())

    def make_data(self):
        return torch.randn(32, 6) if isinstance(self.first, nn.Linear) else torch.randn(32, 2, 5, 5)


@pytest.mark.parametrize("bits", [2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_whose_input_is_zeros_is_its_bias(kind, bits, tmp_path):
    model = DeadReLU(kind)
    x = model.make_data()
    quantized = quantize(model, x, bits)
    with torch.no_grad():
        wanted, found = model(x), quantized(x)
    assert decibels(wanted, found) > 90
    for node in quantized.graph.nodes:
        if node.target is quantize_dequantize_op:
            assert significant_bits_of(node.args[1]) <= 5
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        of_file = run_file(quantized, x, tmp_path / "model.onnx", getattr(onnxruntime.GraphOptimizationLevel, level))
        assert decibels(wanted, of_file) > 90


def test_an_input_of_zeros_that_no_layer_reads():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, left, right):
            return self.layer(left) + right

    model, left, right = Sum(), torch.randn(32, 4), torch.zeros(32, 4)
    quantized = infoq_fx.quantize(model, 8.0, calibration_data={"left": left, "right": right}, progress=False)
    with torch.no_grad():
        assert decibels(model(left, right), quantized(left, right)) > 30


@pytest.mark.slow
def test_embeddings_with_features_of_zeros():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 3)
            with torch.no_grad():
                self.table.weight[:, :4] = 0
                self.head.weight[0] = 0

        def forward(self, tokens):
            return self.head(self.table(tokens).mean(1))

    model, tokens = Tokens(), torch.randint(0, 9, (32, 5))
    quantized = quantize(model, tokens, 8)
    with torch.no_grad():
        assert decibels(model(tokens), quantized(tokens)) > 30
        assert decibels(model(tokens)[:, :1], quantized(tokens)[:, :1]) > 90


def test_units_of_a_bias_stay_normal_numbers():
    scale = fit_weight_scale(torch.tensor([1e-3, 1e-3]), [(torch.tensor([0.1, 0.0]), 1.2e-38)])
    assert (scale * 1.2e-38 >= torch.finfo(torch.float32).tiny).all()
    assert scale.isfinite().all()


def test_layers_that_share_a_channel_of_zeros_suit_all_their_biases():
    zero, scale = torch.tensor([True, False]), torch.tensor([0.25, 0.25])
    biases = [(torch.tensor([1e-3, 1e-3]), 0.5), (torch.tensor([2.0, 2.0]), 1.0), (torch.tensor([0.0, 1.0]), 1.0)]
    found = fit_weight_scale(scale, biases, zero)
    assert found[1] == 0.25
    for bias, input_scale in biases[:2]:
        assert 1 << 16 <= float(bias[0] / (found[0] * input_scale)) <= 1 << 30
    unused = fit_weight_scale(scale, [(torch.zeros(2), 1.0)], zero)
    assert torch.equal(unused, scale)


def two_layers():
    model = nn.Sequential(clear(nn.Conv2d(3, 8, 3, padding=1), 0), nn.ReLU(), nn.Flatten(), nn.Linear(200, 4))
    return model, torch.rand(40, 3, 5, 5) * 255


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("step", [SecondOrderRounding(), BlockReconstruction(epochs=2, samples=32)])
def test_recovery_keeps_channels_of_zeros_and_rounds_their_biases_as_conversion_does(step, bits):
    model, x = two_layers()
    prepared = infoq_fx.prepare(model, x, bits=(bits, 8))
    chosen = {site.name: bits if site.kind == "weight" else 8 for site in prepared.inventory.sites}
    found = step.recover(prepared, chosen, fit_data(prepared, read_data(x)), StepContext(batch_size=16))
    assert not read_tensor(found.graph_module, "0.weight")[:DEAD].any()
    bias = read_tensor(found.graph_module, "0.bias")
    torch.testing.assert_close(bias[:DEAD], read_tensor(prepared.graph_module, "0.bias")[:DEAD], rtol=0.05, atol=0)
    stored, *_ = next(stored_biases(infoq_fx.convert(found, infoq_fx.Allocation(bits=chosen))))
    torch.testing.assert_close(stored[:DEAD], bias[:DEAD], rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [2, 4])
def test_finetuning_starts_from_the_same_model_and_moves_channels_of_zeros_by_small_steps(bits):
    model, x = two_layers()
    quantized = quantize(model, x, bits)
    trainable = to_trainable(quantized)
    with torch.no_grad():
        before = quantized(x)
        torch.testing.assert_close(trainable(x), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
        again = to_quantized(trainable)
        torch.testing.assert_close(again(x), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    names = [name for name, _ in trainable.named_parameters()]
    reach = training_loop.list_learned(trainable, 1.0)[names.index("0.weight")].reach
    assert reach[:DEAD].max() <= reach[DEAD:].max()
    steps = {m.site.name: m.scale for m in trainable.modules() if isinstance(m, LearnedStepQuantizer)}
    assert steps["0.weight"][:DEAD].max() < 1e-2
    better = infoq_fx.finetune(quantized, x, epochs=1, progress=False)
    with torch.no_grad():
        assert better(x).isfinite().all()

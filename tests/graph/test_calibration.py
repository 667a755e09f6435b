"""Factors move between activations and weights without changing outputs; activation scales become powers of two."""

import copy
import functools

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import ResidualNet, randomise_norms
from torch import nn
from torch.nn import functional

import infoq_fx
from infoq_fx.graph.calibration import weight_digits
from infoq_fx.graph.passes.scale_equalization import equalize_scales, find_scale_groups
from infoq_fx.quantization.histogram import Histogram, find_activation_scale, significant_bits_of
from infoq_fx.types import QuantSpec


class Bottleneck(nn.Module):
    """All that integer kernels know: ReLU6, depthwise, a residual addition of values of both signs, pooling."""

    def __init__(self):
        super().__init__()
        self.stem, self.expand = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 24, 1)
        self.depthwise, self.project = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 8, 1, bias=False)
        self.last, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 10)
        with torch.no_grad():
            self.expand.weight.mul_(20)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(functional.relu6(self.depthwise(functional.relu6(self.expand(x)))))
        small = functional.max_pool2d(x, 2)
        joined = torch.cat([functional.pad(small, [0, 0, 0, 0, 4, 4])[:, :8], functional.avg_pool2d(x, 2)], 1)
        return self.head(functional.relu(self.last(joined)).mean((2, 3)))


class Branches(nn.Module):
    """Operations that let no factor through, and layers that cannot take one."""

    def __init__(self):
        super().__init__()
        self.tied, self.gated, self.smooth = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.free, self.padded, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = functional.relu(self.tied(functional.relu(self.tied(x))))
        x = functional.relu(self.gated(x) * x.sigmoid())
        x = functional.gelu(self.smooth(x))
        x = functional.relu(self.free(x))
        return self.head(functional.pad(self.padded(x), [1, -1], value=1.0))


def prepared_of(net, x, **options):
    return infoq_fx.prepare(net.eval(), x, **{"bits": (3, 4, 8), **options})


def values_of(graph_module, x):
    """What every node of a graph makes of ``x``."""
    kept = {}

    class Keeper(torch.fx.Interpreter):
        def run_node(self, n):
            kept[n] = super().run_node(n)
            return kept[n]

    with torch.no_grad():
        Keeper(graph_module).run(x)
    return kept


def is_power_of_two(scale):
    return significant_bits_of(float(scale)) == 1


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(0)
    return torch.randn(40, 3, 8, 8)


@pytest.fixture(scope="module")
def bottleneck(inputs):
    torch.manual_seed(0)
    return prepared_of(Bottleneck(), inputs)


def test_a_factor_reaches_as_far_as_operations_let_it_through(bottleneck):
    prepared = bottleneck
    groups = find_scale_groups(prepared.graph_module)
    nodes = {module.site.name: node for node, module in prepared.quantizer_nodes() if module.site.kind == "activation"}
    shared = {name: groups.get(node) for name, node in nodes.items()}
    assert shared.pop("stem.input") is None
    stream = {name for name, first in shared.items() if first is shared["expand.input"]}
    assert {"expand.input", "project.output", "last.input"} <= stream
    for name in ("depthwise.input", "project.input"):
        assert shared[name] is not None
        assert [other for other, first in shared.items() if first is shared[name]] == [name]


def test_operations_without_that_property_and_shared_weights_take_none(inputs):
    prepared = prepared_of(Branches(), torch.randn(20, 6))
    groups = find_scale_groups(prepared.graph_module)
    free = {m.site.name for node, m in prepared.quantizer_nodes() if node in groups and m.site.kind == "activation"}
    assert free == {"padded.input"}


@functools.cache
def bottleneck_of_float_activations():
    torch.manual_seed(0)
    return prepared_of(Bottleneck(), torch.randn(8, 3, 8, 8), activation_bits=None)


@pytest.mark.slow
@given(st.lists(st.floats(0.25, 4.0), min_size=8, max_size=8))
@settings(max_examples=15, deadline=None)
def test_moved_factors_multiply_the_activations_and_leave_the_outputs(found):
    prepared = copy.deepcopy(bottleneck_of_float_activations())
    x, module = torch.randn(3, 3, 8, 8), prepared.graph_module
    groups = find_scale_groups(module)
    firsts = list(dict.fromkeys(groups.values()))
    assert len(firsts) >= 4
    by_group = dict(zip(firsts, found, strict=False))
    factors = {node: by_group.get(first, 1.0) for node, first in groups.items()}
    bits = {m.site.name: m for _, m in prepared.quantizer_nodes()}
    for quantizer in bits.values():
        quantizer.calibrated_bits = ()  # as in float
    before = values_of(module, x)
    equalize_scales(module, factors)
    module.recompile()
    after = values_of(module, x)
    for node, value in before.items():
        if isinstance(value, torch.Tensor) and node.op == "call_function":
            expected = value * factors.get(node, 1.0)
            torch.testing.assert_close(after[node], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_free_scales_are_powers_of_two_with_even_zero_points(bottleneck):
    prepared = bottleneck
    groups, quantizers = find_scale_groups(prepared.graph_module), dict(prepared.quantizer_nodes())
    for node, module in quantizers.items():
        if module.site.kind != "activation" or node not in groups:
            continue
        for bits in module.calibrated_bits:
            qparams = module.qparams_at(bits)
            assert is_power_of_two(qparams.scale), module.site.name
            zero_point = int(qparams.zero_point)
            assert zero_point % 2 == 0 or zero_point == qparams.spec.quant_max


def test_a_tensor_with_a_factor_of_its_own_gets_its_best_scale(inputs):
    values = functional.relu(torch.randn(50, 100, generator=torch.Generator().manual_seed(3))) * 0.37
    histogram, spec = Histogram(), QuantSpec(bits=8, symmetric=False)
    histogram.update(values)
    scale = find_activation_scale(histogram, spec)
    factor = 2.0 ** round(np.log2(scale)) / scale
    qparams = infoq_fx.quantization.histogram.choose_activation_qparams(histogram, spec, factor=factor)
    assert float(qparams.scale) == 2.0 ** round(np.log2(scale))
    error = (infoq_fx.quantization.numerics.fake_quantize(values * factor, qparams) / factor - values).square().mean()
    plain = infoq_fx.quantization.histogram.choose_activation_qparams(histogram, spec)
    other = (infoq_fx.quantization.numerics.fake_quantize(values, plain) - values).square().mean()
    assert float(error) <= 1.01 * float(other)
    assert scale <= histogram.maximum / 255


def test_weights_have_the_digits_that_their_inputs_leave():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(600, 600), nn.Linear(600, 4)

        def forward(self, x):
            return self.second(functional.relu(self.first(x)))

    torch.manual_seed(6)
    prepared = prepared_of(Wide(), torch.randn(30, 600))
    nodes = {module.site.name: node for node, module in prepared.quantizer_nodes()}
    quantizers = {module.site.name: module for _, module in prepared.quantizer_nodes()}
    of_input = max(significant_bits_of(quantizers["first.input"].qparams_at(8).scale.item()), 1)
    assert weight_digits(prepared, nodes["first.weight"], 8) == 2 + 4 - of_input
    assert weight_digits(prepared, nodes["second.weight"], 8) == 5
    assert max(significant_bits_of(float(s)) for s in quantizers["second.weight"].qparams_at(8).scale) > 2


@pytest.mark.slow
@pytest.mark.parametrize("gain", [0.5, 1.2])
def test_a_clamp_is_no_tighter_than_the_integers(inputs, gain):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.last, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
            self.clamp = nn.ReLU6()  # a module is observed, between the clamp and its quantizer
            with torch.no_grad():
                self.stem.weight.mul_(9)
                self.last.weight.mul_(gain)

        def forward(self, x):
            return self.head(self.clamp(self.last(functional.relu6(self.stem(x)))).mean((2, 3)))

    torch.manual_seed(7)
    quantized = infoq_fx.quantize(Pooled().eval(), 6, calibration_data=inputs, recovery="none", progress=False)
    clamps = [node for node in quantized.graph.nodes if node.target is torch.ops.aten.hardtanh.default]
    assert len(clamps) == 2
    for clamp in clamps:
        (quantizer,) = clamp.users
        _, scale, zero_point, *_ = quantizer.args
        assert zero_point == 0
        assert 255 * scale <= clamp.args[2]


@pytest.mark.parametrize("budget", [4.0, pytest.param(8.0, marks=pytest.mark.slow)])
def test_integer_kernels_give_the_bits_of_torch(inputs, budget, tmp_path):
    torch.manual_seed(4)
    quantized = infoq_fx.quantize(Bottleneck().eval(), budget, calibration_data=inputs, bits=(3, 4, 8), progress=False)
    path = infoq_fx.export_onnx(quantized, tmp_path / "net.onnx")
    x = torch.randn(60, 3, 8, 8)
    with torch.no_grad():
        expected = quantized(x).numpy()
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        options.optimized_model_filepath = str(tmp_path / f"{level}.onnx")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        assert np.array_equal(session.run(None, {"x": x.numpy()})[0], expected), level


def test_a_residual_network_keeps_its_outputs():
    torch.manual_seed(5)
    net, x = randomise_norms(ResidualNet()).eval(), torch.randn(30, 1, 8, 8)
    prepared = infoq_fx.prepare(net, x, bits=8, activation_bits=None)
    for _, module in prepared.quantizer_nodes():
        module.calibrated_bits = ()
    with torch.no_grad():
        torch.testing.assert_close(prepared.graph_module(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("scale", "digits"), [(1.0, 1), (0.375, 2), (5.0, 3), (2.0**-126, 1), (0.1, 24)])
def test_significant_bits(scale, digits):
    assert significant_bits_of(float(np.float32(scale))) == digits


@pytest.mark.slow
@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_threads_change_no_scale(threads):
    torch.manual_seed(0)
    model, images = randomise_norms(ResidualNet()).eval(), torch.randn(200, 1, 8, 8)
    expected = infoq_fx.prepare(model, images)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = infoq_fx.prepare(model, images)
    finally:
        torch.set_num_threads(before)
    for (_, one), (_, other) in zip(expected.quantizer_nodes(), found.quantizer_nodes(), strict=True):
        for bits in one.calibrated_bits:
            assert torch.equal(one.qparams_at(bits).scale, other.qparams_at(bits).scale)
            assert torch.equal(one.qparams_at(bits).zero_point, other.qparams_at(bits).zero_point)

"""Layers over integers must equal fake quantized float ones; skipped on processors without support."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import ResidualNet, randomise_norms
from torch import fx, nn
from torch.nn import functional

import infoq_fx
from infoq_fx.quantization import numerics
from infoq_fx.quantization.weight_qparams import choose_weight_qparams
from infoq_fx.runtime import integer_convolution
from infoq_fx.runtime.integer_convolution import (
    IntegerWeight,
    QuantizedTensor,
    can_convolve_integers,
    can_multiply_integers,
    compute_layer,
    find_integer_nodes,
    quantize_activation,
    quantize_weight,
)
from infoq_fx.runtime.interpreter import SiteInterpreter
from infoq_fx.runtime.run_plan import plan_perturbed_run, plan_whole_run
from infoq_fx.types import QParams, QuantSpec

exact_here = pytest.mark.skipif(not can_convolve_integers(), reason="8-bit products saturate on this processor")


def conv_node(*options):
    graph = fx.Graph()
    return graph.call_function(
        torch.ops.aten.conv2d.default, (graph.placeholder("x"), graph.placeholder("w"), *options)
    )


@exact_here
@given(
    groups=st.sampled_from([1, 2, 8]),
    stride=st.sampled_from([1, 2, [2, 1]]),
    padding=st.sampled_from([0, 1, [0, 2]]),
    dilation=st.integers(1, 2),
    zero_point=st.sampled_from([0, 7, 255]),
    weight_bits=st.sampled_from([2, 5, 8]),
    has_bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_integers_give_what_floats_give(groups, stride, padding, dilation, zero_point, weight_bits, has_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 8, 9, 7, generator=generator) * 5
    weight, bias = torch.randn(16, 8 // groups, 3, 3, generator=generator), torch.randn(16, generator=generator)
    of_x = QParams(
        QuantSpec(bits=8, symmetric=False), torch.tensor(0.046875), torch.tensor(zero_point, dtype=torch.int32)
    )
    of_weight = choose_weight_qparams(weight, QuantSpec(bits=weight_bits, symmetric=True, channel_axis=0))
    bias = bias if has_bias else None
    node = conv_node(None, stride, padding, dilation, groups)
    with torch.inference_mode():
        found = compute_layer(node, quantize_activation(x, of_x), quantize_weight(weight, of_weight), bias)
        operands = numerics.fake_quantize(x, of_x), numerics.fake_quantize(weight, of_weight)
        expected = functional.conv2d(*operands, bias, stride, padding, dilation, groups)
    assert torch.equal(found, expected)


@exact_here
@given(
    shape=st.sampled_from([(3, 40), (2, 7, 40), (2, 3, 5, 40)]),
    zero_point=st.sampled_from([0, 7, 255]),
    weight_bits=st.sampled_from([2, 5, 8]),
    has_bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_linear_layers_over_integers_give_what_floats_give(shape, zero_point, weight_bits, has_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(size, generator=generator) for size in (shape, (24, 40), (24,)))
    spec = QuantSpec(bits=8, symmetric=False)
    of_x = QParams(spec, torch.tensor(0.046875), torch.tensor(zero_point, dtype=torch.int32))
    of_weight = choose_weight_qparams(weight, QuantSpec(bits=weight_bits, symmetric=True, channel_axis=0))
    bias, graph = bias if has_bias else None, fx.Graph()
    node = graph.call_function(torch.ops.aten.linear.default, (graph.placeholder("x"), graph.placeholder("w")))
    with torch.inference_mode():
        found = compute_layer(node, quantize_activation(x, of_x), quantize_weight(weight, of_weight), bias)
        operands = numerics.fake_quantize(x, of_x), numerics.fake_quantize(weight, of_weight)
        expected = functional.linear(*operands, bias)
    assert torch.equal(found, expected)


@exact_here
@pytest.mark.parametrize(("channels", "size", "samples"), [(32, 4, 64), (16, 8, 4), (3, 16, 4)])
def test_patches_are_right_where_onednn_is_not(channels, size, samples):
    """Convolutions whose stride is their kernel: oneDNN with AMX reads beyond a row."""
    torch.manual_seed(0)
    graph = fx.Graph()
    operands = graph.placeholder("x"), graph.placeholder("weight"), None, [size, size]
    node = graph.call_function(torch.ops.aten.conv2d.default, operands)
    weight = IntegerWeight(torch.randint(-128, 128, (10, channels, size, size)).to(torch.int8), torch.full((10,), 0.5))
    for _ in range(2):
        x = QuantizedTensor(torch.randint(0, 256, (samples, channels, size, 2 * size), dtype=torch.uint8), 0.25, 3)
        with torch.inference_mode():
            found = compute_layer(node, x, weight, None)
        expected = functional.conv2d((x.q.double() - 3) / 4, weight.q.double() / 2, stride=size)
        assert torch.equal(found.double(), expected)


class Mixed(nn.Module):
    """One input for an integer convolution and a 1-D convolution, a linear layer, and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.both = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.rows, self.linear, self.up = nn.Conv1d(4, 4, 1), nn.Linear(6, 6), nn.ConvTranspose2d(4, 2, 2)

    def forward(self, x):
        x = self.first(x).relu()
        x = self.both(x) + self.rows(x.flatten(2)).reshape(x.shape)
        return self.up(self.linear(x.relu())).flatten(1)


@exact_here
def test_only_layers_whose_operands_serve_nothing_else_are_taken():
    prepared = infoq_fx.prepare(Mixed().eval(), torch.randn(8, 3, 8, 8))
    nodes = find_integer_nodes(prepared)
    layers = {node.target for node in nodes if node.op == "call_function"}
    assert layers == {torch.ops.aten.conv2d.default, torch.ops.aten.linear.default}
    for node, quantizer in prepared.quantizer_nodes():
        if node in nodes:
            assert all(user in nodes for user in node.users), quantizer.site.name
    assert any(q.site.name == "first.weight" for node, q in prepared.quantizer_nodes() if node in nodes)


@pytest.mark.slow
@exact_here
@pytest.mark.parametrize("build", [lambda: randomise_norms(ResidualNet()), Mixed], ids=["residual", "mixed"])
def test_runs_over_integers_give_the_same_values(build):
    torch.manual_seed(3)
    images = torch.randn(32, 1, 8, 8) if "Residual" in str(type(model := build())) else torch.randn(32, 3, 8, 8)
    prepared = infoq_fx.prepare(model.eval(), images, activation_bits=(2, 4, 8))
    output, inputs = prepared.observer_nodes()["output"], {prepared.input_names[0]: images}
    for site in (site for site in prepared.inventory.sites if site.is_searched):
        for bits in site.bits:
            seen = []
            for nodes in (frozenset(), find_integer_nodes(prepared)):
                plan = plan_perturbed_run(prepared, site.name, [output], nodes)
                interpreter = SiteInterpreter(prepared, nodes)
                known = interpreter.run_plan(plan_whole_run(prepared, plan.boundary, nodes), {}, inputs=inputs)
                found = {}
                interpreter.run_plan(plan, known, bits={site.name: bits}, read=found.__setitem__)
                seen.append(found[output])
            assert torch.equal(*seen), (site.name, bits)


@pytest.mark.slow
@exact_here
def test_scores_do_not_depend_on_it(monkeypatch):
    torch.manual_seed(1)
    data = torch.randn(96, 1, 8, 8)
    prepared = infoq_fx.prepare(randomise_norms(ResidualNet()).eval(), data, bits=(2, 8))
    options = {"criterion": infoq_fx.InfoQ(slices=16), "progress": False}
    with_integers = infoq_fx.score(prepared, data, **options)
    monkeypatch.setattr(integer_convolution, "can_convolve_integers", lambda: False)
    assert not find_integer_nodes(prepared)
    assert infoq_fx.score(prepared, data, **options) == with_integers


def test_a_processor_that_is_wrong_is_found_out(monkeypatch):
    def saturating(node, x, weight, bias):
        return torch.full((1, 32, 4, 4), 32767.0)

    for compute in (saturating, lambda *_: torch.ops.onednn.no_such_operation):
        monkeypatch.setattr(integer_convolution, "_convolve_integers", compute)
        monkeypatch.setattr(integer_convolution, "_multiply_integers", compute)
        assert not can_convolve_integers.__wrapped__()
        assert not can_multiply_integers.__wrapped__()

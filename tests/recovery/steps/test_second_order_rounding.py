"""The step that rounds all weights to second order."""

import pytest
import torch
from logits import compute_logits
from recovered import CONTEXT, nats, prepare
from torch import nn

import infoq_fx
from infoq_fx.graph.layers import read_tensor
from infoq_fx.recovery.parameters import set_parameter
from infoq_fx.recovery.steps.second_order_rounding import SecondOrderRounding, _descend_to_least


def test_second_order_rounding_is_what_conversion_stores(residual):
    prepared, data, bits = residual
    recovered = SecondOrderRounding().recover(prepared, bits, data, CONTEXT)
    quantized = infoq_fx.convert(recovered, infoq_fx.Allocation(bits=bits))
    stored = {k: v for k, v in quantized.state_dict().items() if v.dtype == torch.int8}
    assert set(stored) == {name for name in bits if name.endswith("weight")}
    for name, q in stored.items():
        assert len(q.unique()) <= 1 << bits[name]
        scale = quantized.state_dict()[f"{name}_scale"].reshape(-1, *[1] * (q.ndim - 1))
        assert torch.allclose(q * scale, read_tensor(recovered.graph_module, name), atol=1e-6)
    x = data.inputs["x"]
    with torch.no_grad():  # biases, too, are already what conversion stores
        assert torch.allclose(quantized(x), compute_logits(recovered, data, bits), atol=1e-5)
    # The integers are the second-order ones, not the float weights rounded to nearest.
    plain = infoq_fx.convert(prepared, infoq_fx.Allocation(bits=bits)).state_dict()
    assert any(not torch.equal(plain[name], stored[name]) for name in stored)


def test_inputs_whose_squares_overflow_are_recovered_around():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = 1e25 * torch.randn(64, 8)
    with torch.no_grad():
        model[2].weight /= 1e25
        expected = model(x)
        found = infoq_fx.quantize(model, 4.0, calibration_data=x, progress=False)(x)
    assert float((found - expected).abs().max()) < 0.2 * float(expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("width", [2, 5, 6])
def test_what_activations_of_six_bits_cost_is_answered_only_for_the_float_model(width):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    data = torch.randn(64, 2, 8, 8)
    prepared, data = prepare(model, data, bits=(8,), activation_bits=(width, 8))
    with torch.no_grad():  # weights that 8 bits hold exactly
        for node, quantizer in prepared.quantizer_nodes():
            if quantizer.site.kind == "weight":
                path = str(node.all_input_nodes[0].target)
                set_parameter(prepared, path, quantizer.quantize_at(read_tensor(prepared.graph_module, path), 8))
    bits = {site.name: site.bits[0] for site in prepared.inventory.sites}
    moved = {}
    for reference in ("float_weights", "float_model"):
        recovered = SecondOrderRounding(reference=reference).recover(prepared, bits, data, CONTEXT)
        moved[reference] = max(
            float((read_tensor(recovered.graph_module, path) - read_tensor(prepared.graph_module, path)).abs().max())
            for path in ("0.bias", "2.bias", "4.bias")
        )
    alone = SecondOrderRounding(compensate=False).recover(prepared, bits, data, CONTEXT)
    kept = max(
        float((read_tensor(alone.graph_module, path) - read_tensor(prepared.graph_module, path)).abs().max())
        for path in ("0.bias", "2.bias", "4.bias")
    )
    assert kept < 0.3 * moved["float_model"]
    assert moved["float_model"] > 0.001
    if width < 6:
        assert moved["float_weights"] > 0.5 * moved["float_model"]  # the first input has 8 bits
    else:
        assert moved["float_weights"] < 0.3 * moved["float_model"]


@pytest.mark.slow
def test_second_order_rounding_takes_every_kind_of_layer(branches):
    prepared, data = branches
    bits = {site.name: 4 if site.kind == "weight" else 8 for site in prepared.inventory.sites}
    bits["transposed.weight"] = 8
    recovered = SecondOrderRounding().recover(prepared, bits, data, CONTEXT)
    assert nats(recovered, data, bits) < 0.6 * nats(prepared, data, bits)
    assert torch.equal(
        read_tensor(recovered.graph_module, "transposed.weight"),
        read_tensor(prepared.graph_module, "transposed.weight"),
    )
    for name in ("first", "grouped", "depthwise", "tokens", "sequence", "head"):
        weight = f"{name}.weight"
        assert not torch.equal(
            read_tensor(recovered.graph_module, weight), read_tensor(prepared.graph_module, weight)
        ), weight


def test_dead_inputs_do_no_harm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        model[0].weight[1:3] = 0
        model[0].bias[1:3] = torch.tensor([-1.0, 0.0])
    prepared, data = prepare(model, torch.randn(40, 2, 8, 8), bits=(3, 8))
    bits = {site.name: 3 if site.kind == "weight" else 8 for site in prepared.inventory.sites}
    recovered = SecondOrderRounding().recover(prepared, bits, data, CONTEXT)
    assert all(bool(value.isfinite().all()) for value in recovered.graph_module.state_dict().values())
    assert nats(recovered, data, bits) < nats(prepared, data, bits)


@pytest.mark.parametrize("least", range(8))
def test_a_single_minimum_is_found_from_the_middle(least):
    tried = []

    def measure(value):
        tried.append(value)
        return abs(value - least)

    assert _descend_to_least(range(8), measure) == least
    assert len(tried) == len(set(tried)) <= 3 + abs(least - 3)


@pytest.mark.parametrize("size", [1e-5, 2e18])
def test_inputs_of_any_size_are_rounded_to_second_order(size):
    """Moments that float32 cannot hold, times a ridge, stay in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.ReLU(), nn.Linear(16, 6, bias=False)).eval()
    x, errors = torch.randn(128, 12), []
    for data in (x, size * x):
        prepared = infoq_fx.prepare(model, data, levels="uniform")
        bits = {site.name: 3 if site.kind == "weight" else 8 for site in prepared.inventory.sites}
        allocation = infoq_fx.Allocation(bits=bits)
        quantized = infoq_fx.convert(infoq_fx.recover(prepared, allocation, data, progress=False), allocation)
        with torch.no_grad():
            wanted = model(data).double()
            errors.append(float((quantized(data) - wanted).square().sum() / wanted.square().sum()))
    assert errors[1] < 2 * errors[0]

"""Quantization against onnxruntime, gradients against autograd."""

from __future__ import annotations

import math

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from samples import activation_spec, weight_spec

from infoq_fx.quantization.numerics import (
    dequantize,
    fake_quantize,
    fake_quantize_ste,
    quantize,
)
from infoq_fx.quantization.weight_qparams import choose_weight_qparams
from infoq_fx.types import QParams


def affine(scale: float, zero_point: int, bits: int = 8) -> QParams:
    return QParams(activation_spec(bits), torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32))


def adversarial_values(scale: float) -> torch.Tensor:
    """Exact ties, their neighbours, both zeros, both ends, and noise."""
    ties = (torch.arange(-300, 300) + 0.5) * scale
    around = [torch.nextafter(ties, torch.tensor(math.inf)), torch.nextafter(ties, torch.tensor(-math.inf))]
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e38, -1e38, 1e-45, -1e-45])
    noise = torch.randn(2001, generator=torch.Generator().manual_seed(0)) * 90 * scale
    return torch.cat([ties, *around, torch.arange(-300, 300) * scale, special, noise])


def bits_of(x: torch.Tensor) -> list[int]:
    return x.contiguous().view(torch.int32).flatten().tolist()


QPARAMS = {
    "power of two": affine(0.25, 120),
    "one-sided": affine(0.1, 0),
    "negative": affine(0.037, 255),
    "3 bits": affine(0.037, 3, bits=3),
    "symmetric": QParams(weight_spec(5, None), torch.tensor(0.3), torch.tensor(0, dtype=torch.int32)),
}


@pytest.mark.parametrize("qparams", QPARAMS.values(), ids=QPARAMS)
def test_quantize_follows_the_rule_in_numpy(qparams: QParams) -> None:
    x = adversarial_values(float(qparams.scale))
    with np.errstate(over="ignore"):
        level = np.rint(x.numpy() / np.float32(qparams.scale)) + np.float32(qparams.zero_point)
    q = quantize(x, qparams)
    assert q.dtype == (torch.int8 if qparams.spec.symmetric else torch.uint8)
    assert q.tolist() == np.clip(level, qparams.spec.quant_min, qparams.spec.quant_max).tolist()


@pytest.mark.parametrize("qparams", QPARAMS.values(), ids=QPARAMS)
def test_fake_quantize_is_bit_for_bit_both_steps(qparams: QParams) -> None:
    x = adversarial_values(float(qparams.scale))
    before = x.clone()
    assert bits_of(fake_quantize(x, qparams)) == bits_of(dequantize(quantize(x, qparams), qparams))
    assert torch.equal(x, before)


def test_fake_quantize_per_channel_is_bit_for_bit_both_steps() -> None:
    x = torch.stack([adversarial_values(s) for s in (0.25, 0.1, 3e-3)], 1)
    for axis, values in ((1, x), (0, x.T), (-1, x)):
        scale, zero_point = torch.tensor([0.25, 0.1, 3e-3]), torch.zeros(3, dtype=torch.int32)
        qparams = QParams(weight_spec(4, axis), scale, zero_point)
        assert bits_of(fake_quantize(values, qparams)) == bits_of(dequantize(quantize(values, qparams), qparams))
        assert quantize(values, qparams).shape == values.shape


@settings(max_examples=100, deadline=None)
@given(
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.floats(2.0**-60, 2.0**60, width=32),
    st.integers(0, 15),
    st.integers(4, 8),
)
def test_fake_quantize_equals_both_steps_anywhere(value: float, scale: float, zero: int, bits: int) -> None:
    x, qparams = torch.tensor([value, -value, 0.5 * value]), affine(scale, zero, bits)
    assert bits_of(fake_quantize(x, qparams)) == bits_of(dequantize(quantize(x, qparams), qparams))


def test_nan_stays_nan_and_becomes_the_zero_point() -> None:
    x, qparams = torch.tensor([math.nan, 1.0]), affine(0.1, 7)
    assert fake_quantize(x, qparams).isnan().tolist() == [True, False]
    assert quantize(x, qparams).tolist() == [7, 17]


def run_qdq(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int) -> torch.Tensor:
    """QuantizeLinear then DequantizeLinear in onnxruntime, as they stand."""
    kind = TensorProto.INT8 if zero_point.dtype == torch.int8 else TensorProto.UINT8
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], axis=axis),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], axis=axis),
        ],
        "qdq",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(x.shape))],
        [
            helper.make_tensor("scale", TensorProto.FLOAT, list(scale.shape), scale.flatten().tolist()),
            helper.make_tensor("zero", kind, list(zero_point.shape), zero_point.flatten().tolist()),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("qparams", [QPARAMS[name] for name in ("power of two", "one-sided", "negative")])
def test_activation_agrees_with_onnxruntime(qparams: QParams) -> None:
    x = adversarial_values(float(qparams.scale))
    expected = run_qdq(x, qparams.scale, qparams.zero_point.to(torch.uint8), 0)
    assert bits_of(fake_quantize(x, qparams)) == bits_of(expected)


def test_weight_agrees_with_onnxruntime() -> None:
    weight = torch.randn(6, 8, 25, generator=torch.Generator().manual_seed(0))
    for axis in (0, 1):
        qparams = choose_weight_qparams(weight, weight_spec(8, axis))
        expected = run_qdq(weight, qparams.scale, qparams.zero_point.to(torch.int8), axis)
        assert bits_of(fake_quantize(weight, qparams)) == bits_of(expected)


def surrogate(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Eq. 3 and 5 by autograd: clamp, then a rounding that passes gradients."""
    clamped = torch.clamp(x / scale, (low - zero).to(x.dtype), (high - zero).to(x.dtype))
    return (clamped + (torch.round(clamped) - clamped).detach()) * scale


@pytest.mark.parametrize(
    ("zero_point", "channel_axis"),
    [([0], None), ([5], None), ([0, 0, 0], 0), ([0, 3, 9], 0)],
    ids=["symmetric", "affine", "per channel", "affine per channel"],
)
def test_ste_gradients_are_those_of_the_paper(zero_point: list[int], channel_axis: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (3 * torch.randn(3, 400, generator=generator)).requires_grad_()
    zero = torch.tensor(zero_point, dtype=torch.int32)
    scale = 0.1 + 0.3 * torch.rand(len(zero_point), generator=generator)
    shape: tuple[int, ...] = (3, 1)
    if channel_axis is None:
        zero, scale, shape = zero[0], scale[0], ()
    scale.requires_grad_()
    low, high = (-8, 7) if zero.sum() == 0 else (0, 15)
    upstream = torch.randn(3, 400, generator=generator)

    actual = fake_quantize_ste(x, scale, zero, low, high, channel_axis)
    grads = torch.autograd.grad(actual, (x, scale), upstream)
    expected = surrogate(x, scale.reshape(shape), zero.reshape(shape), low, high)
    expected_grads = torch.autograd.grad(expected, (x, scale), upstream)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(grads[0], expected_grads[0])
    torch.testing.assert_close(grads[1], expected_grads[1], rtol=1e-4, atol=1e-4)


def test_ste_closed_form_and_saturation_by_finite_differences() -> None:
    x, scale = torch.tensor([0.26, 5.0, -5.0, 1.75, -2.0], requires_grad=True), torch.tensor(0.25)
    scale.requires_grad_()
    y = fake_quantize_ste(x, scale, torch.tensor(0), -8, 7)
    assert y.tolist() == [0.25, 1.75, -2.0, 1.75, -2.0]
    rows = [torch.autograd.grad(y[i], (x, scale), retain_graph=True) for i in range(5)]
    # At the ends of the range themselves (the last two) the strict inequalities of Eq. 3 and 5 hold.
    assert torch.stack([row[0] for row in rows]).diagonal().tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    slopes = [float(row[1]) for row in rows]
    assert slopes == pytest.approx([1 - 0.26 / 0.25, 7.0, -8.0, 7.0, -8.0], abs=1e-6)
    # Saturated values move with the scale itself, so there the gradient is the true derivative.
    step = 2.0**-10
    ends = torch.tensor([5.0, -5.0])
    moved = [fake_quantize_ste(ends, torch.tensor(0.25 + d), torch.tensor(0), -8, 7) for d in (step, -step)]
    assert ((moved[0] - moved[1]) / (2 * step)).tolist() == [7.0, -8.0]


@pytest.mark.parametrize("qparams", QPARAMS.values(), ids=QPARAMS)
def test_ste_has_the_values_of_fake_quantize(qparams: QParams) -> None:
    x, spec = adversarial_values(float(qparams.scale)), qparams.spec
    actual = fake_quantize_ste(x, qparams.scale, qparams.zero_point, spec.quant_min, spec.quant_max)
    assert torch.equal(actual, fake_quantize(x, qparams))


def test_fake_quantize_accepts_trained_scales_and_other_dtypes() -> None:
    x = torch.randn(4, 5)
    qparams = affine(0.05, 100)
    trained = QParams(qparams.spec, qparams.scale.clone().requires_grad_(), qparams.zero_point)
    assert torch.equal(fake_quantize(x.requires_grad_(), trained), fake_quantize(x, qparams))
    assert fake_quantize(x.to(torch.bfloat16), qparams).dtype == torch.float32

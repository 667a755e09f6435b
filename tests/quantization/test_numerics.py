"""Qparams of weights against brute force, quantization against onnxruntime, gradients against autograd."""

from __future__ import annotations

import math

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from samples import BITS, activation_spec, histogram_of, short_scales

from infoq_fx.errors import OptionError, UnsupportedModelError
from infoq_fx.quantization.histogram import (
    Histogram,
    choose_activation_qparams,
    scale_significant_bits,
)
from infoq_fx.quantization.numerics import (
    choose_weight_qparams,
    dequantize,
    fake_quantize,
    fake_quantize_ste,
    quantize,
)
from infoq_fx.types import QParams, QuantSpec


def weight_spec(bits: int, channel_axis: int | None = 0) -> QuantSpec:
    return QuantSpec(bits=bits, symmetric=True, channel_axis=channel_axis)


def affine(scale: float, zero_point: int, bits: int = 8) -> QParams:
    return QParams(activation_spec(bits), torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32))


def errors_of(rows: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Squared errors [rows] of symmetric quantization, in float64, spelled out."""
    level = torch.clamp(torch.round(rows.double() / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (level * scale - rows.double()).square().sum(1)


def chosen_errors(rows: torch.Tensor, bits: int) -> torch.Tensor:
    return errors_of(rows, choose_weight_qparams(rows, weight_spec(bits)).scale[:, None].double(), bits)


def dense_errors(rows: torch.Tensor, bits: int, count: int = 2000) -> torch.Tensor:
    """The least errors over a dense grid of clip values up to 2.05 times the largest value."""
    clips = rows.double().abs().amax(1, keepdim=True) * torch.linspace(2.05 / count, 2.05, count).double()
    return torch.stack([errors_of(rows, c[:, None] / 2 ** (bits - 1), bits) for c in clips.T]).amin(0)


def short_errors(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """The least errors over all scales of few significant bits, far beyond both ends of what makes sense."""
    least = []
    for row in rows.split(1):
        largest = float(row.abs().max())
        scales = short_scales(
            largest / 2 ** (bits - 1) / 60,
            largest * 4.2 / 2 ** (bits - 1),
            scale_significant_bits(bits, True),
        )
        least.append(torch.stack([errors_of(row, torch.tensor(s).double(), bits) for s in scales]).amin(0))
    return torch.cat(least)


def weights(kind: str, rows: int, size: int) -> torch.Tensor:
    rng = np.random.default_rng([rows, size, len(kind)])
    values = {
        "gaussian": lambda: rng.standard_normal((rows, size)),
        "laplace": lambda: rng.laplace(size=(rows, size)),
        "uniform": lambda: rng.uniform(-0.4, 0.6, (rows, size)),
        "sparse": lambda: rng.standard_normal((rows, size)) * (rng.random((rows, size)) < 0.1 + (np.arange(size) == 0)),
        "outlier": lambda: rng.standard_normal((rows, size)) + 40 * (np.arange(size) == 0),
    }[kind]()
    return torch.from_numpy(values).float()


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "uniform", "sparse", "outlier"])
@pytest.mark.parametrize("size", [1, 9, 64, 600])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_weight_error_is_the_least_of_all_short_scales(kind: str, size: int, bits: int) -> None:
    rows = weights(kind, 4, size)
    assert (chosen_errors(rows, bits) <= short_errors(rows, bits) * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "uniform", "outlier"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_short_scales_cost_little(kind: str, bits: int) -> None:
    """The next longer short scale is at most 2**(1 - significant bits) off, the error at most its square."""
    rows = weights(kind, 4, 600)
    excess = (1 + 2.0 ** (1 - scale_significant_bits(bits, True))) ** 2
    assert (chosen_errors(rows, bits) <= dense_errors(rows, bits, 1000) * excess).all()


def test_long_channel_of_one_scale_has_the_least_error() -> None:
    row = weights("laplace", 1, 20_000)
    scale = choose_weight_qparams(row.reshape(20, 10, 100), weight_spec(3, None)).scale
    assert scale.shape == ()
    assert errors_of(row, scale.double(), 3) <= short_errors(row, 3) * (1 + 1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_scales_have_few_significant_bits(bits: int) -> None:
    scale = choose_weight_qparams(weights("gaussian", 50, 30), weight_spec(bits)).scale
    steps = torch.frexp(scale).mantissa * 2 ** scale_significant_bits(bits, is_weight=True)
    assert torch.equal(steps, steps.round())
    histogram = histogram_of(weights("gaussian", 50, 30))
    scale = choose_activation_qparams(histogram, activation_spec(bits)).scale
    assert (math.frexp(float(scale))[0] * 2 ** scale_significant_bits(bits, is_weight=False)).is_integer()


def test_products_have_at_most_21_significant_bits() -> None:
    for bits in BITS:
        for weight_bits in BITS:
            activation = (2**bits - 1) * (2 ** scale_significant_bits(bits, False) - 1)
            weight = (2 ** (weight_bits - 1) - 1) * (2 ** scale_significant_bits(weight_bits, True) - 1)
            assert (activation * weight).bit_length() <= 21
        for of_input in range(1, 5):
            weight = (2 ** (bits - 1) - 1) * (2 ** scale_significant_bits(bits, True, of_input=of_input) - 1)
            assert (255 * (2**of_input - 1) * weight).bit_length() <= 21


@pytest.mark.parametrize("size", [40, 700])
@pytest.mark.parametrize("kind", ["gaussian", "laplace", "uniform", "outlier"])
def test_weight_error_never_grows_with_bits(kind: str, size: int) -> None:
    rows = weights(kind, 3, size)
    errors = torch.stack([chosen_errors(rows, bits) for bits in BITS])
    assert (errors[1:] <= errors[:-1] * (1 + 1e-6) + 1e-12).all()


@pytest.mark.parametrize("size", [12, 900])
@pytest.mark.parametrize("bits", BITS)
def test_weight_on_a_grid_is_exact(bits: int, size: int) -> None:
    rng = np.random.default_rng(bits)
    # The largest level is used by few values or not at all: the scale cannot follow from the maximum alone.
    level = rng.integers(-max(1, 2 ** (bits - 1) - bits), max(2, 2 ** (bits - 1) - bits), (6, size))
    scale = [[0.25], [3.0], [0.75], [2.0**-30], [3 * 2.0**-21], [2.0**40]]
    rows = torch.from_numpy(level * np.array(scale)).float()
    qparams = choose_weight_qparams(rows, weight_spec(bits))
    assert torch.equal(fake_quantize(rows, qparams), rows)


@pytest.mark.parametrize("size", [16, 500])
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**30, 2.0**-110], ids=["2^-40", "2^30", "2^-110"])
def test_weight_scale_is_equivariant(factor: float, size: int) -> None:
    rows = weights("gaussian", 3, size)
    for bits in (2, 8):
        scale = choose_weight_qparams(rows, weight_spec(bits)).scale
        assert torch.equal(choose_weight_qparams(rows * factor, weight_spec(bits)).scale, scale * factor)


def test_channel_axis_and_layout_do_not_matter() -> None:
    weight = weights("gaussian", 6, 180).reshape(6, 20, 3, 3)
    scale = choose_weight_qparams(weight, weight_spec(4)).scale
    assert scale.shape == (6,)
    moved = weight.movedim(0, 1)
    assert torch.equal(choose_weight_qparams(moved, weight_spec(4, 1)).scale, scale)
    assert torch.equal(choose_weight_qparams(moved, weight_spec(4, -3)).scale, scale)
    channels_last = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(choose_weight_qparams(channels_last, weight_spec(4)).scale, scale)
    assert choose_weight_qparams(weight, weight_spec(4)).zero_point.dtype == torch.int32


@pytest.mark.slow
def test_number_of_threads_does_not_matter() -> None:
    row = weights("gaussian", 1, 40_001)
    one = choose_weight_qparams(row, weight_spec(2, None)).scale
    torch.set_num_threads(2)
    assert torch.equal(choose_weight_qparams(row, weight_spec(2, None)).scale, one)


@pytest.mark.parametrize("bits", [2, 8])
def test_degenerate_channels(bits: int) -> None:
    rows = torch.zeros(5, 100)
    rows[1, 3], rows[2, 3], rows[3, :2], rows[4] = -0.7, 1e-42, torch.tensor([3e38, -3e38]), 5e-39
    qparams = choose_weight_qparams(rows, weight_spec(bits))
    assert (qparams.scale >= torch.finfo(torch.float32).tiny).all()
    assert torch.isfinite(qparams.scale).all()
    quantized = fake_quantize(rows, qparams)
    torch.testing.assert_close(quantized[[0, 1, 3]], rows[[0, 1, 3]], rtol=0.15, atol=0.0)
    assert choose_weight_qparams(torch.zeros(4, 0), weight_spec(bits)).scale.tolist() == [1.0] * 4
    assert choose_weight_qparams(torch.ones(4), weight_spec(bits)).scale.shape == (4,)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_channel_of_zeros_takes_about_the_scale_of_the_others(bits: int) -> None:
    rows = weights("gaussian", 5, 100)
    others = choose_weight_qparams(rows, weight_spec(bits)).scale
    zeros = torch.zeros(2, 100)
    scale = choose_weight_qparams(torch.cat([zeros[:1], rows, zeros[1:]]), weight_spec(bits)).scale
    assert torch.equal(scale[1:-1], others)
    assert scale[0] == scale[-1]
    assert others.median() / 2 < scale[0] <= others.median()
    assert torch.frexp(scale[0]).mantissa == 0.5
    assert choose_weight_qparams(zeros, weight_spec(bits)).scale.tolist() == [1.0, 1.0]
    assert choose_weight_qparams(zeros, weight_spec(bits, None)).scale == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_weight_is_refused(value: float) -> None:
    rows = torch.ones(2, 3)
    rows[1, 1] = value
    with pytest.raises(UnsupportedModelError, match=r"shape \(2, 3\): 1 of its 6"):
        choose_weight_qparams(rows, weight_spec(8))


def test_wrong_kind_of_spec_is_refused() -> None:
    with pytest.raises(OptionError, match="symmetric"):
        choose_weight_qparams(torch.ones(2), activation_spec(8))
    for spec in (weight_spec(8, None), QuantSpec(bits=8, symmetric=False, channel_axis=1)):
        with pytest.raises(OptionError, match="affine"):
            choose_activation_qparams(Histogram(), spec)


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
    weight = weights("gaussian", 6, 200).reshape(6, 8, 25)
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

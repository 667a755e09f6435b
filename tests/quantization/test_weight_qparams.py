"""Scales of weights against brute force: the least error of all, few significant bits, degenerate channels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from samples import BITS, activation_spec, histogram_of, short_scales, weight_spec

from infoq_fx.errors import OptionError, UnsupportedModelError
from infoq_fx.quantization.histogram import (
    Histogram,
    choose_activation_qparams,
    scale_significant_bits,
)
from infoq_fx.quantization.numerics import (
    fake_quantize,
)
from infoq_fx.quantization.weight_qparams import choose_weight_qparams
from infoq_fx.types import QuantSpec


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

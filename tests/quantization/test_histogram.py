"""Histograms against numpy, and ranges of activations against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import BITS, activation_spec, histogram_of, short_scales

from infoq_fx.errors import CalibrationDataError
from infoq_fx.quantization.histogram import (
    MAX_BINS,
    MAX_VALUES_PER_SAMPLE,
    Histogram,
    choose_activation_qparams,
    measure_noise,
    scale_significant_bits,
)
from infoq_fx.quantization.numerics import (
    fake_quantize,
)


def state(histogram: Histogram) -> tuple[float, float, int, int, bytes]:
    counts = histogram.counts.numpy().tobytes()
    return histogram.minimum, histogram.maximum, histogram.first_bin, histogram.exponent, counts


MAGNITUDES = st.sampled_from([0.0, 1e-42, 1e-30, 1e-6, 1.0, 3.0, 1e4, 1e30, 3e38])
VALUES = st.builds(lambda sign, size, x: sign * size * x, st.sampled_from([-1, 1]), MAGNITUDES, st.floats(0, 1))


@settings(max_examples=150, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_histogram_depends_on_neither_order_nor_chunks(values: list[float], random) -> None:
    whole = histogram_of(torch.tensor(values, dtype=torch.float32))
    shuffled = random.sample(values, len(values))
    cuts = sorted(random.randrange(len(values) + 1) for _ in range(3))
    chunks = [shuffled[a:b] for a, b in zip([0, *cuts], [*cuts, len(values)], strict=True)]
    parts = histogram_of(*(torch.tensor(chunk, dtype=torch.float32) for chunk in chunks))
    assert state(parts) == state(whole)
    assert int(whole.counts.sum()) == len(values)
    assert len(whole.counts) <= MAX_BINS


@pytest.mark.parametrize("shift", [0.0, -0.3, -1.0], ids=["positive", "both", "negative"])
def test_histogram_counts_what_numpy_counts(shift: float) -> None:
    x = torch.from_numpy(np.random.default_rng(0).random(5000) + shift).float()
    histogram = histogram_of(*x.split(77))
    assert MAX_BINS // 2 <= len(histogram.counts) <= MAX_BINS
    edges = (histogram.first_bin + np.arange(len(histogram.counts) + 1)) * histogram.bin_width
    assert histogram.counts.tolist() == np.histogram(x.double().numpy(), edges)[0].tolist()
    assert (histogram.minimum, histogram.maximum) == (float(x.min()), float(x.max()))


def test_histogram_uses_all_its_bins() -> None:
    histogram = histogram_of(torch.arange(float(MAX_BINS)))
    assert (histogram.bin_width, histogram.first_bin, histogram.counts.tolist()) == (1.0, 0, [1] * MAX_BINS)
    histogram.update(torch.tensor([-0.5]))
    assert (histogram.bin_width, histogram.first_bin, len(histogram.counts)) == (2.0, -1, MAX_BINS // 2 + 1)
    assert histogram.counts[:3].tolist() == [1, 2, 2]


@pytest.mark.parametrize("shape", [(3, 64, 56, 56), (2, 197, 768), (1, 16384), (2, 16385)])
def test_wide_samples_are_strided_across_every_axis(shape: tuple[int, ...]) -> None:
    x = torch.arange(math.prod(shape[1:])).remainder(shape[-1]).reshape(1, *shape[1:]).expand(shape).float()
    histogram = histogram_of(x)
    per_sample = int(histogram.counts.sum()) / shape[0]
    assert MAX_VALUES_PER_SAMPLE / 3 <= per_sample <= MAX_VALUES_PER_SAMPLE
    # The value is the index along the last axis: each is seen, and the extremes are exact.
    assert histogram.maximum == shape[-1] - 1
    if shape[-1] < MAX_BINS:
        assert int((histogram.counts > 0).sum()) == shape[-1]
    assert state(histogram_of(*x.split(1))) == state(histogram)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_histogram_tells_non_finite_values(value: float) -> None:
    histogram = histogram_of(torch.ones(2, 3), torch.tensor([[0.0, value, 1.0]]), torch.ones(2, 3))
    assert not histogram.is_finite
    assert math.isnan(value) == math.isnan(histogram.minimum) == math.isnan(histogram.maximum)
    assert Histogram().is_finite
    assert Histogram().is_empty
    with pytest.raises(CalibrationDataError, match="NaN or infinite"):
        choose_activation_qparams(histogram, activation_spec(8))
    with pytest.raises(CalibrationDataError, match="no value"):
        choose_activation_qparams(histogram_of(torch.ones(0, 4)), activation_spec(8))


def activations(kind: str) -> torch.Tensor:
    rng = np.random.default_rng(len(kind))
    normal = rng.standard_normal(6000)
    values = {
        "gaussian": lambda: normal,
        "relu": lambda: np.maximum(normal, 0),
        "uniform": lambda: rng.uniform(-0.2, 1.0, 6000),
        "heavy": lambda: rng.standard_t(2.5, 6000),
        "heavy-relu": lambda: np.maximum(rng.standard_t(2.5, 6000), 0),
        "shifted": lambda: 4 + 0.3 * normal,
        "negative": lambda: -1 - np.abs(normal),
        "hardswish": lambda: 2 * normal * np.clip(2 * normal + 3, 0, 6) / 6,
        "relu6": lambda: np.clip(4 * normal, 0, 6),
        "two-humps": lambda: np.where(rng.random(6000) < 0.3, 8 + 0.1 * normal, 0.2 * normal - 2),
    }[kind]()
    return torch.from_numpy(values).float()


ACTIVATIONS = (
    *("gaussian", "relu", "uniform", "heavy", "heavy-relu", "shifted", "negative"),
    *("hardswish", "relu6", "two-humps"),
)


def brute_force_affine_error(x: torch.Tensor, bits: int) -> float:
    """The least mean squared error over short scales and a dense grid of lower clips, on the samples."""
    low, high, top = min(float(x.min()), 0.0), max(float(x.max()), 0.0), 2**bits - 1
    full = (high - low) / top
    best = math.inf
    for scale in short_scales(full / 50, 2 * full, scale_significant_bits(bits, False)):
        for zero in {min(top, round(-low * part / scale)) for part in np.linspace(0.0, 1.0, 41)}:
            level = torch.clamp(torch.round(x / scale) + zero, 0, top) - zero
            best = min(best, float((level * scale - x).square().mean()))
    return best


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_activation_error_reaches_brute_force(kind: str, bits: int) -> None:
    x = activations(kind)
    qparams = choose_activation_qparams(histogram_of(*x.reshape(60, 100).split(7)), activation_spec(bits))
    error = float((fake_quantize(x, qparams) - x).square().mean())
    assert error <= 1.02 * brute_force_affine_error(x, bits)


def test_levels_as_fine_as_bins() -> None:
    """One far outlier among very many values is clipped, and a level spans a bin or two."""
    x, copies = activations("gaussian").abs(), 10_000
    histogram = histogram_of(x)
    histogram.counts *= copies
    histogram.update(torch.tensor([100.0]))

    def error(scale: float) -> float:
        inside = (torch.round(x / scale).clamp(0, 255) * scale - x).square().sum()
        return float(inside) * copies + (100 - 255 * scale) ** 2

    scale = float(choose_activation_qparams(histogram, activation_spec(8)).scale)
    assert scale < 3 * histogram.bin_width
    assert error(scale) <= 1.02 * min(error(s) for s in short_scales(0.005, 0.5, scale_significant_bits(8, False)))


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_noise_is_the_error_relative_to_the_values(kind: str, bits: int) -> None:
    x = activations(kind)
    histogram = histogram_of(x)
    qparams = choose_activation_qparams(histogram, activation_spec(bits))
    measured = float((fake_quantize(x, qparams) - x).square().mean() / x.square().mean())
    assert measure_noise(histogram, qparams) == pytest.approx(measured, rel=0.02, abs=1e-9)
    moved = choose_activation_qparams(histogram, activation_spec(bits), factor=1.25)
    measured = float((fake_quantize(1.25 * x, moved) / 1.25 - x).square().mean() / x.square().mean())
    assert measure_noise(histogram, moved, factor=1.25) == pytest.approx(measured, rel=0.02, abs=1e-9)
    assert measure_noise(histogram, choose_activation_qparams(histogram, activation_spec(16))) == 0
    rare = torch.zeros(1, 10_000)
    rare[0, 1] = -1.0  # where a histogram does not count
    assert measure_noise(histogram_of(rare), choose_activation_qparams(histogram_of(rare), activation_spec(bits))) == 0
    zeros = histogram_of(torch.zeros(4, 4))
    assert measure_noise(zeros, choose_activation_qparams(zeros, activation_spec(bits))) == 0


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation_error_falls_with_bits(kind: str) -> None:
    x = activations(kind)
    histogram = histogram_of(x)
    chosen = [choose_activation_qparams(histogram, activation_spec(bits)) for bits in BITS]
    errors = [float((fake_quantize(x, qparams) - x).square().mean()) for qparams in chosen]
    assert errors == sorted(errors, reverse=True)
    for qparams in chosen:
        assert 0 <= int(qparams.zero_point) <= qparams.spec.quant_max
        assert fake_quantize(torch.zeros(3), qparams).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("value", [0.0, 0.75, -0.75, 0.7, -1e-30, 1e38])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_constant_activation_is_kept(value: float, bits: int) -> None:
    x = torch.full((4, 5), value)
    qparams = choose_activation_qparams(histogram_of(x), activation_spec(bits))
    assert float(qparams.scale) > 0
    # Off by no more than the relative distance between short scales, where no level can do better.
    gap = 2.0 ** -scale_significant_bits(bits, is_weight=False)
    torch.testing.assert_close(fake_quantize(x, qparams), x, rtol=gap, atol=0.0)


def test_subnormal_activation_has_a_normal_scale() -> None:
    qparams = choose_activation_qparams(histogram_of(torch.full((2, 2), 1e-42)), activation_spec(8))
    assert float(qparams.scale) >= torch.finfo(torch.float32).tiny

"""Codebooks: nearest levels against brute force, and levels that fit a weight better than equal steps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infoq_fx.errors import OptionError
from infoq_fx.quantization.codebooks import (
    _to_integers,
    choose_codebook,
    choose_levels,
    find_levels,
    nearest_levels,
    read_codebook,
)
from infoq_fx.quantization.numerics import dequantize, fake_quantize, quantize
from infoq_fx.quantization.weight_qparams import choose_weight_qparams
from infoq_fx.types import LARGEST_LEVEL, QuantSpec


def spec_of(bits, *, has_codebook=True, channel_axis=0, has_signs=False):
    return QuantSpec(
        bits=bits, symmetric=True, channel_axis=channel_axis, has_codebook=has_codebook, has_signs=has_signs
    )


def squared_error(weight, spec, digits=5):
    return float((fake_quantize(weight, choose_weight_qparams(weight, spec, digits)) - weight).double().square().sum())


@st.composite
def sets_of_levels(draw):
    return torch.tensor(sorted(draw(st.sets(st.integers(-128, 127), min_size=2, max_size=64))), dtype=torch.int8)


@st.composite
def weights(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 40))
    values = rng.laplace(size=(rows, columns)) * np.exp(draw(st.floats(0, 6)) * rng.standard_normal((rows, 1)))
    values[rng.random(rows) < 0.1] = 0
    return torch.from_numpy(values.astype(np.float32))


@given(sets_of_levels(), st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=30))
def test_the_nearest_level_is_the_nearest(levels, values):
    x = torch.tensor(values, dtype=torch.float32)
    distance = (nearest_levels(x, levels).double() - x.double()).abs()
    assert torch.equal(distance, (x.double()[:, None] - levels.double()).abs().amin(1))


def test_the_middle_of_two_levels_goes_up_and_nan_to_zero():
    levels = torch.tensor([-5, -2, 0, 7], dtype=torch.int8)
    x = torch.tensor([-3.5, 3.5, -1.0, torch.nan, torch.inf, -torch.inf])
    assert nearest_levels(x, levels).tolist() == [-2, 7, 0, 0, 7, -5]


def test_levels_ascend_where_two_equal_ones_below_zero_are_nearest_to_it():
    levels, _ = _to_integers(np.array([-63.0, -2.1, -1.9, 9.0], dtype=np.float32), has_zero=True)
    assert levels.tolist() == [-63, -2, 0, 9]


@settings(deadline=None, max_examples=60)
@given(weights(), st.integers(2, 6))
def test_a_codebook_is_never_worse_than_equal_steps(weight, bits):
    qparams = choose_weight_qparams(weight, spec_of(bits), 5)
    assert qparams.levels.dtype == torch.int8
    assert len(qparams.levels) == 1 << bits
    assert bool((qparams.levels.diff() >= 0).all())
    assert int(qparams.levels.abs().max()) <= LARGEST_LEVEL
    q = quantize(weight, qparams)
    assert set(q.unique().tolist()) <= set(qparams.levels.tolist())
    found = dequantize(q, qparams)
    assert torch.equal(found, fake_quantize(weight, qparams))
    assert torch.equal(fake_quantize(found, qparams), found)  # a rounded weight stays
    assert bool((found[~weight.any(1)] == 0).all())
    uniform = squared_error(weight, spec_of(bits, has_codebook=False))
    assert squared_error(weight, spec_of(bits)) <= uniform * (1 + 1e-6)


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.85), (3, 0.85), (4, 0.8), (5, 0.8)])
def test_a_codebook_fits_a_peaked_weight_much_better(bits, gain):
    weight = torch.from_numpy(np.random.default_rng(0).laplace(size=(32, 288)).astype(np.float32))
    assert squared_error(weight, spec_of(bits)) < gain * squared_error(weight, spec_of(bits, has_codebook=False))


@pytest.mark.parametrize("has_codebook", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_a_weight_that_is_on_a_grid_stays_there(bits, has_codebook):
    generator = torch.Generator().manual_seed(bits)
    q = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (8, 60), generator=generator)
    weight = q * torch.tensor([0.5, 1, 0.25, 2, 0.75, 0.5, 3, 1])[:, None]
    assert squared_error(weight, spec_of(bits, has_codebook=has_codebook)) == 0


@settings(deadline=None, max_examples=60)
@given(weights(), st.integers(2, 6))
def test_mirrored_ranges_are_never_worse_than_plain_ones(weight, bits):
    spec = spec_of(bits, has_codebook=False, has_signs=True)
    qparams, plain = (
        choose_weight_qparams(weight, spec, 5),
        choose_weight_qparams(weight, spec_of(bits, has_codebook=False), 5),
    )
    q = quantize(weight, qparams)
    assert int(q.min()) >= spec.quant_min
    assert int(q.max()) <= spec.quant_max
    errors, others = ((fake_quantize(weight, x) - weight).double().square().sum(1) for x in (qparams, plain))
    assert bool((errors <= others * (1 + 1e-6)).all())
    if weight.shape[1] <= 32:  # of few values all scales of both signs are tried
        turned = choose_weight_qparams(-weight, spec_of(bits, has_codebook=False), 5)
        assert bool((errors <= (fake_quantize(-weight, turned) + weight).double().square().sum(1) * (1 + 1e-6)).all())
    assert bool((plain.scale > 0).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_a_weight_on_a_mirrored_grid_stays_there(bits):
    generator = torch.Generator().manual_seed(bits)
    q = torch.randint(1 - (1 << (bits - 1)), (1 << (bits - 1)) + 1, (8, 60), generator=generator)
    q[:, 0] = 1 << (bits - 1)
    weight = q * torch.tensor([0.5, 1, 0.25, 2, 0.75, 0.5, 3, 1])[:, None]
    qparams = choose_weight_qparams(weight, spec_of(bits, has_codebook=False, has_signs=True), 5)
    assert bool((qparams.scale < 0).all())
    assert torch.equal(fake_quantize(weight, qparams), weight)
    assert torch.equal(quantize(weight, qparams).to(q.dtype), -q)


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_a_weight_of_few_values_has_a_codebook_without_warnings(bits):
    generator = torch.Generator().manual_seed(bits)
    single = torch.zeros(1, 100_000)
    single[0, 77_777] = -3.0  # a sample of the values misses it
    few = torch.zeros(600, 600)
    few[torch.randint(0, 600, (500,), generator=generator), torch.randint(0, 600, (500,), generator=generator)] = 2.0
    for weight in (torch.eye(600), single, few):
        qparams = choose_weight_qparams(weight, spec_of(bits))
        assert bool(qparams.scale.isfinite().all())
        assert squared_error(weight, spec_of(bits)) <= squared_error(weight, spec_of(bits, has_codebook=False))
        alive = weight[weight.any(1)].numpy()
        levels, scales = choose_codebook(alive, bits)
        assert np.isfinite(scales).all()
        assert np.abs(levels).max() == LARGEST_LEVEL


@pytest.mark.parametrize("size", [1e-36, 1e-38])
def test_a_weight_at_the_smallest_scales_keeps_equal_steps(size):
    weight = size * torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(bits=3, symmetric=True, channel_axis=0, has_codebook=True)
    qparams = choose_weight_qparams(weight, spec)
    uniform = choose_weight_qparams(weight, spec_of(3, has_codebook=False), 3)
    errors = [float(((fake_quantize(weight, q) - weight) / size).square().sum()) for q in (qparams, uniform)]
    assert errors[0] <= 1.05 * errors[1]


def test_one_scale_for_the_whole_weight():
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    qparams = choose_weight_qparams(weight, spec_of(3, channel_axis=None))
    assert qparams.scale.shape == ()
    assert len(fake_quantize(weight, qparams).unique()) <= 8


def test_the_sample_of_a_large_weight_speaks_for_it():
    weight = torch.randn(700, 900, generator=torch.Generator().manual_seed(0))
    error = squared_error(weight, spec_of(3)) / float(weight.square().sum())
    assert error == pytest.approx(0.0345, rel=0.05)  # of the best 8 levels for a Gaussian (Max, 1960)


def test_levels_are_read_back_from_integers():
    qparams = choose_weight_qparams(torch.randn(8, 100, generator=torch.Generator().manual_seed(0)), spec_of(3))
    q = torch.randint(-4, 4, (4, 9), dtype=torch.int8)
    assert torch.equal(read_codebook(qparams.levels, 3), qparams.levels)
    assert read_codebook(q, 3) is None
    assert read_codebook(torch.full((4,), 100, dtype=torch.int8), 8) is None
    uniform = choose_weight_qparams(torch.randn(8, 100), spec_of(3, has_codebook=False))
    assert find_levels(uniform).tolist() == list(range(-4, 4))


def test_levels_follow_the_budget():
    assert choose_levels("auto", counts_bitops=False) == "codebook"
    assert choose_levels("auto", counts_bitops=True) == "mirrored"
    for levels in ("uniform", "mirrored", "codebook"):
        assert choose_levels(levels, counts_bitops=True) == levels
    with pytest.raises(OptionError, match="codebook"):
        choose_levels("codebok", counts_bitops=False)

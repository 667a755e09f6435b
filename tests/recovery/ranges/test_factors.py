"""Factors of channels: powers of two, of least error among all, within their limits."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infoq_fx.quantization.histogram import Histogram, choose_activation_qparams
from infoq_fx.quantization.numerics import fake_quantize
from infoq_fx.recovery.ranges.factors import Reader, RoundedTensor, choose_factors
from infoq_fx.types import QuantSpec

FREE = torch.full((3,), torch.inf)


def make_case(seed, bits=4, spread=3.0, weight_bits=16):
    """Three channels of different ranges, read by a depthwise layer."""
    generator = torch.Generator().manual_seed(seed)
    ranges = torch.exp2(spread * torch.rand(3, 1, generator=generator))
    values = (ranges * torch.randn(3, 2048, generator=generator)).relu()
    rows = torch.randn(3, 1, 9, generator=generator)
    reader = Reader(rows, 1, weight_bits, values.var(1, correction=0))
    return RoundedTensor(values, reader.energy(), QuantSpec(bits=bits, symmetric=False)), reader


def error_of(tensor, factors):
    scaled, histogram = tensor.values * factors[:, None], Histogram()
    for chunk in scaled.flatten().chunk(64):
        histogram.update(chunk[None])
    rounded = fake_quantize(scaled, choose_activation_qparams(histogram, tensor.spec)) / factors[:, None]
    return float(((rounded - tensor.values).square().mean(1) * tensor.energy).sum())


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("seed", [0, *(pytest.param(x, marks=pytest.mark.slow) for x in (1, 2))])
def test_no_other_factors_are_much_better(seed, bits):
    tensor, reader = make_case(seed, bits)
    factors, share = choose_factors([tensor], [reader], FREE)
    before = error_of(tensor, torch.ones(3))
    assert share == pytest.approx(error_of(tensor, factors) / before, rel=1e-3)
    every = itertools.product(*[[2.0**octave for octave in range(-4, 5)]] * 2)
    least = min(error_of(tensor, torch.tensor([1.0, *both])) for both in every)
    assert error_of(tensor, factors) <= 1.05 * least


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100), st.lists(st.integers(0, 4), min_size=3, max_size=3))
def test_limits_hold_and_the_error_does_not_rise(seed, highest):
    tensor, reader = make_case(seed)
    high = torch.tensor(highest).float()
    factors, share = choose_factors([tensor], [reader], high)
    octaves = factors.log2()
    assert torch.equal(octaves, octaves.round())
    assert bool(((octaves >= 0) & (octaves <= high)).all())
    assert share <= 1


def test_dead_channels_keep_their_place_and_a_tensor_of_zeros_all():
    tensor, reader = make_case(0)
    tensor.values[1] = 0
    assert float(choose_factors([tensor], [reader], FREE)[0][1]) == 1
    zeros = RoundedTensor(torch.zeros(3, 64), reader.energy(), tensor.spec)
    factors, share = choose_factors([zeros], [reader], FREE)
    assert factors.tolist() == [1, 1, 1]
    assert share == 1


def test_weights_that_many_columns_share_a_scale_hold_factors_back():
    """A dense layer pays for factors with its own bits; one of float weights does not."""
    tensor, _ = make_case(3, bits=8, spread=6.0)
    rows = torch.randn(1, 16, 3, generator=torch.Generator().manual_seed(0))
    shares = {}
    for bits in (2, 16):
        reader = Reader(rows, 1, bits, tensor.values.var(1, correction=0))
        shares[bits] = choose_factors([RoundedTensor(tensor.values, reader.energy(), tensor.spec)], [reader], FREE)
    assert shares[16][1] < 0.7
    assert shares[2][1] > 0.95

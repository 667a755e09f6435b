"""Values that the tests of quantization draw."""

from __future__ import annotations

import math

import torch

from infoq_fx.quantization.histogram import (
    Histogram,
)
from infoq_fx.types import QuantSpec

BITS = (2, 3, 4, 5, 6, 7, 8)


def weight_spec(bits: int, channel_axis: int | None = 0) -> QuantSpec:
    return QuantSpec(bits=bits, symmetric=True, channel_axis=channel_axis)


def activation_spec(bits: int) -> QuantSpec:
    return QuantSpec(bits=bits, symmetric=False)


def short_scales(low: float, high: float, significant_bits: int) -> list[float]:
    """Every number of so many significant bits in a range."""
    mantissas = range(2 ** (significant_bits - 1), 2**significant_bits)
    exponents = range(math.floor(math.log2(low)) - 9, math.ceil(math.log2(high)) + 2)
    return [x for e in exponents for m in mantissas if low <= (x := math.ldexp(m, e)) <= high]


def histogram_of(*batches: torch.Tensor) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.update(batch)
    return histogram

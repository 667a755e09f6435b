"""Compiled loops of the forward runs: fake quantization fused with a preceding addition and clip, and projection.

Each is one pass over memory in place of one per operation. Every value depends only on its own row, so that results
do not depend on the batch size or the number of threads.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from infoq_fx.core.jit import jit

__all__ = [
    "count_bins",
    "draw_share",
    "fake_quantize_but_share",
    "fake_quantize_flat",
    "fake_quantize_sum",
    "project_rows",
    "quantize_flat",
    "quantize_sum",
    "sum_rounding_errors",
]

Floats: TypeAlias = NDArray[np.floating[Any]]
Bytes: TypeAlias = NDArray[np.uint8]
Number: TypeAlias = float | np.floating[Any]


@jit
def fake_quantize_flat(x: Floats, scale: Number, low: Number, high: Number, out: Floats) -> None:
    """Write ``clip(round_half_even(x / scale), low, high) * scale`` into ``out``; NaN stays NaN, -0.0 becomes 0.0."""
    for i in range(len(x)):
        q = np.rint(x[i] / scale)
        q = low if q < low else q
        q = high if q > high else q
        out[i] = q * scale + x.dtype.type(0)


@jit
def fake_quantize_sum(x: Floats, y: Floats, scale: Number, low: Number, high: Number, out: Floats) -> None:
    """:func:`fake_quantize_flat` of ``x + y``."""
    for i in range(len(x)):
        q = np.rint((x[i] + y[i]) / scale)
        q = low if q < low else q
        q = high if q > high else q
        out[i] = q * scale + x.dtype.type(0)


@jit
def count_bins(x: Floats, bins_per_unit: float, first_bin: int, counts: NDArray[np.int64]) -> None:
    """Count every value of ``x`` ``[samples, values]`` in the bin ``floor(x * bins_per_unit) - first_bin``.

    The product is in float64, where the smallest negative float32 divided by the widest bin does not become 0.
    """
    for sample in range(x.shape[0]):
        for i in range(x.shape[1]):
            counts[int(np.floor(np.float64(x[sample, i]) * bins_per_unit)) - first_bin] += 1


@jit
def _mix(value: Any) -> Any:
    """A bijective hash of 32 bits."""
    value = np.uint32(np.uint32(value ^ (value >> np.uint32(16))) * np.uint32(0x7FEB352D))
    value = np.uint32(np.uint32(value ^ (value >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(value ^ (value >> np.uint32(16)))


@jit
def _draw(index: int, first: Any, second: Any) -> Any:
    """32 random bits for an index, from the halves of a seed."""
    return _mix(np.uint32(_mix(np.uint32(np.uint32(index) + first)) ^ second))


@jit
def fake_quantize_but_share(
    x: Floats, scale: Number, low: Number, high: Number, share: float, seed: int, start: int, out: Floats
) -> None:
    """:func:`fake_quantize_flat` that leaves a share of the values unchanged: those of :func:`draw_share`."""
    limit = np.uint64(share * 2**32)
    first, second = np.uint32(seed & 0xFFFFFFFF), np.uint32((seed >> 32) & 0xFFFFFFFF)
    for i in range(len(x)):
        q = np.rint(x[i] / scale)
        q = low if q < low else q
        q = high if q > high else q
        out[i] = x[i] if _draw(start + i, first, second) < limit else q * scale + x.dtype.type(0)


@jit
def draw_share(share: float, seed: int, start: int, out: NDArray[np.bool_]) -> None:
    """Draw a random share of consecutive values from a seed of up to 64 bits, the same on every machine.

    ``start`` is the number of the first of them among all that are drawn for the seed.
    """
    limit = np.uint64(share * 2**32)
    first, second = np.uint32(seed & 0xFFFFFFFF), np.uint32((seed >> 32) & 0xFFFFFFFF)
    for i in range(len(out)):
        out[i] = _draw(start + i, first, second) < limit


@jit
def quantize_flat(x: Floats, scale: Number, low: Number, high: Number, zero_point: Number, out: Bytes) -> None:
    """Write the integers of :func:`fake_quantize_flat` plus ``zero_point`` into uint8 ``out``; no x may be NaN."""
    for i in range(len(x)):
        q = np.rint(x[i] / scale)
        q = low if q < low else q
        q = high if q > high else q
        out[i] = np.uint8(np.int32(q + zero_point))


@jit
def quantize_sum(
    x: Floats, y: Floats, scale: Number, low: Number, high: Number, zero_point: Number, out: Bytes
) -> None:
    """:func:`quantize_flat` of ``x + y``."""
    for i in range(len(x)):
        q = np.rint((x[i] + y[i]) / scale)
        q = low if q < low else q
        q = high if q > high else q
        out[i] = np.uint8(np.int32(q + zero_point))


@partial(jit, fastmath={"reassoc"})  # lets the compiler vectorize the sum
def sum_rounding_errors(rows: Floats, scales: Floats, low: Number, high: Number, errors: Floats) -> None:
    """Write the squared error of every row at each of its scales into ``errors``.

    Args:
        rows: ``[rows, values]``.
        scales: ``[rows, scales]``, not 0.
        low: smallest integer.
        high: largest integer.
        errors: output, float64, shaped like ``scales``.
    """
    for r in range(scales.shape[0]):
        for k in range(scales.shape[1]):
            scale, total = scales[r, k], 0.0
            for start in range(0, rows.shape[1], 1024):
                values, part = rows[r, start : start + 1024], scale * 0
                for i in range(len(values)):
                    q = np.rint(values[i] / scale)
                    q = low if q < low else q
                    q = high if q > high else q
                    difference = q * scale - values[i]
                    part += difference * difference
                total += part
            errors[r, k] = total


@jit
def project_rows(rows: Floats, directions: Floats, out: Floats) -> None:
    """Write ``rows [samples, features] @ directions [features, slices]`` into ``out [slices, samples]``.

    Library matrix products may sum a row in another order when the other rows change; this does not. Sixteen rows at
    a time are written out: a cache line of every slice.
    """
    slices = directions.shape[1]
    sums = np.empty((16, slices), directions.dtype)
    for start in range(0, len(rows), 16):
        stop = min(start + 16, len(rows))
        sums[:] = 0
        for i in range(stop - start):
            for j in range(rows.shape[1]):
                value, direction, total = rows[start + i, j], directions[j], sums[i]
                for s in range(slices):
                    total[s] += value * direction[s]
        for s in range(slices):
            for i in range(stop - start):
                out[s, start + i] = sums[i, s]

"""Codebooks: the integer levels of a weight that are chosen for its values, in place of equal steps.

Runtimes unpack a weight as they load and multiply int8 values in any case, so that a weight of b bits may take any 2^b
of them. A codebook belongs to a whole weight; each channel has its own scale.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from infoq_fx.core.jit import jit
from infoq_fx.errors import OptionError
from infoq_fx.types import CODEBOOK_BITS, LARGEST_LEVEL, QParams, WeightLevels

__all__ = [
    "CODEBOOK_VERSION",
    "Levels",
    "bias_multiple",
    "choose_codebook",
    "choose_levels",
    "find_levels",
    "find_places",
    "look_up",
    "nearest_levels",
    "read_codebook",
    "sum_level_errors",
    "table_of_levels",
    "uniform_levels",
]

Floats: TypeAlias = NDArray[np.floating[Any]]
Integers: TypeAlias = NDArray[np.integer[Any]]
Levels: TypeAlias = Literal["auto", "uniform", "mirrored", "codebook"]
"""How the integers that weights may have are chosen: :data:`infoq_fx.types.WeightLevels`, or by the budget."""

CODEBOOK_VERSION = 2
"""Raised when the same weight gets other levels; part of the keys of caches."""

_HALVES = 2 * 128  # the table of nearest levels has an entry for every half integer from -128 to 127.5
_SAMPLED = 1 << 15  # values that the levels are fitted to
_ITERATIONS = 12
_FACTORS = np.exp2(np.linspace(-0.4, 0.4, 9)).astype(np.float32)  # of a channel's scale, tried in each iteration
_UNIFORM_SHARE = 0.5  # of equal steps in the first levels; the rest are quantiles
_LEAST_IN_ROW = 16  # values of a row among them
_LEAST_WEIGHT = 1e-300
_TAIL = 0.002  # share of the values beyond the first levels, on each side


def choose_levels(levels: Any, *, counts_bitops: bool) -> WeightLevels:
    """Return the levels of weights: those asked for; for ``"auto"`` a codebook unless the budget counts BitOps.

    Hardware that multiplies integers of b bits, which BitOps count, needs equal steps: ``"mirrored"``.

    Raises:
        OptionError: the option is unknown.
    """
    if levels == "auto":
        return "mirrored" if counts_bitops else "codebook"
    if levels not in get_args(WeightLevels):
        raise OptionError(f"levels={levels!r}; give 'auto', 'uniform', 'mirrored' or 'codebook'")
    found: WeightLevels = levels
    return found


def find_levels(qparams: QParams) -> torch.Tensor:
    """Return the integers that a weight may have, int8, ascending: its codebook, or all from the smallest."""
    if qparams.levels is not None:
        return qparams.levels
    return uniform_levels(qparams.spec.bits, qparams.scale.device)


def uniform_levels(bits: int, device: torch.device) -> torch.Tensor:
    """Return all signed integers of a bit-width, int8 ``[2**bits]``, ascending."""
    return torch.arange(-(1 << (bits - 1)), 1 << (bits - 1), dtype=torch.int8, device=device)


def read_codebook(integers: torch.Tensor, bits: int) -> torch.Tensor | None:
    """Return the levels that a stored weight uses, ascending; None if all are integers of its bit-width."""
    limit = 1 << (bits - 1)
    if bits > CODEBOOK_BITS or not integers.numel():
        return None
    return integers.unique() if int(integers.max()) >= limit or int(integers.min()) < -limit else None


def bias_multiple(levels: torch.Tensor | None, bits: int) -> int:
    """Return the multiple of input scale times weight scale that a layer's bias is rounded to, a power of two.

    A codebook's levels are finer than equal steps, and its scales are smaller by as much. In their own units, biases
    would take more bytes in a file; in these multiples they have the precision that they have with equal steps.

    Args:
        levels: of the weight, or the integers that it has; None without a codebook.
        bits: of the weight.
    """
    has_codebook = levels is not None and read_codebook(levels, bits) is not None
    return 1 << (CODEBOOK_BITS - bits) if has_codebook else 1


def table_of_levels(levels: torch.Tensor) -> Floats:
    """Return the nearest level to every interval of half an integer, float32 ``[512]``, for :func:`look_up`.

    Args:
        levels: integers from -128 to 127, ascending, on any device.
    """
    found: Floats = levels.detach().float()[_table_of_places(levels)].cpu().numpy()
    return found


def nearest_levels(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Round every value to the nearest level; NaN becomes the level nearest to 0.

    Args:
        x: float, any shape and device.
        levels: integers from -128 to 127, ascending; moved to the device of ``x``.

    Returns:
        float32, of the shape of ``x``.
    """
    levels = levels.detach().to(x.device)
    return levels.float()[find_places(x, levels)]


def find_places(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the place of the nearest level to every value, int64, of the shape of ``x``.

    Args:
        x: float, any shape; NaN counts as 0.
        levels: integers from -128 to 127, ascending, on the device of ``x``.
    """
    interval = torch.floor(x.detach().to(torch.float32).nan_to_num(0.0) * 2).add_(_HALVES)
    return _table_of_places(levels)[interval.clamp_(0, 2 * _HALVES - 1).long()]


def _table_of_places(levels: torch.Tensor) -> torch.Tensor:
    """The place of the nearest level to every interval of half an integer from -128 to 127.5, int64 ``[512]``.

    The midpoint of two integers is a multiple of a half, so that a value's interval decides. A midpoint goes up.
    """
    found = levels.detach().float()
    middles = (torch.arange(2 * _HALVES, device=found.device) - _HALVES) / 2 + 0.25
    return torch.searchsorted((found[1:] + found[:-1]) / 2, middles)


def choose_codebook(rows: Floats, bits: int, *, has_zero: bool = False) -> tuple[Integers, Floats]:
    """Choose the levels of a weight, and each row's scale for them, by their squared error.

    Lloyd's algorithm: every value goes to its nearest level, every level moves to the mean of its values (in units of
    their row's scale, weighted by its square) and is rounded to an integer, and every row takes the best of nine scales
    around its own. At most about 32,768 values spread over the weight are used.

    Args:
        rows: float32 ``[channels, values]``, finite; no row is all zeros.
        bits: bit-width, 2 to 6.
        has_zero: one of the levels is 0.

    Returns:
        Levels, int8 ``[2**bits]``, ascending, the largest of size 63; and scales, float32 ``[channels]``, positive.

    Reference:
        Lloyd, "Least squares quantization in PCM", 1982; Zhang et al., "LQ-Nets", arXiv 1807.10029, for levels that
        are learned per layer. Integer levels and scales per channel are additions.
    """
    sampled = _sample(rows)
    sampled = sampled if sampled.any() else rows  # the few values of a sparse weight
    unit = np.sqrt(np.mean(np.square(sampled, dtype=np.float64), 1)).astype(np.float32)
    unit = np.where(unit > 0, unit, np.abs(rows).max(1))
    levels, scale = _begin(sampled / unit[:, None], bits, has_zero)
    scales = unit * scale
    for _ in range(_ITERATIONS):
        places = _table_of_places(torch.from_numpy(levels)).numpy()
        sums, weights = np.zeros(len(levels)), np.zeros(len(levels))
        sum_by_level(sampled, scales, places, sums, weights)
        moved = np.where(weights > 0, sums / np.maximum(weights, _LEAST_WEIGHT), levels)
        levels, growth = _to_integers(moved, has_zero)
        candidates = (scales / growth)[:, None] * _FACTORS
        errors = np.empty(candidates.shape)
        sum_level_errors(sampled, candidates, table_of_levels(torch.from_numpy(levels)), errors)
        scales = candidates[np.arange(len(candidates)), errors.argmin(1)]
    return levels, scales


def _sample(rows: Floats) -> Floats:
    """Fewer values of every row, spread over it, so that about ``_SAMPLED`` are left."""
    count, width = rows.shape
    most = min(width, max(_LEAST_IN_ROW, _SAMPLED // count))
    step = max(1, width // most)
    while math.gcd(step, width) > 1:
        step += 1
    return np.ascontiguousarray(rows[:, np.sort(np.arange(most) * step % width)])


def _begin(x: Floats, bits: int, has_zero: bool) -> tuple[Integers, np.float32]:
    """The first levels, between equal steps and quantiles, and the scale of values whose root mean square is 1."""
    count, ordered = 1 << bits, np.sort(x, axis=None)
    low, high = ordered[int(_TAIL * ordered.size)], ordered[min(ordered.size - 1, int((1 - _TAIL) * ordered.size))]
    quantiles = ordered[((np.arange(count) + 0.5) / count * ordered.size).astype(np.int64)]
    mixed = _UNIFORM_SHARE * np.linspace(low, high, count) + (1 - _UNIFORM_SHARE) * quantiles
    if not mixed.any():  # nearly all values are zeros
        mixed = np.linspace(ordered[0], ordered[-1], count)
    levels, growth = _to_integers(np.sort(mixed), has_zero)
    return levels, np.float32(1 / growth)


def _to_integers(levels: Floats, has_zero: bool) -> tuple[Integers, np.float32]:
    """Levels as int8, ascending, the largest of size 63, and the factor that they grew by."""
    growth = np.float32(LARGEST_LEVEL / np.abs(levels).max())
    found = np.rint(np.sort(levels) * growth).astype(np.int8)
    if has_zero:
        found[np.abs(found).argmin()] = 0
        found.sort()  # of two equal levels below 0, the first became 0
    return found, growth


@jit
def look_up(value: Any, table: NDArray[Any]) -> Any:
    """Return a value's entry in a table as that of :func:`table_of_levels`; NaN has the first.

    Loops that are to be vectorized write it out.
    """
    place = np.floor(value * 2) + 256
    place = place if place > 0 else 0
    return table[np.int32(place if place < 511 else 511)]


@jit
def sum_by_level(rows: Floats, scales: Floats, places: Integers, sums: Floats, weights: Floats) -> None:
    """Add every value times its row's scale to the sum of its nearest level, and the squared scale to its weight.

    Args:
        rows: ``[rows, values]``.
        scales: ``[rows]``, not 0.
        places: of the nearest level to every interval of half an integer, as in :func:`table_of_levels`.
        sums: output, float64 ``[levels]``.
        weights: output, float64 ``[levels]``.
    """
    for r in range(rows.shape[0]):
        scale = scales[r]
        square = np.float64(scale) * np.float64(scale)
        for i in range(rows.shape[1]):
            level = look_up(rows[r, i] / scale, places)
            sums[level] += np.float64(rows[r, i]) * np.float64(scale)
            weights[level] += square


@partial(jit, fastmath={"reassoc"})  # lets the compiler vectorize the sum
def sum_level_errors(rows: Floats, scales: Floats, table: Floats, errors: Floats) -> None:
    """Write the squared error of every row at each of its scales into ``errors``.

    Args:
        rows: ``[rows, values]``.
        scales: ``[rows, scales]``, not 0.
        table: of :func:`table_of_levels`.
        errors: output, float64, shaped like ``scales``.
    """
    for r in range(scales.shape[0]):
        for k in range(scales.shape[1]):
            scale, total = scales[r, k], 0.0
            for start in range(0, rows.shape[1], 1024):
                values, part = rows[r, start : start + 1024], scale * 0
                for i in range(len(values)):  # look_up, written out
                    place = np.floor(values[i] / scale * np.float32(2)) + np.float32(256)
                    place = place if place > 0 else np.float32(0)
                    place = place if place < 511 else np.float32(511)
                    difference = table[np.int32(place)] * scale - values[i]
                    part += difference * difference
                total += part
            errors[r, k] = total

"""Chooses scales, and levels, for weights."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional

from infoq_fx.errors import OptionError, UnsupportedModelError
from infoq_fx.quantization.codebooks import choose_codebook, sum_level_errors, table_of_levels, uniform_levels
from infoq_fx.quantization.histogram import range_bits, scale_significant_bits
from infoq_fx.quantization.numerics import SMALLEST_SCALE, grow_scale
from infoq_fx.quantization.pointwise import sum_rounding_errors
from infoq_fx.types import QParams, QuantSpec

__all__ = ["choose_weight_qparams"]

_CHUNK_ELEMENTS = 1 << 15  # small enough that torch uses one thread and the values stay in a core's cache
_SUM_BLOCK = 1024
_LARGEST_EXPONENT, _SMALLEST_EXPONENT = 15, -8  # of a row's largest value, without a scale in float16
_SMALLEST_SHIFT = -50  # of a row's exponent against the largest, for the choice of a codebook
_AROUND = 2.0**0.75  # the range of scales that are tried around a fitted one
_FEW_VALUES = 32  # of a channel; with more, the best scales of both signs are close


def choose_weight_qparams(weight: torch.Tensor, spec: QuantSpec, significant_bits: int | None = None) -> QParams:
    """Choose the symmetric scales that minimise the squared error of a weight, per channel or per tensor.

    With a codebook its levels are chosen first, see :func:`infoq_fx.quantization.codebooks.choose_codebook`; they are
    the uniform ones where those have less error, as for a weight that is on a grid already. Every scale that
    :func:`infoq_fx.quantization.histogram.scale_significant_bits` allows is tried, from strong clipping to none; around
    a codebook's fitted one, those within a factor of 1.7. If the spec allows signs, negative scales are tried too, for
    channels of more than 32 values those within this factor of the best positive one. With 16 bits the scale is 1,
    or a power of two where float16 lacks the range.

    Args:
        weight: float, any shape.
        spec: symmetric, with the bit-width and the channel axis.
        significant_bits: of the scales; None for a number that suits any input and any number of terms.

    Returns:
        Scales on the weight's device; zero points are 0. A channel of zeros takes about the scale of the others, a
        power of two, and 1 if all are zeros.

    Raises:
        OptionError: ``spec`` is affine.
        UnsupportedModelError: the weight holds NaN or infinite values.
    """
    if not spec.symmetric:
        raise OptionError(f"weights take a symmetric QuantSpec, got {spec}; set symmetric=True")
    rows = _rows(weight.detach(), spec.channel_axis)
    if rows.shape[1] == 0:
        return _qparams(spec, torch.ones(len(rows), device=rows.device))
    largest = rows.abs().amax(1, keepdim=True)
    if not bool(torch.isfinite(largest).all()):
        raise UnsupportedModelError(
            f"cannot quantize a weight of shape {tuple(weight.shape)}: {int((~rows.isfinite()).sum())} of "
            f"its {weight.numel()} values are NaN or infinite; load a valid checkpoint, or ignore this layer"
        )
    if spec.is_float:
        return _qparams(spec, _float16_units(largest).flatten())
    # Scaling by powers of two is exact and keeps squares far from overflow and underflow.
    exponent = torch.frexp(largest).exponent.clamp_(-125, 126)
    is_zero = largest == 0
    normal = torch.ldexp(rows, -exponent).masked_fill_(is_zero, 1.0)
    digits = scale_significant_bits(range_bits(spec), is_weight=True) if significant_bits is None else significant_bits
    scale, levels = _best_of_uniform(normal, spec.bits, digits, has_signs=spec.has_signs), None
    if spec.has_codebook:
        uniform = scale
        scale, levels = _best_of_codebook(normal, exponent, is_zero.flatten(), spec.bits, digits, uniform)
        if bool((torch.ldexp(scale, exponent)[~is_zero] < SMALLEST_SCALE).any()):  # a codebook's are smaller
            scale, levels = uniform, None
    scale = grow_scale(torch.ldexp(scale, exponent), SMALLEST_SCALE)
    return _qparams(spec, torch.where(is_zero, _scale_of_zeros(scale[~is_zero].abs()), scale).flatten(), levels=levels)


def _qparams(spec: QuantSpec, scale: torch.Tensor, levels: torch.Tensor | None = None) -> QParams:
    scale = scale.reshape(()) if spec.channel_axis is None else scale
    if spec.has_codebook and levels is None:
        levels = uniform_levels(spec.bits, scale.device)
    return QParams(spec, scale, torch.zeros_like(scale, dtype=torch.int32), levels)


def _rows(weight: torch.Tensor, channel_axis: int | None) -> torch.Tensor:
    """Float32 ``[channels, values]``; long rows are padded to whole blocks by zeros, which add no error."""
    by_channel = weight.unsqueeze(0) if channel_axis is None else weight.movedim(channel_axis, 0)
    rows = by_channel.to(torch.float32).reshape(len(by_channel), -1).contiguous()
    padding = -rows.shape[1] % _SUM_BLOCK if rows.shape[1] > 16 * _SUM_BLOCK else 0
    return functional.pad(rows, (0, padding)) if padding else rows


def _row_sums(values: torch.Tensor) -> torch.Tensor:
    """Float64 sums ``[rows, 1]``. One thread sums a block, so the result does not depend on the number of threads."""
    block = _SUM_BLOCK if values.shape[1] > 16 * _SUM_BLOCK else values.shape[1]
    return values.view(len(values), -1, block).sum(-1).sum(-1, keepdim=True, dtype=torch.float64)


def _scale_of_zeros(others: torch.Tensor) -> torch.Tensor:
    """The largest power of two up to the median of the other channels' scales, ``[]``; 1 if there are none."""
    if not len(others):
        return others.new_ones(())
    return torch.exp2(torch.frexp(others.median()).exponent.float() - 1)


def _best_of_uniform(rows: torch.Tensor, bits: int, significant_bits: int, *, has_signs: bool) -> torch.Tensor:
    count = max(1, _CHUNK_ELEMENTS // rows.shape[1])
    chunks = torch.split(rows, count)
    return torch.cat([_best_scales(chunk, bits, significant_bits, has_signs=has_signs) for chunk in chunks])


def _best_of_codebook(
    rows: torch.Tensor,
    exponent: torch.Tensor,
    is_zero: torch.Tensor,
    bits: int,
    significant_bits: int,
    uniform: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales ``[rows, 1]`` and levels of least error: of a codebook, or the ``uniform`` scales.

    ``rows`` are divided by two to their ``exponent``; those of zeros count as 1.
    """
    levels = uniform_levels(bits, rows.device)
    if bool(is_zero.all()):
        return uniform, levels
    alive, power = rows[~is_zero].cpu().contiguous(), exponent[~is_zero].cpu()
    shift = (power - power.max()).clamp_min(_SMALLEST_SHIFT)
    chosen, fitted = choose_codebook(torch.ldexp(alive, shift).numpy(), bits, has_zero=bool(is_zero.any()))
    codebook, around = torch.from_numpy(chosen), torch.ldexp(torch.from_numpy(fitted)[:, None], -shift)
    candidates = _short_scales(around / _AROUND, around * _AROUND, significant_bits)
    by_codebook = _level_errors(alive, candidates, codebook)
    by_uniform = _level_errors(alive, uniform[~is_zero].cpu(), levels.cpu())
    weight = torch.ldexp(torch.ones_like(by_uniform), 2 * shift)
    if float((weight * by_uniform).sum()) <= float((weight * by_codebook.amin(1, keepdim=True)).sum()):
        return uniform, levels
    found = uniform.clone()
    found[~is_zero] = candidates.gather(1, by_codebook.argmin(1, keepdim=True)).to(rows.device)
    return found, codebook.to(rows.device)


def _level_errors(rows: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Squared errors of rows at each of their scales ``[rows, n]``, float64; all on the CPU."""
    errors = np.empty(scales.shape)
    sum_level_errors(rows.numpy(), scales.contiguous().numpy(), table_of_levels(levels), errors)
    return torch.from_numpy(errors)


def _best_scales(rows: torch.Tensor, bits: int, significant_bits: int, *, has_signs: bool) -> torch.Tensor:
    """The scales ``[rows, 1]`` of least squared error among all candidates; no row is all zeros."""
    levels = 1 << (bits - 1)
    largest = rows.abs().amax(1, keepdim=True)
    # Up to the scale that uses half of the levels (beyond it, half the scale is as good): this finds weights that are
    # on a grid already. Down to a clip at half the rms, where a quarter of the energy is lost.
    rms = (_row_sums(rows.square()) / rows.shape[1]).sqrt().float()
    candidates = _short_scales(0.5 * rms / levels, 2 * largest / levels, significant_bits)
    best, least = _best_of(rows, candidates, levels)
    if not has_signs:
        return best
    if rows.shape[1] > _FEW_VALUES:
        candidates = _short_scales(best / _AROUND, best * _AROUND, significant_bits)
    mirrored, found = _best_of(rows, -candidates, levels)
    return torch.where(found < least, mirrored, best)


def _best_of(rows: torch.Tensor, scales: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of each row's scales ``[rows, n]`` for integers from ``-levels`` to below ``levels``, and its error."""
    if rows.device.type == "cpu":
        errors = np.empty(scales.shape)
        limits = np.float32(-levels), np.float32(levels - 1)
        sum_rounding_errors(rows.contiguous().numpy(), scales.contiguous().numpy(), *limits, errors)
        place = torch.from_numpy(errors.argmin(1))[:, None]
        return scales.gather(1, place), torch.from_numpy(errors).gather(1, place)
    best, least = scales[:, :1], torch.full_like(scales[:, :1], math.inf, dtype=torch.float64)
    buffer = torch.empty_like(rows)
    for scale in torch.split(scales, 1, 1):
        q = torch.div(rows, scale, out=buffer).round_().clamp_(-levels, levels - 1)
        error = _row_sums(q.mul_(scale).sub_(rows).square_())
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best, least


def _short_scales(smallest: torch.Tensor, largest: torch.Tensor, significant_bits: int) -> torch.Tensor:
    """All numbers of ``significant_bits`` from ``smallest`` to above ``largest``, ``[rows, n]``."""
    count = 1 << (significant_bits - 1)
    mantissa = torch.arange(count, 2 * count, device=smallest.device) / (2 * count)
    low = torch.frexp(smallest).exponent
    high = torch.frexp(largest * (1 + 1 / count)).exponent
    octaves = torch.arange(int((high - low).max()) + 1, device=smallest.device)
    power = torch.exp2((low + octaves).to(torch.float32)).unsqueeze(-1)
    return (mantissa * power).flatten(1)


def _float16_units(largest: torch.Tensor) -> torch.Tensor:
    """Scales for the largest values of rows: float16 keeps 11 significant bits from 2^-14 to 2^16."""
    exponent = torch.frexp(largest).exponent
    unit = torch.ldexp(torch.ones_like(largest), exponent)
    return torch.where((exponent > _LARGEST_EXPONENT) | (exponent < _SMALLEST_EXPONENT), unit, 1.0).clamp_min_(
        SMALLEST_SCALE
    )

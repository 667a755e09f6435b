"""Quantization of tensors: choose qparams, quantize, dequantize, fake quantize.

Pure functions over tensors on any device. The qparams of activations are chosen in
:mod:`infoq_fx.quantization.histogram`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from infoq_fx.errors import OptionError, UnsupportedModelError
from infoq_fx.quantization.codebooks import (
    choose_codebook,
    nearest_levels,
    sum_level_errors,
    table_of_levels,
    uniform_levels,
)
from infoq_fx.quantization.histogram import range_bits, scale_significant_bits
from infoq_fx.quantization.pointwise import (
    fake_quantize_flat,
    fake_quantize_sum,
    quantize_flat,
    quantize_sum,
    sum_rounding_errors,
)
from infoq_fx.types import QParams, QuantSpec

__all__ = [
    "choose_weight_qparams",
    "dequantize",
    "fake_quantize",
    "fake_quantize_ste",
    "flat_view",
    "quantize",
    "quantize_in_one_pass",
    "shorten_scale",
]

# A smaller scale would be subnormal, which accelerators flush to zero.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_CHUNK_ELEMENTS = 1 << 15  # small enough that torch uses one thread and the values stay in a core's cache
_SUM_BLOCK = 1024
_LARGEST_EXPONENT, _SMALLEST_EXPONENT = 15, -8  # of a row's largest value, without a scale in float16
_SMALLEST_SHIFT = -50  # of a row's exponent against the largest, for the choice of a codebook
_AROUND = 2.0**0.75  # the range of scales that are tried for a codebook, around the fitted one
_KERNEL_THREADS = 4  # with more threads, torch's own operations (several passes, but parallel) are faster


def choose_weight_qparams(weight: torch.Tensor, spec: QuantSpec, significant_bits: int | None = None) -> QParams:
    """Choose the symmetric scales that minimise the squared error of a weight, per channel or per tensor.

    With a codebook its levels are chosen first, see :func:`infoq_fx.quantization.codebooks.choose_codebook`; they are
    the uniform ones where those have less error, as for a weight that is on a grid already. Every scale that
    :func:`infoq_fx.quantization.histogram.scale_significant_bits` allows is tried, from strong clipping to none; around
    a codebook's fitted one, those within a factor of 1.7. With 16 bits the scale is 1, or a power of two where float16
    lacks the range.

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
    scale, levels = _best_of_uniform(normal, spec.bits, digits), None
    if spec.has_codebook:
        uniform = scale
        scale, levels = _best_of_codebook(normal, exponent, is_zero.flatten(), spec.bits, digits, uniform)
        if bool((torch.ldexp(scale, exponent)[~is_zero] < _SMALLEST_SCALE).any()):  # a codebook's scales are smaller
            scale, levels = uniform, None
    scale = torch.ldexp(scale, exponent).clamp_min_(_SMALLEST_SCALE)
    return _qparams(spec, torch.where(is_zero, _scale_of_zeros(scale[~is_zero]), scale).flatten(), levels=levels)


def quantize(x: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """Quantize a tensor to integers as ONNX QuantizeLinear does.

    ``saturate(round_half_even(x / scale) + zero_point)`` to ``quant_min .. quant_max``, with a true division.
    Infinities saturate; NaN becomes the zero point. With a codebook, the nearest level of ``x / scale``.

    Args:
        x: float, any shape and device.
        qparams: scale and zero point; moved to the device of ``x``.

    Returns:
        int8 (symmetric) or uint8 (affine), of the shape of ``x``; float16 for a weight of 16 bits.
    """
    spec = qparams.spec
    scale, zero_point = _broadcast(qparams, x)
    if spec.is_float:
        return (x.detach().to(torch.float32) / scale).to(torch.float16)
    if qparams.levels is not None:
        return nearest_levels(x.detach().to(torch.float32) / scale, qparams.levels).to(torch.int8)
    q = torch.round(x.detach().to(torch.float32) / scale).nan_to_num_(0.0, math.inf, -math.inf)
    q = q.add_(zero_point).clamp_(spec.quant_min, spec.quant_max)
    return q.to(torch.int8 if spec.symmetric else torch.uint8)


def dequantize(q: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """Dequantize integers as ONNX DequantizeLinear does: ``(q - zero_point) * scale``.

    Args:
        q: integers, or float16, as :func:`quantize` returns them.
        qparams: scale and zero point; moved to the device of ``q``.

    Returns:
        float32, of the shape of ``q``.
    """
    scale, zero_point = _broadcast(qparams, q)
    return (q.to(torch.float32) - zero_point).mul_(scale)


def fake_quantize(
    x: torch.Tensor,
    qparams: QParams,
    *,
    addend: torch.Tensor | None = None,
    clip: tuple[float, float] = (-math.inf, math.inf),
) -> torch.Tensor:
    """Fake quantize: equal to ``dequantize(quantize(x))`` bit for bit, except that NaN stays NaN.

    An addition and a clip before it can be done in the same pass over memory. With 16 bits nothing else is done to an
    activation, and a weight is rounded to float16.

    Args:
        x: float, any shape and device. No gradient flows: see :func:`fake_quantize_ste`.
        qparams: scale and zero point; moved to the device of ``x``.
        addend: added to ``x`` first.
        clip: range that ``x`` (with the addend) is limited to first, as by ReLU.

    Returns:
        float32, of the shape of ``x``.
    """
    if addend is not None and x.dtype != torch.float32:
        x, addend = x.detach() + addend.detach(), None
    spec, x = qparams.spec, x.detach().to(torch.float32)
    if spec.is_float:
        return _keep_float(x, qparams, addend, clip)
    is_plain = spec.channel_axis is None and qparams.levels is None
    if is_plain and x.device.type == "cpu" and torch.get_num_threads() <= _KERNEL_THREADS:
        return _fake_quantize_in_one_pass(x, qparams, addend, clip)
    x = x if addend is None else x + addend.detach()
    x = x.clamp(*clip) if clip != (-math.inf, math.inf) else x
    scale, zero_point = _broadcast(qparams, x)
    if qparams.levels is not None:
        return nearest_levels(x / scale, qparams.levels).mul_(scale)
    y = torch.round_(x / scale)
    # Comparing scalars would synchronize with the device. Adding the zero point turns -0.0 into 0.0.
    return y.add_(zero_point).clamp_(spec.quant_min, spec.quant_max).sub_(zero_point).mul_(scale)


def fake_quantize_ste(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
    channel_axis: int | None = None,
) -> torch.Tensor:
    """:func:`fake_quantize` with gradients for the tensor (straight-through) and for its scale (LSQ).

    The tensor's gradient passes straight through strictly inside the range and is 0 elsewhere; the scale's
    is ``round(x / scale) - x / scale`` inside, ``quant_min - zero_point`` below and
    ``quant_max - zero_point`` above. The gradient scale of Section 2.2, which balances the learning of step sizes and
    weights, is left to the caller.

    Args:
        x: float32.
        scale: positive, ``[channels]`` or ``[]``, on the device of ``x``.
        zero_point: of the same shape.
        quant_min: smallest integer.
        quant_max: largest integer.
        channel_axis: the axis of ``x`` that ``scale`` runs along; None for a scale ``[]``.

    Returns:
        float32, of the shape of ``x``.

    Reference:
        Esser et al., "Learned Step Size Quantization", 2019: Eq. 3 for the scale, Eq. 5 for the tensor.
    """
    shape = _broadcast_shape(x, channel_axis)
    scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    y: torch.Tensor = _LearnedStepSize.apply(x, scale, zero_point, quant_min, quant_max)
    return y


class _LearnedStepSize(torch.autograd.Function):
    """Autograd function of :func:`fake_quantize_ste`; ``scale`` and ``zero_point`` broadcast to ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int) -> Any:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.limits = quant_min, quant_max
        return (torch.round(x / scale) + zero_point).clamp(quant_min, quant_max).sub(zero_point).mul(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x, scale, zero_point), (quant_min, quant_max) = ctx.saved_tensors, ctx.limits
        ratio = x / scale
        level = ratio + zero_point
        is_inside = (level > quant_min) & (level < quant_max)
        outside = level.clamp(quant_min, quant_max) - zero_point
        slope = torch.where(is_inside, torch.round(ratio) - ratio, outside)
        return grads[0] * is_inside, (grads[0] * slope).sum_to_size(scale.shape), None, None, None


def shorten_scale(scale: torch.Tensor, significant_bits: int) -> torch.Tensor:
    """Round scales to ``significant_bits``; see :func:`infoq_fx.quantization.histogram.scale_significant_bits`."""
    mantissa, exponent = torch.frexp(scale)
    short = torch.round(mantissa * (1 << significant_bits)) / (1 << significant_bits)
    return torch.ldexp(short, exponent).clamp_min(_SMALLEST_SCALE)


def flat_view(x: torch.Tensor) -> Any:
    """Return the memory of a dense CPU tensor, in its own order, as a one-dimensional numpy array."""
    return x.detach().as_strided((x.numel(),), (1,)).numpy()


def quantize_in_one_pass(
    x: torch.Tensor,
    qparams: QParams,
    *,
    addend: torch.Tensor | None = None,
    clip: tuple[float, float] = (-math.inf, math.inf),
) -> torch.Tensor:
    """Return the integers of :func:`fake_quantize` with the same arguments, uint8, in one pass on the CPU.

    Args:
        x: float32 on the CPU, without NaN.
        qparams: affine, for the whole tensor.
        addend: as in :func:`fake_quantize`.
        clip: as in :func:`fake_quantize`.
    """
    first, second = _dense_alike(x.detach(), addend)
    out = torch.empty_like(first, dtype=torch.uint8)
    scale, low, high = _rounded_limits(qparams, clip)
    shift = np.float32(int(qparams.zero_point))
    if second is None:
        quantize_flat(flat_view(first), scale, low, high, shift, flat_view(out))
    else:
        quantize_sum(flat_view(first), flat_view(second), scale, low, high, shift, flat_view(out))
    return out


def _keep_float(
    x: torch.Tensor, qparams: QParams, addend: torch.Tensor | None, clip: tuple[float, float]
) -> torch.Tensor:
    x = x if addend is None else x + addend.detach()
    x = x.clamp(*clip) if clip != (-math.inf, math.inf) else x
    return dequantize(quantize(x, qparams), qparams) if qparams.spec.symmetric else x


def _float16_units(largest: torch.Tensor) -> torch.Tensor:
    """Scales for the largest values of rows: float16 keeps 11 significant bits from 2^-14 to 2^16."""
    exponent = torch.frexp(largest).exponent
    unit = torch.ldexp(torch.ones_like(largest), exponent)
    return torch.where((exponent > _LARGEST_EXPONENT) | (exponent < _SMALLEST_EXPONENT), unit, 1.0).clamp_min_(
        _SMALLEST_SCALE
    )


def _fake_quantize_in_one_pass(
    x: torch.Tensor, qparams: QParams, addend: torch.Tensor | None, clip: tuple[float, float]
) -> torch.Tensor:
    first, second = _dense_alike(x, addend)
    out = torch.empty_like(first)
    scale, low, high = _rounded_limits(qparams, clip)
    if second is None:
        fake_quantize_flat(flat_view(first), scale, low, high, flat_view(out))
    else:
        fake_quantize_sum(flat_view(first), flat_view(second), scale, low, high, flat_view(out))
    return out


def _rounded_limits(qparams: QParams, clip: tuple[float, float]) -> tuple[np.float32, np.float32, np.float32]:
    """Scale, and the limits of ``round(x / scale)``, clip included: rounding is monotone."""
    spec, shift = qparams.spec, int(qparams.zero_point)
    scale = np.float32(float(qparams.scale.detach()))
    limits = (np.rint(np.float32(bound) / scale) for bound in clip)
    low, high = (np.float32(min(max(q, spec.quant_min - shift), spec.quant_max - shift)) for q in limits)
    return scale, low, high


def _dense_alike(x: torch.Tensor, y: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Both tensors dense and in the same memory order, copied only where they are not."""
    if y is not None and y.shape != x.shape:
        x, y = x + y, None
    layout = torch.channels_last if x.ndim == 4 and not x.is_contiguous() else torch.contiguous_format
    x = x.contiguous(memory_format=layout)
    if y is not None:
        y = y.detach().to(torch.float32).contiguous(memory_format=layout)
        y = y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)
    return x, y


def _broadcast_shape(x: torch.Tensor, channel_axis: int | None) -> list[int]:
    shape = [1] * x.ndim if channel_axis is not None else []
    if channel_axis is not None:
        shape[channel_axis] = -1
    return shape


def _broadcast(qparams: QParams, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point, shaped for ``x`` and on its device.

    CUDA kernels divide by a CPU scalar by multiplying with its inverse, which can be off by one step.
    """
    shape = _broadcast_shape(x, qparams.spec.channel_axis)
    return qparams.scale.detach().to(x.device).reshape(shape), qparams.zero_point.to(x.device).reshape(shape)


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


def _best_of_uniform(rows: torch.Tensor, bits: int, significant_bits: int) -> torch.Tensor:
    count = max(1, _CHUNK_ELEMENTS // rows.shape[1])
    return torch.cat([_best_scales(chunk, bits, significant_bits) for chunk in torch.split(rows, count)])


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


def _best_scales(rows: torch.Tensor, bits: int, significant_bits: int) -> torch.Tensor:
    """The scales ``[rows, 1]`` of least squared error among all candidates; no row is all zeros."""
    levels = 1 << (bits - 1)
    largest = rows.abs().amax(1, keepdim=True)
    # Up to the scale that uses half of the levels (beyond it, half the scale is as good): this finds weights that are
    # on a grid already. Down to a clip at half the rms, where a quarter of the energy is lost.
    rms = (_row_sums(rows.square()) / rows.shape[1]).sqrt().float()
    candidates = _short_scales(0.5 * rms / levels, 2 * largest / levels, significant_bits)
    if rows.device.type == "cpu":
        errors = np.empty(candidates.shape)
        limits = np.float32(-levels), np.float32(levels - 1)
        sum_rounding_errors(rows.contiguous().numpy(), candidates.contiguous().numpy(), *limits, errors)
        return candidates.gather(1, torch.from_numpy(errors.argmin(1))[:, None])
    best, least = candidates[:, :1], torch.full_like(largest, math.inf, dtype=torch.float64)
    buffer = torch.empty_like(rows)
    for scale in torch.split(candidates, 1, 1):
        q = torch.div(rows, scale, out=buffer).round_().clamp_(-levels, levels - 1)
        error = _row_sums(q.mul_(scale).sub_(rows).square_())
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _short_scales(smallest: torch.Tensor, largest: torch.Tensor, significant_bits: int) -> torch.Tensor:
    """All numbers of ``significant_bits`` from ``smallest`` to above ``largest``, ``[rows, n]``."""
    count = 1 << (significant_bits - 1)
    mantissa = torch.arange(count, 2 * count, device=smallest.device) / (2 * count)
    low = torch.frexp(smallest).exponent
    high = torch.frexp(largest * (1 + 1 / count)).exponent
    octaves = torch.arange(int((high - low).max()) + 1, device=smallest.device)
    power = torch.exp2((low + octaves).to(torch.float32)).unsqueeze(-1)
    return (mantissa * power).flatten(1)

"""Quantization of tensors: quantize, dequantize, fake quantize.

Pure functions over tensors on any device. Qparams are chosen in :mod:`infoq_fx.quantization.weight_qparams` and
:mod:`infoq_fx.quantization.histogram`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from infoq_fx.quantization.codebooks import (
    nearest_levels,
)
from infoq_fx.quantization.pointwise import (
    fake_quantize_flat,
    fake_quantize_sum,
    quantize_flat,
    quantize_sum,
)
from infoq_fx.types import QParams

__all__ = [
    "SMALLEST_SCALE",
    "dequantize",
    "fake_quantize",
    "fake_quantize_ste",
    "flat_view",
    "grow_scale",
    "keep_size",
    "quantize",
    "quantize_in_one_pass",
    "shorten_scale",
]

# A smaller scale would be subnormal, which accelerators flush to zero.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_KERNEL_THREADS = 4  # with more threads, torch's own operations (several passes, but parallel) are faster


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
        scale: not 0, ``[channels]`` or ``[]``, on the device of ``x``.
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


def grow_scale(scale: torch.Tensor, least: float) -> torch.Tensor:
    """Return scales of any shape, of the same signs and of at least this size."""
    return scale.abs().clamp_min_(least).copysign_(scale)


def shorten_scale(scale: torch.Tensor, significant_bits: int) -> torch.Tensor:
    """Round scales to ``significant_bits``; see :func:`infoq_fx.quantization.histogram.scale_significant_bits`.

    Signs stay.
    """
    mantissa, exponent = torch.frexp(scale)
    short = torch.round(mantissa * (1 << significant_bits)) / (1 << significant_bits)
    return grow_scale(torch.ldexp(short, exponent), SMALLEST_SCALE)


def keep_size(scale: torch.Tensor, smallest: torch.Tensor) -> torch.Tensor:
    """Return learned scales ``[channels]`` or ``[]``, limited to the signs of ``smallest`` and at least its sizes."""
    return torch.where(smallest < 0, torch.minimum(scale, smallest), torch.maximum(scale, smallest))


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

"""From float tensors to integers and back: choose qparams, quantize, dequantize, fake quantize.

Pure functions over tensors on any device. The accumulator behind an activation's qparams, and their choice,
lie in :mod:`infoq_fx.histogram` and are offered here too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from infoq_fx.errors import OptionError, UnsupportedModelError
from infoq_fx.histogram import MAX_BINS, MAX_VALUES_PER_SAMPLE, Histogram, choose_activation_qparams
from infoq_fx.spec import QParams, QuantSpec

__all__ = [
    "MAX_BINS",
    "MAX_VALUES_PER_SAMPLE",
    "Histogram",
    "choose_activation_qparams",
    "choose_weight_qparams",
    "dequantize",
    "fake_quantize",
    "fake_quantize_ste",
    "quantize",
]

# A smaller scale would be subnormal, which accelerators flush to zero.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# Up to so many rounding thresholds a channel, sorting them (100 ns each) is affordable and exact.
_MAX_SWEPT_THRESHOLDS = 8192
_CHUNK_ELEMENTS = 1 << 16  # 256 KiB of float32: the grid search stays in a core's cache
_SUM_BLOCK = 1024


def choose_weight_qparams(weight: torch.Tensor, spec: QuantSpec) -> QParams:
    """Symmetric scales that minimise the squared error of a weight, one a channel or one for all.

    A channel with few values is solved exactly: every scale at which one of them rounds differently is
    visited in order. A longer one gets a coarse grid of scales, a fine one around its best, then alternating
    least squares.

    Args:
        weight: float, any shape; at most four times its memory (and a few MiB) is used besides.
        spec: symmetric, with the bit-width and the channel axis.

    Returns:
        Scales on the weight's device (1 for a channel of zeros); zero points are 0.

    Raises:
        OptionError: ``spec`` is affine.
        UnsupportedModelError: the weight holds NaN or infinite values.
    """
    if not spec.symmetric:
        raise OptionError(
            f"weights take a symmetric QuantSpec, got {spec}; use replace(spec, symmetric=True)"
        )
    rows = _rows(weight.detach(), spec.channel_axis)
    if rows.shape[1] == 0:
        return _qparams(spec, torch.ones(len(rows), device=rows.device))
    largest = rows.abs().amax(1, keepdim=True)
    if not bool(torch.isfinite(largest).all()):
        raise UnsupportedModelError(
            f"cannot quantize a weight of shape {tuple(weight.shape)}: {int((~weight.isfinite()).sum())} of "
            f"its {weight.numel()} values are NaN or infinite; load a sound checkpoint, or ignore this layer"
        )
    # Powers of two scale exactly and keep squares far from overflow and underflow.
    exponent = torch.frexp(largest).exponent.clamp_(-125, 126)
    nonzeros = max(1, int((rows != 0).sum(1).max()))
    thresholds = nonzeros << (spec.bits - 1)
    search, size = _search_scales, rows.shape[1]
    if thresholds <= _MAX_SWEPT_THRESHOLDS:
        search, size = _sweep_scales, thresholds
        rows = rows.gather(1, rows.abs().topk(nonzeros).indices)
    count = max(1, _CHUNK_ELEMENTS // size)
    chunks = zip(torch.split(rows, count), torch.split(exponent, count), strict=True)
    scale = torch.cat([search(torch.ldexp(chunk, -power), spec.bits) for chunk, power in chunks])
    scale = torch.ldexp(scale, exponent).clamp_min_(_SMALLEST_SCALE)
    return _qparams(spec, torch.where(largest > 0, scale, 1.0).flatten())


def quantize(x: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """Integers of a tensor by the rule of ONNX QuantizeLinear.

    ``saturate(round_half_even(x / scale) + zero_point)`` to ``quant_min .. quant_max``, with a true division.
    Infinities saturate; NaN becomes the zero point.

    Args:
        x: float, any shape and device.
        qparams: how; moved to the device of ``x``.

    Returns:
        int8 (symmetric) or uint8 (affine), of the shape of ``x``.
    """
    spec = qparams.spec
    scale, zero_point = _broadcast(qparams, x)
    q = torch.round(x.detach().to(torch.float32) / scale).nan_to_num_(0.0, math.inf, -math.inf)
    q = q.add_(zero_point).clamp_(spec.quant_min, spec.quant_max)
    return q.to(torch.int8 if spec.symmetric else torch.uint8)


def dequantize(q: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """Values of integers by the rule of ONNX DequantizeLinear, ``(q - zero_point) * scale``.

    Args:
        q: integers as :func:`quantize` returns them.
        qparams: how; moved to the device of ``q``.

    Returns:
        float32, of the shape of ``q``.
    """
    scale, zero_point = _broadcast(qparams, q)
    return (q.to(torch.float32) - zero_point).mul_(scale)


def fake_quantize(x: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """``dequantize(quantize(x))`` bit for bit, without the integers; only NaN stays NaN.

    Args:
        x: float, any shape and device. No gradient flows: see :func:`fake_quantize_ste`.
        qparams: how; moved to the device of ``x``.

    Returns:
        float32, of the shape of ``x``.
    """
    spec = qparams.spec
    scale, zero_point = _broadcast(qparams, x)
    y = torch.round_(x.detach().to(torch.float32) / scale)
    if spec.channel_axis is None and y.device.type == "cpu":
        # Plain numbers vectorise where 0-d tensors do not. 0 + y * scale makes -0.0 plain, as integers do.
        shift = int(zero_point)
        y.clamp_(spec.quant_min - shift, spec.quant_max - shift)
        return torch.add(torch.zeros(()), y, alpha=float(scale), out=y)
    # Elsewhere reading a number would wait for the device. Adding the zero point makes -0.0 plain.
    return y.add_(zero_point).clamp_(spec.quant_min, spec.quant_max).sub_(zero_point).mul_(scale)


def fake_quantize_ste(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
    channel_axis: int | None = None,
) -> torch.Tensor:
    """:func:`fake_quantize` with gradients for the tensor and for its scale.

    The tensor's gradient passes straight through strictly inside the range and is 0 elsewhere; the scale's
    is ``round(x / scale) - x / scale`` inside, ``quant_min - zero_point`` below and
    ``quant_max - zero_point`` above. The factor of Section 2.2, which balances learning a step size with
    learning weights, is left to the caller.

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
    y: torch.Tensor = _LearnedStepSize.apply(
        x, scale.reshape(shape), zero_point.reshape(shape), quant_min, quant_max
    )
    return y


class _LearnedStepSize(torch.autograd.Function):
    """Fake quantize; ``scale`` and ``zero_point`` broadcast to ``x``."""

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
        slope = torch.where(
            is_inside, torch.round(ratio) - ratio, level.clamp(quant_min, quant_max) - zero_point
        )
        return grads[0] * is_inside, (grads[0] * slope).sum_to_size(scale.shape), None, None, None


def _broadcast_shape(x: torch.Tensor, channel_axis: int | None) -> list[int]:
    shape = [1] * x.ndim if channel_axis is not None else []
    if channel_axis is not None:
        shape[channel_axis] = -1
    return shape


def _broadcast(qparams: QParams, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point, shaped for ``x`` and on its device.

    CUDA kernels divide by a number on the CPU by multiplying with its inverse: off by single steps.
    """
    shape = _broadcast_shape(x, qparams.spec.channel_axis)
    return qparams.scale.to(x.device).reshape(shape), qparams.zero_point.to(x.device).reshape(shape)


def _qparams(spec: QuantSpec, scale: torch.Tensor, zero_point: int = 0) -> QParams:
    scale = scale.reshape(()) if spec.channel_axis is None else scale
    return QParams(spec, scale, torch.full_like(scale, zero_point, dtype=torch.int32))


def _rows(weight: torch.Tensor, channel_axis: int | None) -> torch.Tensor:
    """Float32 ``[channels, values]``; long rows are padded to whole blocks by zeros, which cost no error."""
    rows = weight.reshape(1, -1) if channel_axis is None else weight.movedim(channel_axis, 0).flatten(1)
    padding = -rows.shape[1] % _SUM_BLOCK if rows.shape[1] > 16 * _SUM_BLOCK else 0
    return functional.pad(rows.to(torch.float32), (0, padding))


def _row_sums(values: torch.Tensor) -> torch.Tensor:
    """Float64 sums ``[rows, 1]``. One thread sums a block, so the number of threads changes no bit."""
    block = _SUM_BLOCK if values.shape[1] > 16 * _SUM_BLOCK else values.shape[1]
    return values.view(len(values), -1, block).sum(-1).sum(-1, keepdim=True, dtype=torch.float64)


def _sweep_scales(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """Best scales ``[rows, 1]``, exactly.

    While 1 / scale grows, a value w steps up to level k at (k - 1/2) / abs(w). Between two such thresholds
    the integers q stay, their best scale is <w, q> / <q, q>, and it leaves <w, w> - <w, q>^2 / <q, q>.
    """
    level = torch.arange(1, (1 << (bits - 1)) + 1, dtype=torch.float64, device=rows.device)
    size = rows.abs().double().unsqueeze(-1)
    threshold, step = (level - 0.5) / size, size.expand(*rows.shape, len(level)).clone()
    # The positive side has one level less: its last threshold never comes.
    threshold[..., -1].masked_fill_(rows > 0, math.inf)
    step[..., -1].masked_fill_(rows > 0, 0.0)
    order = threshold.flatten(1).argsort(dim=1, stable=True)
    product = step.flatten(1).gather(1, order).cumsum(1)
    square = (2 * level - 1).repeat(rows.shape[1])[order].cumsum(1)
    best = (product * product / square).argmax(1, keepdim=True)
    return (product.gather(1, best) / square.gather(1, best)).float()


def _search_scales(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """Good scales ``[rows, 1]``: coarse grid, fine grid around its best, then least squares from the best."""
    levels = 1 << (bits - 1)
    full = rows.abs().amax(1, keepdim=True).clamp_min(_SMALLEST_SCALE) / levels
    # From the largest value on half the levels (with less, half the scale serves as well), in steps that find
    # weights on a grid already, down to a full scale of half the rms, where a quarter of the energy is lost.
    rms = (_row_sums(rows.square()) / rows.shape[1]).sqrt().float()
    lowest = (0.5 * rms / (full * levels)).clamp(1e-4, 0.25)
    parts = torch.linspace(0.5, 1.0, max(33, levels // 2 + 1), device=rows.device)
    powers = torch.linspace(0.0, 1.0, 41, device=rows.device)[1:]
    coarse = torch.cat([full / parts, full * lowest**powers], 1)
    best = _least_errors(rows, coarse, levels, 1)
    # Within 10 %, in steps that move the largest value by a sixteenth of a level.
    reach = round(1.6 * levels)
    fine = best * (1 + torch.arange(-reach, reach + 1, device=rows.device) / (16 * levels))
    tries = [_least_errors(rows, fine, levels, 4)]
    for _ in range(3):
        tries.append(_refit_scales(rows, tries[-1], levels))
    return _least_errors(rows, torch.cat(tries, 1), levels, 1)


def _least_errors(rows: torch.Tensor, scales: torch.Tensor, levels: int, count: int) -> torch.Tensor:
    """Of ``scales`` ``[rows, candidates]`` the ``count`` with the least squared errors, row by row."""
    errors = torch.empty(scales.shape, dtype=torch.float64, device=rows.device)
    buffer = torch.empty_like(rows)
    for i, scale in enumerate(torch.split(scales, 1, 1)):
        q = torch.div(rows, scale, out=buffer).round_().clamp_(-levels, levels - 1)
        errors[:, i : i + 1] = _row_sums(q.mul_(scale).sub_(rows).square_())
    return scales.gather(1, errors.argsort(dim=1, stable=True)[:, :count])


def _refit_scales(rows: torch.Tensor, scales: torch.Tensor, levels: int) -> torch.Tensor:
    """The least-squares scales of the integers that ``scales`` ``[rows, candidates]`` lead to."""
    refitted = []
    for scale in torch.split(scales, 1, 1):
        q = torch.div(rows, scale).round_().clamp_(-levels, levels - 1)
        square = _row_sums(q.square())
        refit = (_row_sums(q.mul_(rows)) / square.clamp_min(1.0)).float()
        refitted.append(torch.where(refit > 0, refit, scale))
    return torch.cat(refitted, 1)

"""Chooses a power of two for every channel of some tensors, so that rounding them costs the layers behind least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infoq_fx.quantization.histogram import Histogram, choose_activation_qparams
from infoq_fx.quantization.numerics import fake_quantize
from infoq_fx.quantization.weight_qparams import choose_weight_qparams
from infoq_fx.types import FLOAT16_BITS, QParams, QuantSpec

__all__ = ["Reader", "RoundedTensor", "choose_factors"]

_MOST_OCTAVES = 6
_COST_OF_WEIGHTS = 4.0
_PARTS = 4  # step sizes that are tried in each octave
_CHUNKS = 64  # parts of a tensor that a histogram is updated with; it counts a few thousand values of each


@dataclass(frozen=True)
class RoundedTensor:
    """A quantized tensor: values of each channel, float32 ``[channels, values]``, and what reads it.

    ``energy [channels]`` are the sums of the squared weights that a channel is multiplied by.
    """

    values: Tensor
    energy: Tensor
    spec: QuantSpec


@dataclass(frozen=True)
class Reader:
    """A layer that reads the channels, with its weight as rows of outputs, float32 ``[groups, rows, columns]``.

    The rows may be one in ``every`` so many. ``variance [channels]`` is that of the channels that it reads: what their
    means add to its output is left to the bias.
    """

    rows: Tensor
    every: int
    bits: int
    variance: Tensor

    def spread(self, by_channel: Tensor) -> Tensor:
        """Repeat values of channels for their columns, ``[groups, 1, columns]``."""
        groups, _, columns = self.rows.shape
        return by_channel.repeat_interleave(groups * columns // len(by_channel)).reshape(groups, 1, columns)

    def energy(self) -> Tensor:
        """Return the sum of the squared weights of every channel."""
        return self.every * self.rows.square().sum(1).reshape(len(self.variance), -1).sum(1)


def choose_factors(
    tensors: Sequence[RoundedTensor], readers: Sequence[Reader], highest: Tensor
) -> tuple[Tensor, float]:
    """Choose the factors of least squared error of the readers' outputs, powers of two from 1 to 2^6.

    The error is the sum over channels of the squared error of the rounded tensor times its energy, and of the variance
    of the channel times the squared error of its rounded weights, which are divided by the factor. The latter counts
    four times: it is the same for all samples, and costs more (measured on MobileNetV2). Errors of different channels
    are taken as independent, so that each channel has its own best factor for a common step size of the tensor. Tried
    are these factors, their square roots and those that make ``range / largest weight`` equal, each rounded to powers
    of two; the weights' errors decide among them.

    Args:
        tensors: all tensors that are multiplied; the error is their sum.
        readers: the layers whose weights are divided.
        highest: largest log2 of the factors, ``[channels]``.

    Returns:
        The factors, float32 ``[channels]``, and their error relative to that without factors.

    Reference:
        Xiao et al., "SmoothQuant", arXiv 2211.10438, Eq. 4 with migration strength 0.5, for the last of the three.
    """
    ranges = torch.stack([tensor.values.abs().amax(1) for tensor in tensors]).amax(0)
    highest = highest.clamp(0, _MOST_OCTAVES)
    is_alive = (ranges > 0) & (torch.stack([reader.energy() for reader in readers]).amax(0) > 0)
    before = _total_error(tensors, readers, torch.ones_like(ranges))
    best = torch.ones_like(ranges), before
    for octaves in _propose(tensors, readers, ranges, highest):
        factors = octaves.clamp_min(0).minimum(highest).where(is_alive, 0.0).exp2()
        error = _total_error(tensors, readers, factors)
        if error < best[1]:
            best = factors, error
    return best[0], best[1] / before if before > 0 else 1.0


def _propose(
    tensors: Sequence[RoundedTensor], readers: Sequence[Reader], ranges: Tensor, highest: Tensor
) -> Iterator[Tensor]:
    """Proposals for log2 of the factors, integers ``[channels]``."""
    rounded = [tensor for tensor in tensors if not tensor.spec.is_float]
    if rounded:
        for found in _best_octaves(rounded, highest):
            yield found
            yield (found / 2).round()
    weights = torch.stack([reader.rows.abs().amax(1).reshape(len(ranges), -1).amax(1) for reader in readers]).amax(0)
    is_alive = (ranges > 0) & (weights > 0)
    balanced = 0.5 * (weights.where(is_alive, 1.0).log2() - ranges.where(is_alive, 1.0).log2())
    logs = ranges.where(is_alive, 1.0).log2()
    if bool(is_alive.any()):  # the largest range is kept
        balanced = balanced + logs[is_alive].max() - (balanced + logs)[is_alive].max()
    yield balanced.round()


def _best_octaves(tensors: Sequence[RoundedTensor], highest: Tensor) -> list[Tensor]:
    """For several step sizes of the tensors within an octave, the octaves of each channel's least error at it."""
    reach = range(-2 * _MOST_OCTAVES * _PARTS, 2 * _MOST_OCTAVES * _PARTS + 1)
    errors = torch.stack([_errors_by_step(tensor, [2.0 ** (k / _PARTS) for k in reach]) for tensor in tensors]).sum(0)
    octaves = torch.arange(_MOST_OCTAVES + 1, device=errors.device)
    is_out = octaves[:, None] > highest
    best: dict[int, tuple[float, Tensor]] = {}
    for phase in range(-_MOST_OCTAVES * _PARTS, _MOST_OCTAVES * _PARTS + 1):
        places = phase - _PARTS * octaves - reach.start
        least = errors[places].masked_fill(is_out, torch.inf).min(0)
        found = float(least.values.sum()), octaves[least.indices].float()
        best[phase % _PARTS] = min(best.get(phase % _PARTS, found), found, key=lambda x: x[0])
    return [found for _, found in best.values()]


def _errors_by_step(tensor: RoundedTensor, steps: Sequence[float]) -> Tensor:
    """The weighted error of every channel with multiples of the tensor's best step size, ``[steps, channels]``."""
    qparams = _choose_qparams(tensor.values, tensor.spec)
    zero_point = int(qparams.zero_point)
    low, high = tensor.spec.quant_min - zero_point, tensor.spec.quant_max - zero_point
    found = []
    for scale in (float(qparams.scale) * step for step in steps):
        rounded = (tensor.values / scale).round_().clamp_(low, high).mul_(scale)
        found.append(rounded.sub_(tensor.values).square_().mean(1) * tensor.energy)
    return torch.stack(found)


def _choose_qparams(values: Tensor, spec: QuantSpec) -> QParams:
    histogram = Histogram()
    for chunk in values.flatten().chunk(_CHUNKS):
        histogram.update(chunk[None])
    return choose_activation_qparams(histogram, spec)


def _total_error(tensors: Sequence[RoundedTensor], readers: Sequence[Reader], factors: Tensor) -> float:
    total = 0.0
    for tensor in tensors:
        if not tensor.spec.is_float:
            scaled = tensor.values * factors[:, None]
            rounded = fake_quantize(scaled, _choose_qparams(scaled, tensor.spec)) / factors[:, None]
            total += float(((rounded - tensor.values).square().mean(1) * tensor.energy).sum())
    for reader in readers:
        if reader.bits != FLOAT16_BITS:
            columns, spec = reader.spread(factors), QuantSpec(bits=reader.bits, symmetric=True, channel_axis=0)
            scaled = (reader.rows / columns).flatten(0, 1)
            rounded = fake_quantize(scaled, choose_weight_qparams(scaled, spec)).view_as(reader.rows) * columns
            difference = (rounded - reader.rows).square() * reader.spread(reader.variance)
            total += _COST_OF_WEIGHTS * reader.every * float(difference.sum())
    return total

"""Differentiable rounding (AdaRound): every weight lies between two levels until it is rounded to one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from infoq_fx.graph.layers import read_tensor
from infoq_fx.graph.passes.quantize_biases import find_zero_channels
from infoq_fx.quantization.codebooks import find_levels, nearest_levels
from infoq_fx.quantization.numerics import flat_view
from infoq_fx.quantization.pointwise import draw_share, fake_quantize_but_share
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.quantization.quantizers import Quantizer
from infoq_fx.recovery.layerwise_runner import SegmentRunner
from infoq_fx.recovery.parameters import read_qparams
from infoq_fx.recovery.segments import Layer, Segment
from infoq_fx.types import QParams

__all__ = ["SoftBlock", "SoftWeight", "begin_soft_block"]

_STRETCH = 0.1  # the sigmoid is stretched by this much on each side and clipped, so that it reaches 0 and 1
_FIRST_SHARE = 0.8  # initial share of the integer that a weight is rounded to


@dataclass(frozen=True)
class SoftWeight:
    """A weight between the levels ``floor`` and ``floor + gap``, set by ``logit``; all have the weight's shape.

    ``scale`` broadcasts to it. Each weight can take two levels: the one that it is rounded to when learning begins,
    and the next one on the side of the float weight. If there is no second, the weight stays at the first. Levels are
    all integers of the bit-width, or those of a codebook.
    """

    layer: Layer
    floor: Tensor
    gap: Tensor
    logit: nn.Parameter
    scale: Tensor
    qparams: QParams

    def shares(self) -> Tensor:
        """Return each weight's distance from its floor, 0 to 1."""
        return (torch.sigmoid(self.logit) * (1 + 2 * _STRETCH) - _STRETCH).clamp(0, 1)

    def value(self) -> Tensor:
        """Return the weight at its current place between the levels."""
        return (self.floor + self.shares() * self.gap) * self.scale

    def rounded(self) -> Tensor:
        """Return the weight rounded to the nearer level."""
        with torch.no_grad():
            return (self.floor + (self.shares() >= 0.5) * self.gap) * self.scale


class SoftBlock(SegmentRunner):
    """Runs a segment with soft weights, learned biases, and activations of which a share stays in float (QDrop)."""

    def __init__(
        self,
        prepared: PreparedModel,
        bits: Mapping[str, int],
        weights: Mapping[str, SoftWeight],
        biases: Mapping[str, nn.Parameter],
        drop: float,
    ) -> None:
        super().__init__(prepared, bits)
        self._weights, self._biases, self._drop = weights, biases, drop
        self._generator = torch.Generator()
        self._before, self._samples = 0, 1

    def draw(self, seed: int, before: int, samples: int) -> SoftBlock:
        """Return a copy that may run in another thread, with its own random choice of what stays in float.

        A run of ``samples`` samples, with ``before`` others before them, draws what one of all together would draw
        for them, if samples are the first axis.
        """
        forked = self.fork()
        forked._generator = torch.Generator().manual_seed(seed)
        forked._before, forked._samples = before, samples
        return forked

    def get_attr(self, target: object, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
        """Return a learned bias, or any other parameter."""
        if str(target) in self._biases:
            return self._biases[str(target)]
        found: Tensor = super().get_attr(target, args, kwargs)
        return found

    def quantize(self, quantizer: Quantizer, x: Tensor) -> Tensor:
        """Return soft weights, and activations fake quantized except for some of their values."""
        soft = self._weights.get(quantizer.site.name)
        if soft is not None:
            return soft.value()
        if quantizer.site.kind == "weight":
            return super().quantize(quantizer, x)
        qparams = quantizer.qparams_at(self._bits_of(quantizer))
        if qparams.spec.is_float:
            return x
        seed = int(torch.randint(1 << 62, (), generator=self._generator)) if self._drop else 0
        first = self._before * (x.numel() // self._samples)
        y: Tensor = _DropQuantize.apply(x, qparams, self._drop, seed, first)
        return y


class _DropQuantize(torch.autograd.Function):
    """Fake quantizes all but a share of the activations; the gradient passes straight through within the range.

    ``first`` is the number of the first value among those that the seed draws for. On a CPU, forward and backward take
    one pass over memory each.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, qparams: QParams, share: float, seed: int, first: int = 0) -> Any:
        spec, step, zero_point = qparams.spec, float(qparams.scale), int(qparams.zero_point)
        low, high = spec.quant_min - zero_point, spec.quant_max - zero_point
        ctx.save_for_backward(x)
        ctx.range = low * step, high * step
        y = torch.empty_like(x)
        if x.device.type == "cpu" and x.dtype == torch.float32 and y.stride() == x.stride():
            numbers = np.float32(step), np.float32(low), np.float32(high)
            fake_quantize_but_share(flat_view(x), *numbers, share, seed, first, flat_view(y))
            return y
        is_float = torch.empty_like(x, dtype=torch.bool, device="cpu")
        draw_share(share, seed, first, flat_view(is_float))
        return torch.where(is_float.to(x.device), x, torch.round(x / step).clamp_(low, high).mul_(step))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grads[0], x, *ctx.range), None, None, None, None


def begin_soft_block(
    prepared: PreparedModel, segment: Segment, bits: Mapping[str, int]
) -> tuple[dict[str, SoftWeight], dict[str, nn.Parameter]]:
    """Create soft weights by site and learnable biases by path, from their current values.

    A weight starts near the level that it is rounded to, with a share of 0.2 for the other one. Weights in float
    are not learned.
    """
    weights, biases = {}, {}
    origin = prepared.origin or prepared
    for layer in segment.layers:
        qparams = read_qparams(prepared, layer, bits)
        if layer.bias is not None:
            biases[layer.bias] = nn.Parameter(read_tensor(prepared.graph_module, layer.bias).clone())
        if qparams.spec.is_float:
            continue
        axis = qparams.spec.channel_axis
        shape = [-1 if i == axis else 1 for i in range(len(layer.site.shape))]
        scale = qparams.scale.reshape(shape)
        levels = find_levels(qparams).float()
        now = nearest_levels(read_tensor(prepared.graph_module, layer.weight) / scale, levels)
        weight = read_tensor(origin.graph_module, layer.weight)
        is_above = weight / scale < now
        place = torch.searchsorted(levels, now.contiguous()) - is_above.long()
        floor = levels[place.clamp(0, len(levels) - 1)]
        gap = levels[(place + 1).clamp(0, len(levels) - 1)] - floor
        share = torch.where(is_above, _FIRST_SHARE, 1 - _FIRST_SHARE)
        # Where there is no second level, the weight cannot move, and a channel of zeros stays its bias.
        stays_up, stays_down = place < 0, place + 1 >= len(levels)
        stays_down |= find_zero_channels(weight, axis).reshape(shape)
        logit = torch.logit((share + _STRETCH) / (1 + 2 * _STRETCH))
        logit = logit.masked_fill(stays_up, 1e3).masked_fill(stays_down, -1e3)
        weights[layer.site.name] = SoftWeight(layer, floor, gap, nn.Parameter(logit), scale, qparams)
    return weights, biases

"""Unfolds layers into matrix products: rows of the weight times rows of the input that each output sums over."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from infoq_fx.graph.layers import RECURRENT_OPS
from infoq_fx.recovery.moments.row_products import Rows
from infoq_fx.recovery.segments import Layer
from infoq_fx.runtime.integer_convolution import QuantizedTensor

__all__ = [
    "InputSource",
    "can_unfold",
    "columns_of",
    "groups_of",
    "input_rows",
    "rows_to_weight",
    "sources_of",
    "weight_to_rows",
]

_ATEN = torch.ops.aten
_GOLDEN = (math.sqrt(5) - 1) / 2


def can_unfold(layer: Layer) -> bool:
    """Return whether a layer can be unfolded, as all can but transposed convolutions and projections of an LSTM."""
    return not layer.op.is_transposed and not (layer.op.is_recurrent and _place_of_weight(layer, layer.node)[1] > 1)


def columns_of(layer: Layer) -> int:
    """Return the number of values that every output of the layer sums over."""
    return math.prod(layer.site.shape) // layer.site.shape[layer.op.channel_axis]


def groups_of(layer: Layer) -> int:
    """Return the number of groups of a layer's channels."""
    return _groups(layer.node)


def weight_to_rows(layer: Layer, weight: Tensor) -> Tensor:
    """Reshape a weight to ``[groups, rows, columns]``: a row per output channel, a column per input value."""
    rows = weight if layer.op.channel_axis == 0 else weight.transpose(0, 1)
    return rows.reshape(_groups(layer.node), -1, math.prod(rows.shape[1:]))


def rows_to_weight(layer: Layer, rows: Tensor) -> Tensor:
    """Reshape rows to a weight, the inverse of :func:`weight_to_rows`."""
    shape = layer.site.shape
    if layer.op.channel_axis == 0:
        return rows.reshape(shape)
    return rows.reshape(shape[::-1]).transpose(0, 1).contiguous()


def input_rows(layer: Layer, x: Rows, most: int) -> Rows:
    """Unfold a layer's input to ``[groups, rows, columns]``, with columns as in :func:`weight_to_rows`.

    Integers stay integers.

    Args:
        layer: not a transposed convolution.
        x: its input, ``[samples, ...]``.
        most: largest number of rows per sample; if it has more, ``most`` spread over it, the same for every sample.
    """
    if isinstance(x, QuantizedTensor):
        return replace(x, q=_input_rows(layer, x.q, most, x.zero_point))
    return _input_rows(layer, x, most, 0)


def _input_rows(layer: Layer, x: Tensor, most: int, fill: int) -> Tensor:
    if not layer.op.is_convolution:
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        return tokens[:, _spread(tokens.shape[1], most).to(x.device)].reshape(1, -1, x.shape[-1])
    spatial = len(layer.site.shape) - 2
    if x.ndim == spatial + 1:
        x = x.unsqueeze(0)
    samples, channels, *sizes = x.shape
    places, is_inside = _places(layer, sizes, most)
    values = x.movedim(1, -1).reshape(samples * math.prod(sizes), channels)
    first = math.prod(sizes) * torch.arange(samples)
    taken = values.index_select(0, (first[:, None] + places.flatten()).flatten().to(x.device))
    taken = taken.reshape(samples, *places.shape, channels)
    if not bool(is_inside.all()):
        taken[:, ~is_inside.to(x.device)] = fill
    groups = _groups(layer.node)
    if groups > 1:  # torch transposes matrices several times faster than it permutes
        turned = taken.reshape(-1, channels).t().contiguous()
        patches = turned.view(groups, channels // groups, samples * places.shape[0], places.shape[1])
        return patches.transpose(1, 2).reshape(groups, samples * places.shape[0], -1)
    patches = taken.reshape(*taken.shape[:3], groups, channels // groups)  # samples, rows, kernel, group, channels
    return patches.permute(3, 0, 1, 4, 2).reshape(groups, samples * places.shape[0], -1).contiguous()


@dataclass(frozen=True)
class InputSource:
    """A node whose value holds input rows of a layer, the result of :func:`sources_of`.

    ``part`` says what the rows are: a layer's ``"input"``, or what the state's weight of a recurrent layer multiplies,
    the ``"first state"`` and the ``"outputs"`` of all steps but the last. ``user`` is the layer's node.
    """

    layer: Layer
    node: fx.Node
    user: fx.Node
    part: str = "input"

    def rows(self, value: Any, most: int) -> Rows:
        """Unfold a value to ``[groups, rows, columns]``, at most ``most`` rows per sample; see :func:`input_rows`."""
        if not self.layer.op.is_recurrent:
            if isinstance(value, QuantizedTensor):
                return input_rows(self.layer, replace(value, q=torch.atleast_2d(value.q)), most)
            return input_rows(self.layer, value if value.ndim > 1 else value[None], most)
        steps = self._steps(value)
        return steps[:, _spread(steps.shape[1], most).to(steps.device)].reshape(1, -1, steps.shape[-1])

    def samples(self, value: Any) -> int:
        """Return the number of samples of a value."""
        if not self.layer.op.is_recurrent:
            x = value.q if isinstance(value, QuantizedTensor) else value
            return len(x) if x.ndim > 1 else 1
        return len(self._steps(value))

    def _steps(self, value: Any) -> Tensor:
        """The rows ``[samples, steps, columns]`` of a recurrent layer's weight."""
        direction, _ = _place_of_weight(self.layer, self.user)
        if self.part == "first state":
            state: Tensor = value[direction]
            return state[:, None]
        x: Tensor = value[0] if self.part == "outputs" else value
        x = x if self.user.args[8] else x.transpose(0, 1)
        if self.part == "input":
            return x
        width = self.layer.site.shape[1]
        x = x[..., direction * width : (direction + 1) * width]
        return x[:, 1:] if direction else x[:, :-1]


def sources_of(layer: Layer, within: Collection[fx.Node] | None = None) -> list[InputSource]:
    """Return the nodes that hold the input rows of a layer.

    Args:
        layer: one that can be unfolded.
        within: the nodes that are run; the weight of a recurrent cell is multiplied in several of them. None for all.
    """
    if not layer.op.is_recurrent:
        return [InputSource(layer, layer.source, layer.node)]
    found = []
    for user in (layer.node, *layer.others):
        if user.target in RECURRENT_OPS and (within is None or user in within):
            arguments: Any = user.args
            source, state = arguments[:2]
            if _place_of_weight(layer, user)[1] == 0:
                found.append(InputSource(layer, source, user))
            else:
                first = state[0] if isinstance(state, list | tuple) else state
                found.append(InputSource(layer, first, user, "first state"))
                found.append(InputSource(layer, user, user, "outputs"))
    return found


def _place_of_weight(layer: Layer, user: fx.Node) -> tuple[int, int]:
    """The direction of a recurrent layer's weight, and its place: 0 for the input's, 1 for the state's."""
    arguments: Any = user.args
    parameters, is_bidirectional = list(arguments[2]), arguments[7]
    per_direction = len(parameters) // (2 if is_bidirectional else 1)
    return divmod(parameters.index(layer.quantizer), per_direction)


def _places(layer: Layer, sizes: Sequence[int], most: int) -> tuple[Tensor, Tensor]:
    """Positions of a convolution's rows in a map of these sizes, ``[rows, kernel]``, and which are not padding."""
    node, kernel = layer.node, layer.site.shape[2:]
    stride, dilation = (_numbers(node, i, len(kernel), 1) for i in (3, 5))
    padding = _padding(node, kernel, dilation)
    axes = zip(sizes, kernel, stride, dilation, padding, strict=True)
    return _find_places(tuple(_Axis(*axis) for axis in axes), most)


class _Axis(NamedTuple):
    """A spatial axis of a convolution."""

    size: int
    kernel: int
    stride: int
    dilation: int
    padding: tuple[int, int]


@functools.lru_cache(maxsize=64)
def _find_places(axes: tuple[_Axis, ...], most: int) -> tuple[Tensor, Tensor]:
    spans = [axis.dilation * (axis.kernel - 1) + 1 for axis in axes]
    counts = [(axis.size + sum(axis.padding) - span) // axis.stride + 1 for axis, span in zip(axes, spans, strict=True)]
    with torch.inference_mode(False):
        chosen = torch.unravel_index(_spread(math.prod(counts), most), counts)
        flat, is_inside = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
        for axis, places in zip(axes, chosen, strict=True):
            offsets = torch.arange(axis.kernel) * axis.dilation - axis.padding[0]
            at = places[:, None] * axis.stride + offsets
            flat = (flat[..., None] * axis.size + at.clamp(0, axis.size - 1)[:, None]).flatten(1)
            is_inside = (is_inside[..., None] & ((at >= 0) & (at < axis.size))[:, None]).flatten(1)
    return flat, is_inside


def _spread(count: int, most: int) -> Tensor:
    """Indices of at most ``most`` of ``count`` places, in no regular pattern that could align with a grid."""
    if count <= most:
        return torch.arange(count)
    stride = max(1, round(count * _GOLDEN))
    while math.gcd(stride, count) > 1:
        stride += 1
    return torch.arange(most) * stride % count


def _groups(node: fx.Node) -> int:
    is_convolution = "conv" in str(node.target)
    groups: Any = node.args[6] if is_convolution and len(node.args) > 6 else 1
    return int(groups)


def _numbers(node: fx.Node, index: int, spatial: int, default: int) -> list[int]:
    given: Any = node.args[index] if len(node.args) > index else default
    listed = [given] if isinstance(given, int) else list(given)
    return [int(v) for v in (listed * spatial if len(listed) == 1 else listed)]


def _padding(node: fx.Node, kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """Padding before and after every axis."""
    given: Any = node.args[4] if len(node.args) > 4 else 0
    pairs = []
    for axis, size in enumerate(kernel):
        if isinstance(given, str):
            total = dilation[axis] * (size - 1) if given == "same" else 0
            pairs.append((total // 2, total - total // 2))
        else:
            pairs.append((_numbers(node, 4, len(kernel), 0)[axis],) * 2)
    return pairs

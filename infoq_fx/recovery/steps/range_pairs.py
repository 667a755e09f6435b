"""Finds where factors per channel can move: from what makes a tensor into the layers that read it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from infoq_fx.graph.layer_forms.building import arguments_of
from infoq_fx.graph.layers import free_path, read_tensor, write_tensor
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.quantization.quantizers import Observe, Quantizer
from infoq_fx.recovery.layerwise_runner import SegmentRunner
from infoq_fx.recovery.segments import Layer
from infoq_fx.recovery.unfolding import can_unfold

__all__ = ["RangePair", "RangeSource", "add_factors", "channel_axis", "drop_factors", "find_pairs"]

_ATEN = torch.ops.aten
_ELEMENTWISE = {getattr(_ATEN, name).default for name in ("relu", "leaky_relu", "prelu", "dropout", "clone")}
_KINDS = ("max", "avg", "adaptive_avg")
_POOLS = {getattr(_ATEN, f"{kind}_pool{spatial}d").default: spatial for kind in _KINDS for spatial in (1, 2, 3)}
_RESHAPES = {_ATEN.flatten.using_ints, _ATEN.reshape.default}
_NORMS = {_ATEN.layer_norm.default: (2, 3), _ATEN.rms_norm.default: (2,)}  # places of the parameters
_CURVED = {_ATEN.gelu.default, _ATEN.silu.default, _ATEN.hardswish.default, _ATEN.mish.default, _ATEN.elu.default}
_FACTORS = "range_factors"


@dataclass(frozen=True)
class RangeSource:
    """What makes a tensor and can scale its channels: a layer, or parameters ``[channels]`` of a norm or product."""

    node: fx.Node
    parameters: tuple[str, ...] = ()
    layer: Layer | None = None

    @property
    def is_added(self) -> bool:
        """Whether it is a product that :func:`add_factors` added."""
        return any(_FACTORS in path for path in self.parameters)

    @property
    def name(self) -> str:
        """Its weight's name, for messages."""
        return self.layer.site.name if self.layer is not None else self.parameters[0]


@dataclass(frozen=True)
class RangePair:
    """A source, and the layers that read its tensor; ``between`` quantize the tensors in between."""

    first: RangeSource
    seconds: tuple[Layer, ...]
    between: tuple[Quantizer, ...]


def find_pairs(prepared: PreparedModel, layers: Sequence[Layer]) -> dict[fx.Node, RangePair]:
    """Return all pairs by the node of the first layer that reads the tensor."""
    *nodes, _ = prepared.graph_module.graph.nodes
    inputs = {node: prepared.example_inputs[str(node.target)] for node in nodes if node.op == "placeholder"}
    with torch.inference_mode():
        values = SegmentRunner(prepared, None).compute([node for node in nodes if node not in inputs], inputs)
    shapes = {node: tuple(x.shape) for node, x in values.items() if isinstance(x, Tensor)}
    reads = Counter(str(node.target) for node in nodes if node.op == "get_attr" for _ in node.users)
    own = [
        layer
        for layer in layers
        if reads[layer.weight] == len(layer.quantizer.users) == 1 and not layer.op.is_recurrent
    ]
    known = {layer.node: layer for layer in own if can_unfold(layer)}
    firsts = [RangeSource(layer.node, layer=layer) for layer in known.values() if _can_scale(prepared, layer, reads)]
    firsts += [source for node in nodes if (source := _read_affine(node, shapes, reads)) is not None]
    found = [_follow(prepared, first, known, shapes) for first in firsts]
    return {pair.seconds[0].node: pair for pair in found if pair is not None}


def add_factors(prepared: PreparedModel) -> None:
    """Add a product with ones per channel behind each GELU or other curve that only linear layers read, in place."""
    graph_module = prepared.graph_module
    for node in [node for node in graph_module.graph.nodes if node.target in _CURVED]:
        last = node
        while len(last.users) == 1 and (user := next(iter(last.users))).op == "call_module":
            last = user
        is_read = last is not node and all(user.target is _ATEN.linear.default for user in last.users)
        if not (is_read and last.users):
            continue
        (layer, *_) = last.users
        weight: Any = layer.args[1]
        count = read_tensor(graph_module, weight.all_input_nodes[0] if weight.op == "call_module" else weight).shape[1]
        path = free_path(graph_module, f"{_FACTORS}.{node.name}")
        write_tensor(graph_module, path, torch.ones(count, device=prepared.device))
        with graph_module.graph.inserting_after(node):
            factors = graph_module.graph.get_attr(path)
        with graph_module.graph.inserting_after(factors):
            product = graph_module.graph.call_function(_ATEN.mul.Tensor, (node, factors))
        product.meta = dict(node.meta)
        node.replace_all_uses_with(product, delete_user_cb=lambda user, product=product: user is not product)
    graph_module.recompile()


def drop_factors(prepared: PreparedModel) -> None:
    """Remove the products of :func:`add_factors` that are still with ones."""
    graph_module = prepared.graph_module
    for node in list(graph_module.graph.nodes):
        factors: Any = node.args[1] if node.target is _ATEN.mul.Tensor else None
        is_added = isinstance(factors, fx.Node) and factors.op == "get_attr" and _FACTORS in str(factors.target)
        if is_added and bool((read_tensor(graph_module, factors) == 1).all()):
            node.replace_all_uses_with(arguments_of(node)[0])
            graph_module.graph.erase_node(node)
            graph_module.graph.erase_node(factors)
            owner, _, name = str(factors.target).rpartition(".")
            delattr(graph_module.get_submodule(owner), name)
    graph_module.recompile()


def channel_axis(layer: Layer, shape: Sequence[int]) -> int | None:
    """Return the axis of the channels in a layer's input or output; None for images without a batch dimension."""
    if not layer.op.is_convolution:
        return len(shape) - 1
    return 1 if len(shape) == len(layer.site.shape) else None


def _can_scale(prepared: PreparedModel, layer: Layer, reads: Mapping[str, int]) -> bool:
    """Whether the layer's bias can be scaled by channel: it has none, or one that nothing else reads."""
    if layer.bias is None:
        return layer.op.bias_of(layer.node) is None
    channels = layer.site.shape[layer.op.channel_axis]
    return reads[layer.bias] == 1 and read_tensor(prepared.graph_module, layer.bias).shape == (channels,)


def _read_affine(
    node: fx.Node, shapes: Mapping[fx.Node, tuple[int, ...]], reads: Mapping[str, int]
) -> RangeSource | None:
    """A norm with a weight over the last axis, or a product with a parameter along it; None for other nodes."""
    arguments = arguments_of(node)
    if node.target in _NORMS and len(arguments[1]) == 1:
        found = [arguments[place] for place in _NORMS[node.target] if len(arguments) > place]
        parameters = [x for x in found if x is not None]
    elif node.target is _ATEN.mul.Tensor and all(isinstance(x, fx.Node) for x in arguments[:2]):
        parameters = [x for x in arguments[:2] if x.op == "get_attr" and shapes.get(x) == shapes[node][-1:]]
    else:
        return None
    paths = [str(x.target) for x in parameters if x.op == "get_attr"]
    is_own = len(paths) == len(parameters) > 0 and all(reads[path] == 1 for path in paths)
    return RangeSource(node, tuple(paths)) if is_own and parameters[0].op == "get_attr" else None


def _follow(
    prepared: PreparedModel, first: RangeSource, layers: Mapping[fx.Node, Layer], shapes: Mapping[fx.Node, Any]
) -> RangePair | None:
    """The pair that starts with a source, if factors of its channels commute with all nodes to other layers."""
    node, between = first.node, list[Quantizer]()
    axis = channel_axis(first.layer, shapes[node]) if first.layer is not None else len(shapes[node]) - 1
    while axis is not None:
        users = list(node.users)
        seconds = tuple(layers[user] for user in users if user in layers)
        if users and len(seconds) == len(users):
            is_input = all(
                layer.source is node and channel_axis(layer, shapes[node]) == axis and layer.node.args.count(node) == 1
                for layer in seconds
            )
            is_alike = len(seconds) == 1 or not any(layer.op.is_convolution for layer in seconds)
            order = sorted(seconds, key=lambda layer: layer.node)
            return RangePair(first, tuple(order), tuple(between)) if is_input and is_alike else None
        if len(users) != 1:
            return None
        user = users[0]
        module = prepared.graph_module.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(module, Quantizer):
            between.append(module)
        elif not isinstance(module, Observe):
            axis = _axis_behind(user, node, axis, shapes) if user.op == "call_function" else None
        node = user
    return None


def _axis_behind(node: fx.Node, source: fx.Node, axis: int, shapes: Mapping[fx.Node, tuple[int, ...]]) -> int | None:
    """The axis of a source's channels in a node's output; None if the node does not commute with factors."""
    if node not in shapes:  # several tensors
        return None
    if node.target is _ATEN.mul.Tensor:  # linear in each operand, as in gated layers
        is_twice = list(node.args).count(source) > 1
        return axis if shapes[source] == shapes[node] and not is_twice else None
    if node.args[0] is not source:
        return None
    if node.target in _ELEMENTWISE:
        return axis
    before, after = shapes[source], shapes[node]
    if node.target in _POOLS:
        return axis if axis == 1 and len(before) == _POOLS[node.target] + 2 else None
    if node.target is _ATEN.mean.dim and isinstance(node.args[1], Sequence):
        dims = {int(dim) % len(before) for dim in node.args[1]}  # type: ignore[arg-type]
        removed = sum(dim < axis for dim in dims) if len(after) < len(before) else 0
        return None if axis in dims or not dims else axis - removed
    if node.target in _RESHAPES:  # one that only drops dimensions of size 1 after the channels
        return axis if before[: axis + 1] == after and math.prod(before[axis + 1 :]) == 1 else None
    return None

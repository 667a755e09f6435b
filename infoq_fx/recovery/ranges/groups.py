"""Finds where factors per channel can move: from what makes some tensors into the layers that read them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from infoq_fx.graph.clamps import constant_bounds
from infoq_fx.graph.layer_forms.building import arguments_of
from infoq_fx.graph.layers import LAYER_OPS, free_path, read_tensor, write_tensor
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.quantization.quantizers import Observe, Quantizer
from infoq_fx.recovery.layerwise_runner import SegmentRunner
from infoq_fx.recovery.moments.unfolding import can_unfold
from infoq_fx.recovery.segments import Layer

__all__ = ["RangeGroup", "RangeSource", "add_factors", "channel_axis", "drop_factors", "find_groups"]

_ATEN = torch.ops.aten
_ELEMENTWISE = {getattr(_ATEN, name).default for name in ("relu", "leaky_relu", "prelu", "dropout", "clone")}
_KINDS = ("max", "avg", "adaptive_avg")
_POOLS = {getattr(_ATEN, f"{kind}_pool{spatial}d").default: spatial for kind in _KINDS for spatial in (1, 2, 3)}
_RESHAPES = {_ATEN.flatten.using_ints, _ATEN.reshape.default}
_NORMS = {_ATEN.layer_norm.default: (2, 3), _ATEN.rms_norm.default: (2,)}  # places of the parameters
_CURVED = {_ATEN.gelu.default, _ATEN.silu.default, _ATEN.hardswish.default, _ATEN.mish.default, _ATEN.elu.default}
_RELU = (0.0, math.inf)
_SUMS = {_ATEN.add.Tensor, _ATEN.sub.Tensor}
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
class RangeGroup:
    """Tensors whose channels share their factors: those between some sources and the layers that read them.

    Residual additions connect the tensors of a whole stage of a network. ``axes`` are the nodes of the tensors, each
    with the axis of its channels; ``quantizers`` are those among them that quantize a tensor, ``clamps`` those that
    limit one to constant bounds, in graph order.
    """

    firsts: tuple[RangeSource, ...]
    seconds: tuple[Layer, ...]
    axes: Mapping[fx.Node, int]
    quantizers: tuple[fx.Node, ...]
    clamps: tuple[fx.Node, ...]

    @property
    def name(self) -> str:
        """The names of its sources, for messages."""
        return ", ".join(first.name for first in self.firsts)


def find_groups(prepared: PreparedModel, layers: Sequence[Layer]) -> list[RangeGroup]:
    """Return all groups in the order of their first sources."""
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
    by_node = {first.node: first for first in firsts}
    groups, taken = list[RangeGroup](), set[fx.Node]()
    for first in sorted(firsts, key=lambda first: first.node):
        group = None if first.node in taken else _Search(prepared, by_node, known, shapes).run(first)
        if group is not None and taken.isdisjoint(group.axes):  # a product of two tensors has the factors of one
            taken.update(group.axes)
            groups.append(group)
    return groups


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


class _Search:
    """Follows a tensor to all that share its factors; ``axes`` are the nodes found so far.

    A group fails where its factors would meet a node that they do not commute with: an output of the model, a tensor
    that no source makes, or a layer that reads it along another axis.
    """

    def __init__(
        self,
        prepared: PreparedModel,
        firsts: Mapping[fx.Node, RangeSource],
        layers: Mapping[fx.Node, Layer],
        shapes: Mapping[fx.Node, tuple[int, ...]],
    ) -> None:
        self._prepared, self._firsts, self._layers, self._shapes = prepared, firsts, layers, shapes
        self.axes: dict[fx.Node, int] = {}
        self._seconds: dict[fx.Node, Layer] = {}
        self._pending: list[fx.Node] = []
        self._products: dict[fx.Node, fx.Node] = {}  # with the one operand that is scaled
        self._is_sound = True

    def run(self, first: RangeSource) -> RangeGroup | None:
        """Return the group of a source; None if it fails or no layer reads it."""
        shape = self._shapes.get(first.node, ())
        axis = channel_axis(first.layer, shape) if first.layer is not None else len(shape) - 1
        self._add(first.node, axis if shape else None)
        while self._pending and self._is_sound:
            node = self._pending.pop()
            self._visit_users(node)
            self._visit_operands(node)
        if not (self._is_sound and self._seconds):
            return None
        found = sorted(self.axes)
        return RangeGroup(
            tuple(self._firsts[node] for node in found if node in self._firsts and node not in self._products),
            tuple(self._seconds[node] for node in sorted(self._seconds)),
            {node: self.axes[node] for node in found},
            tuple(node for node in found if isinstance(self._module(node), Quantizer)),
            tuple(node for node in found if constant_bounds(node) not in (None, _RELU)),
        )

    def _add(self, node: fx.Node, axis: int | None) -> None:
        if axis is None or self.axes.get(node, axis) != axis:
            self._is_sound = False
        elif node not in self.axes:
            self.axes[node] = axis
            self._pending.append(node)

    def _visit_users(self, node: fx.Node) -> None:
        axis = self.axes[node]
        for user in node.users:
            layer = self._layers.get(user)
            if layer is not None and layer.source is node and user.args.count(node) == 1:
                self._is_sound &= channel_axis(layer, self._shapes[node]) == axis
                self._seconds[user] = layer
            elif isinstance(self._module(user), Quantizer | Observe):
                self._add(user, axis)
            elif user in self._firsts or user.op != "call_function":  # a norm or product with parameters starts anew
                self._is_sound = False
            else:
                if user.target is _ATEN.mul.Tensor:
                    self._is_sound &= self._products.setdefault(user, node) is node
                self._add(user, _axis_behind(user, node, axis, self._shapes))

    def _visit_operands(self, node: fx.Node) -> None:
        axis = self.axes[node]
        if node in self._firsts or node in self._products:
            return
        if isinstance(self._module(node), Quantizer | Observe):
            self._add(node.all_input_nodes[0], axis)
        elif node.op == "call_function" and node.target not in LAYER_OPS and node.target is not _ATEN.mul.Tensor:
            for source in [x for x in node.args[: 2 if node.target in _SUMS else 1] if isinstance(x, fx.Node)]:
                ways = [a for a in range(len(self._shapes.get(source, ()))) if self._leads(node, source, a)]
                self._add(source, ways[0] if len(ways) == 1 else None)
        else:
            self._is_sound = False

    def _leads(self, node: fx.Node, source: fx.Node, axis: int) -> bool:
        return _axis_behind(node, source, axis, self._shapes) == self.axes[node]

    def _module(self, node: fx.Node) -> Any:
        return self._prepared.graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _axis_behind(node: fx.Node, source: fx.Node, axis: int, shapes: Mapping[fx.Node, tuple[int, ...]]) -> int | None:
    """The axis of a source's channels in a node's output; None if the node does not commute with factors."""
    if node not in shapes:  # several tensors
        return None
    if node.target is _ATEN.mul.Tensor:  # linear in each operand, as in gated layers
        is_twice = list(node.args).count(source) > 1
        return axis if shapes[source] == shapes[node] and not is_twice else None
    if node.target in _SUMS:  # residual additions
        is_plain = not _is_scaled(node) and all(shapes.get(x) == shapes[node] for x in node.all_input_nodes)
        return axis if is_plain else None
    if node.args[0] is not source:
        return None
    if node.target in _ELEMENTWISE or constant_bounds(node) is not None:
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


def _is_scaled(node: fx.Node) -> bool:
    """Whether an addition multiplies its second operand, or adds a number."""
    return bool(node.kwargs) or not all(isinstance(x, fx.Node) for x in node.args)

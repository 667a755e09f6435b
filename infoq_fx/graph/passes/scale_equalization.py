"""Moves factors from activations into the surrounding weights, so that activation scales are powers of two."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from infoq_fx.graph.clamps import CLAMPS, read_bounds, set_bounds
from infoq_fx.graph.layers import LAYER_OPS

__all__ = ["equalize_scales", "find_scale_groups"]

_ATEN = torch.ops.aten
_POOLS = tuple(f"{kind}_pool{spatial}d" for kind in ("max", "avg", "adaptive_avg") for spatial in (1, 2, 3))
_ONE_OPERAND = (
    *("relu", "leaky_relu", "prelu", "dropout", "clone", "contiguous", "alias", "detach"),
    *(
        "mean",
        "flatten",
        "unflatten",
        "view",
        "reshape",
        "permute",
        "transpose",
        "squeeze",
        "unsqueeze",
        "slice",
        "select",
    ),
    *("upsample_nearest2d", "upsample_bilinear2d", "channel_shuffle", "pixel_shuffle"),
    *("split", "split_with_sizes", "chunk", "unbind"),
    *_POOLS,
)


def _overloads(*names: str) -> set[Any]:
    packets = [getattr(_ATEN, name) for name in names]
    return {getattr(packet, overload) for packet in packets for overload in packet.overloads()}


# Operations with f(c x) = c f(x) for every c > 0: in the first operand, in the first two, in all of a list.
_OF_FIRST = _overloads(*_ONE_OPERAND) | {operator.getitem}
_OF_TWO = {_ATEN.add.Tensor, _ATEN.sub.Tensor}
_OF_LIST = {_ATEN.cat.default}
_PADS = {_ATEN.pad.default, _ATEN.constant_pad_nd.default}


def find_scale_groups(graph_module: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Find the activations that can be multiplied by any positive factor, grouped by the factor they share.

    Tensors that ReLU, clamps with constant bounds, pooling, views, residual additions, concatenation, quantizers or
    observers connect share one factor. A group ends at layers whose quantized weight and bias, if nothing else reads
    them, can absorb the factor: ``W' = W out / in`` and ``b' = b out``. Tensors that are connected to an input, an
    output or any other operation have factor 1 and are not in the result.

    Returns:
        Every such node, mapped to one node that stands for its group.
    """
    groups = _Groups()
    for node in graph_module.graph.nodes:
        if node.op in ("placeholder", "output"):
            groups.fix(node, *node.all_input_nodes)
        elif node.op == "call_module":
            groups.join(node, node.args[0])
        elif node.op == "call_function" and node.target in LAYER_OPS:
            if _parameters(node) is None:
                groups.fix(node, *node.all_input_nodes)
            else:
                groups.join(node)
        elif node.op == "call_function":
            _join_operands(node, groups)
    return groups.free()


def equalize_scales(graph_module: fx.GraphModule, factors: Mapping[fx.Node, float]) -> bool:
    """Multiply the activations of :func:`find_scale_groups` by positive factors without changing the outputs.

    1. a layer: its weight is multiplied by its output's factor over its input's, its bias by its output's factor.
    2. a clamp: its bounds are multiplied.

    Left alone: nodes without a factor. The model is the same up to the rounding of its weights in float32.
    """
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        factor = factors.get(node, 1.0)
        if node.target in CLAMPS and factor != 1.0:
            low, high = (None if bound is None else bound * factor for bound in read_bounds(node))
            set_bounds(node, low, high)
        elif node.target in LAYER_OPS and (parameters := _parameters(node)) is not None:
            source: Any = node.args[LAYER_OPS[node.target].source]
            gains = factor / factors.get(source, 1.0), factor
            for parameter, gain in zip(parameters, gains, strict=False):
                if gain != 1.0:
                    _multiply(graph_module, str(parameter.target), gain)
    return bool(factors)


def _multiply(graph_module: fx.GraphModule, target: str, gain: float) -> None:
    owner, _, name = target.rpartition(".")
    module = graph_module.get_submodule(owner)
    old = getattr(module, name)
    scaled = (old.detach().double() * gain).to(old.dtype)
    # Another tensor: this one may be the user's.
    setattr(module, name, nn.Parameter(scaled, old.requires_grad) if isinstance(old, nn.Parameter) else scaled)


def _join_operands(node: fx.Node, groups: _Groups) -> None:
    tensors = [operand for operand in node.all_input_nodes if _is_tensor(operand)]
    if node.target in _OF_FIRST or (node.target in _PADS and _pads_zeros(node)):
        shared = [node.args[0]]
    elif node.target in _OF_TWO:
        shared = list(node.args[:2])
    elif node.target in _OF_LIST:
        shared = list(node.args[0])  # type: ignore[arg-type]
    elif node.target in CLAMPS:
        is_constant = all(bound is None or isinstance(bound, int | float) for bound in read_bounds(node))
        shared = [node.args[0]] if is_constant else []
    else:
        shared = []
    is_scalable = bool(shared) and all(isinstance(x, fx.Node) and x.op != "get_attr" for x in shared)
    if is_scalable:
        groups.join(node, *shared)
    elif _is_tensor(node):
        groups.fix(node, *tensors)
    # Nodes that read only sizes do not fix the tensor's factor.


def _pads_zeros(node: fx.Node) -> bool:
    return all(given in ("constant", 0, None) for given in (*node.args[2:], *node.kwargs.values()))


def _is_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op == "call_module" or isinstance(value, Tensor | tuple | list) or value is None


def _parameters(node: fx.Node) -> tuple[fx.Node, ...] | None:
    """Weight and bias, if any, of a layer with a quantized weight that is their only reader; else None."""
    op = LAYER_OPS[node.target]
    quantizer, bias = node.args[op.weight], op.bias_of(node)
    if not isinstance(quantizer, fx.Node) or quantizer.op != "call_module" or len(quantizer.users) != 1:
        return None
    found = quantizer.args[:1] if bias is None else (*quantizer.args[:1], bias)
    is_own = all(isinstance(x, fx.Node) and x.op == "get_attr" and _is_read_once(x) for x in found)
    return found if is_own and not op.is_lookup and not node.kwargs else None  # type: ignore[return-value]


def _is_read_once(node: fx.Node) -> bool:
    reads = (other for other in node.graph.nodes if other.op == "get_attr" and other.target == node.target)
    return sum(len(other.users) for other in reads) == 1


class _Groups:
    """Union-find of nodes that share a factor; a fixed node fixes its whole group."""

    def __init__(self) -> None:
        self._parents: dict[fx.Node, fx.Node] = {}
        self._fixed: list[fx.Node] = []

    def join(self, node: fx.Node, *others: Any) -> None:
        self._parents.setdefault(node, node)
        for other in others:
            self._parents[self._first(other)] = self._first(node)

    def fix(self, *nodes: fx.Node) -> None:
        for node in nodes:
            self.join(node)
            self._fixed.append(node)

    def free(self) -> dict[fx.Node, fx.Node]:
        fixed = {self._first(node) for node in self._fixed}
        return {node: first for node in list(self._parents) if (first := self._first(node)) not in fixed}

    def _first(self, node: fx.Node) -> fx.Node:
        self._parents.setdefault(node, node)
        while self._parents[node] is not node:
            self._parents[node] = node = self._parents[self._parents[node]]
        return node

"""Cuts a graph into a chain of segments at places where few values are alive, so that blocks stay whole."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from infoq_fx.graph.float_interpreter import FloatInterpreter
from infoq_fx.graph.layers import LAYER_OPS, RECURRENT, LayerOp
from infoq_fx.graph.operands import is_lookup_node
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.types import QuantSite

__all__ = ["Layer", "Segment", "find_segments", "needed_constants"]

_MOST_LAYERS = 8
_NEAR = 3  # cuts on each side that a cut is compared with
_WORTH = 2.0  # a cut with more than this many times as much alive as those is not taken


@dataclass(frozen=True)
class Layer:
    """A layer with a quantized weight; ``quantizer`` is the weight's quantizer node.

    A recurrent layer has several, each of which is one here. ``others`` are the further nodes that multiply the weight,
    as the later steps of a cell.
    """

    node: fx.Node
    op: LayerOp
    quantizer: fx.Node
    site: QuantSite
    others: tuple[fx.Node, ...] = ()

    @property
    def source(self) -> fx.Node:
        """The node that the layer multiplies."""
        source: fx.Node = self.node.args[self.op.source]  # type: ignore[assignment]
        return source

    @property
    def weight(self) -> str:
        """Path of the float weight."""
        return str(self.quantizer.all_input_nodes[0].target)

    @property
    def bias(self) -> str | None:
        """Path of the bias; None if there is none or if other layers read it too."""
        bias = self.op.bias_of(self.node)
        is_own = isinstance(bias, fx.Node) and bias.op == "get_attr" and len(bias.users) == 1
        return str(bias.target) if is_own else None


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes of a graph, with the values that enter and leave them.

    ``entering`` are the earlier values that the nodes read, ``leaving`` the values that later nodes read. ``outputs``
    are the floating-point tensors that the segment computes and that leave it. ``constants`` are the nodes that
    depend on no input and that the nodes need: weights, and values computed from them.
    """

    constants: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    entering: tuple[fx.Node, ...]
    leaving: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    layers: tuple[Layer, ...]


def find_segments(prepared: PreparedModel) -> list[Segment]:
    """Cut a graph where few values are alive: after residual blocks, bottlenecks, attention and feed-forward blocks.

    Every segment but the last has one to eight layers; the last extends to the outputs. Where all values are equally
    small, as in a chain of convolutions of one width, the graph is cut between any two layers. A weight that several
    layers read belongs to the first of them. A weight that only embeddings read belongs to no segment, since it can
    only be rounded to nearest.
    """
    constants, nodes = _split_constants(prepared.graph_module.graph)
    layers = _find_layers(prepared)
    at = {node: index for index, node in enumerate(nodes)}
    layers = [layer for layer in layers if layer.node in at]  # others depend on no input
    positions = sorted({at[layer.node] for layer in layers})  # a recurrent node has several weights
    recorder = _Recorder(prepared)
    with torch.inference_mode():
        recorder.run(*prepared.example_inputs.values())
    keys = _live_keys(recorder.sizes, nodes)
    cuts = [_smallest(keys, a + 1, b) for a, b in itertools.pairwise(positions)]
    cuts = _limit_layers(cuts, _keep_worthy(cuts, keys), positions, keys)
    bounds = [sum(node.op == "placeholder" for node in nodes), *cuts, len(nodes)]
    return [
        _make_segment(nodes, constants, layers, at, recorder.floating, start, end)
        for start, end in itertools.pairwise(bounds)
    ]


def needed_constants(constants: Sequence[fx.Node], nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Return those of the constants that some nodes need, directly or through others, in order."""
    known, needed, pending = set(constants), set[fx.Node](), list(nodes)
    while pending:
        for source in pending.pop().all_input_nodes:
            if source in known and source not in needed:
                needed.add(source)
                pending.append(source)
    return [node for node in constants if node in needed]


def _split_constants(graph: fx.Graph) -> tuple[list[fx.Node], list[fx.Node]]:
    """Nodes that depend on no input; and all others, inputs first, without the output."""
    constants: dict[fx.Node, None] = {}
    others = []
    for node in graph.nodes:
        if node.op == "get_attr" or (
            node.op not in ("placeholder", "output")
            and node.all_input_nodes
            and all(source in constants for source in node.all_input_nodes)
        ):
            constants[node] = None
        elif node.op != "output":
            others.append(node)
    others.sort(key=lambda node: node.op != "placeholder")
    return list(constants), others


def _find_layers(prepared: PreparedModel) -> list[Layer]:
    found = []
    for node, quantizer in prepared.quantizer_nodes():
        if quantizer.site.kind == "weight":
            layers = sorted(user for user in node.users if not is_lookup_node(user))
            if layers:
                op = LAYER_OPS.get(layers[0].target, RECURRENT)
                found.append(Layer(layers[0], op, node, quantizer.site, tuple(layers[1:])))
    return sorted(found, key=lambda layer: layer.node)


def _live_keys(sizes: Mapping[fx.Node, int], nodes: Sequence[fx.Node]) -> list[int]:
    """By position in ``nodes``: elements alive before it, times the number of tensors that hold them."""
    last: dict[fx.Node, int] = {}
    index_of = {node: index for index, node in enumerate(nodes)}
    for node in nodes:
        last[node] = max((index_of.get(user, len(nodes)) for user in node.users), default=-1)
    keys = []
    for position in range(len(nodes) + 1):
        alive = [sizes[node] for node in nodes[:position] if last[node] >= position and sizes[node]]
        keys.append(sum(alive) * len(alive))
    return keys


class _Recorder(FloatInterpreter):
    """Runs the float model once; records the size of every value and which are floating-point tensors."""

    def __init__(self, prepared: PreparedModel) -> None:
        super().__init__(prepared)
        self.sizes: dict[fx.Node, int] = {}
        self.floating: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        tensors = result if isinstance(result, tuple | list) else (result,)
        self.sizes[n] = sum(x.numel() for x in tensors if isinstance(x, Tensor))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.floating.add(n)
        return result


def _smallest(keys: Sequence[int], start: int, end: int) -> int:
    """The last of the positions ``start .. end`` with the smallest key."""
    return min(range(end, start - 1, -1), key=lambda position: keys[position])


def _keep_worthy(cuts: Sequence[int], keys: Sequence[int]) -> list[int]:
    """Drop cuts with much more alive than nearby ones on both sides: these are inside a block."""

    def least(near: Sequence[int]) -> float:
        return min((keys[cut] for cut in near), default=math.inf)

    return [
        cut
        for i, cut in enumerate(cuts)
        if keys[cut] <= _WORTH * max(least(cuts[max(0, i - _NEAR) : i]), least(cuts[i + 1 : i + 1 + _NEAR]))
    ]


def _limit_layers(cuts: Sequence[int], kept: Sequence[int], positions: Sequence[int], keys: Sequence[int]) -> list[int]:
    """Cut segments of too many layers again, where the fewest values are alive."""
    found = set(kept)
    while True:
        bounds = [-1, *sorted(found), len(keys)]
        long = [
            (start, end)
            for start, end in itertools.pairwise(bounds)
            if sum(start <= position < end for position in positions) > _MOST_LAYERS
        ]
        if not long:
            return sorted(found)
        for start, end in long:
            inside = sorted(cut for cut in cuts if start < cut < end)
            middle = inside[len(inside) // 4 : max(len(inside) // 4 + 1, 3 * len(inside) // 4)]
            found.add(min(middle, key=lambda cut: keys[cut]))


def _make_segment(
    nodes: Sequence[fx.Node],
    constants: Sequence[fx.Node],
    layers: Sequence[Layer],
    at: Mapping[fx.Node, int],
    floating: Set[fx.Node],
    start: int,
    end: int,
) -> Segment:
    own = nodes[start:end]
    inside, needed = set(own), needed_constants(constants, own)
    known = {*inside, *constants}
    entering = dict.fromkeys(source for node in own for source in node.all_input_nodes if source not in known)
    leaving = [node for node in nodes[:end] if any(at.get(user, len(nodes)) >= end for user in node.users)]
    return Segment(
        constants=tuple(needed),
        nodes=tuple(own),
        entering=tuple(entering),
        leaving=tuple(leaving),
        outputs=tuple(node for node in leaving if node in inside and node in floating),
        layers=tuple(layer for layer in layers if start <= at[layer.node] < end),
    )

"""Finds the layers that multiply, their operands, and the operands' shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from infoq_fx.graph.layers import ATTENTION, LAYER_OPS, MATMUL_OPS, RECURRENT_OPS, module_path, read_tensor
from infoq_fx.graph.program.graph_interpreter import GraphInterpreter
from infoq_fx.types import QuantSite

__all__ = [
    "MultiplyingLayer",
    "Placement",
    "find_multiplying_layers",
    "is_lookup",
    "is_lookup_node",
    "is_parameter",
    "make_unique",
    "record_sample_shapes",
]


@dataclass(frozen=True)
class Placement:
    """A site in the graph: the node whose value it quantizes, and the nodes that read the quantized value."""

    site: QuantSite
    node: fx.Node
    users: tuple[fx.Node, ...]


@dataclass(frozen=True)
class MultiplyingLayer:
    """One multiplying node: its name, and its operands as (node, name, kind, channel axis)."""

    node: fx.Node
    name: str
    operands: tuple[tuple[fx.Node, str, str, int | None], ...]


class _ShapeRecorder(GraphInterpreter):
    """Runs the graph once and records each tensor's shape."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        return result


def record_sample_shapes(
    graph_module: fx.GraphModule, example_inputs: Mapping[str, Tensor]
) -> Callable[[fx.Node], tuple[int, ...]]:
    """Run the graph once and return a function from a node to its shape for one sample."""
    recorder = _ShapeRecorder(graph_module)
    with torch.no_grad():
        recorder.run(*example_inputs.values())
    samples = next((x.shape[0] for x in example_inputs.values() if x.ndim), 1)

    def sample_shape(node: fx.Node) -> tuple[int, ...]:
        shape = recorder.shapes[node]
        if shape and shape[0] == samples:
            return shape[1:]
        elements = math.prod(shape)
        return (elements // samples,) if elements % samples == 0 else shape

    return sample_shape


def find_multiplying_layers(graph_module: fx.GraphModule) -> list[MultiplyingLayer]:
    """List the layers, matrix products and attentions of a graph, in graph order, under unique names.

    A recurrent layer is listed once for each of its weights.
    """
    layers = []
    names: set[str] = set()
    parameters = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    for node in graph_module.graph.nodes:
        op = LAYER_OPS.get(node.target)
        if op is not None and is_parameter(node.args[op.weight]):
            weight = node.args[op.weight]
            target = str(weight.target)
            if read_tensor(graph_module, weight).ndim < 2:
                continue
            name = make_unique(module_path(node) or target.rpartition(".")[0] or target, names)
            read = (weight, target, "weight", op.channel_axis)
            source = (node.args[op.source], make_unique(f"{name}.input", set(parameters)), "activation", None)
            layers.append(MultiplyingLayer(node, name, (read,) if op.is_lookup else (read, source)))
        elif node.target in RECURRENT_OPS:
            for weight in filter(is_parameter, node.args[2]):
                if read_tensor(graph_module, weight).ndim == 2:
                    target = str(weight.target)
                    read = (weight, target, "weight", 0)
                    layers.append(MultiplyingLayer(node, make_unique(target, names), (read,)))
        elif node.target in MATMUL_OPS or node.target is ATTENTION:
            roles = ("query", "key", "value") if node.target is ATTENTION else ("left", "right")
            base = "attention" if node.target is ATTENTION else "matmul"
            name = make_unique(f"{module_path(node)}.{base}".removeprefix("."), names)
            operands = tuple(
                (x, make_unique(f"{name}.{role}", set(parameters)), "activation", None)
                for x, role in zip(node.args, roles, strict=False)
            )
            layers.append(MultiplyingLayer(node, name, operands))
    return layers


def is_lookup(layer: MultiplyingLayer) -> bool:
    """Return whether a layer is an embedding."""
    return is_lookup_node(layer.node)


def is_lookup_node(node: fx.Node) -> bool:
    """Return whether a node is an embedding."""
    return node.target in LAYER_OPS and LAYER_OPS[node.target].is_lookup


def is_parameter(operand: Any) -> bool:
    """Return whether an operand is a parameter or buffer of the graph module."""
    return isinstance(operand, fx.Node) and operand.op == "get_attr"


def make_unique(name: str, taken: set[str]) -> str:
    """Return the name with a number appended if it is taken, and add it to ``taken``."""
    found, count = name, 1
    while found in taken:
        found, count = f"{name}_{count}", count + 1
    taken.add(found)
    return found

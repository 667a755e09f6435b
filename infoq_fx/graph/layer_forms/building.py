"""Adds nodes with fake values to a graph, and evaluates what depends on parameters alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from infoq_fx.graph.layers import RECURRENT_OPS, free_path, write_tensor
from infoq_fx.graph.program.recurrent_shapes import infer_recurrent

__all__ = ["Place", "arguments_of", "constant_nodes", "evaluate", "size_hint"]

_ATEN = torch.ops.aten
_KEPT_META = ("nn_module_stack", "stack_trace")


@dataclass(frozen=True)
class Place:
    """Where new nodes go: before ``node``, whose module path they take."""

    graph_module: fx.GraphModule
    node: fx.Node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call with its fake value."""
        given: Any = fx.map_arg((args, kwargs), lambda operand: operand.meta["val"])
        first = next(node for node in self.graph_module.graph.nodes if node.op == "placeholder")
        infer = infer_recurrent if target in RECURRENT_OPS else target
        # Without the dispatcher in Python, kernels of torch 2.9 ask for sizes that are symbols.
        with first.meta["val"].fake_mode, enable_python_dispatcher(), torch.no_grad():
            value = infer(*given[0], **given[1])
        with self.graph_module.graph.inserting_before(self.node):
            added = self.graph_module.graph.call_function(target, args, kwargs)
        added.meta = {key: self.node.meta[key] for key in _KEPT_META if key in self.node.meta} | {"val": value}
        return added

    def store(self, path: str, value: Tensor) -> fx.Node:
        """Add a buffer at a free path near the given one, and a node that reads it."""
        target = free_path(self.graph_module, path)
        write_tensor(self.graph_module, target, value)
        first = next(node for node in self.graph_module.graph.nodes if node.op == "placeholder")
        with self.graph_module.graph.inserting_before(self.node):
            added = self.graph_module.graph.get_attr(target)
        added.meta["val"] = first.meta["val"].fake_mode.from_tensor(value, static_shapes=True)
        return added

    def size(self, node: fx.Node, axis: int) -> Any:
        """Return a size of a tensor: a number, or a node for a free one."""
        found = node.meta["val"].shape[axis]
        return int(found) if is_concrete_int(found) else self.call(_ATEN.sym_size.int, node, axis)

    def permute(self, node: fx.Node, axes: Sequence[int]) -> fx.Node:
        """Permute the axes of a tensor where they change."""
        return node if list(axes) == list(range(len(axes))) else self.call(_ATEN.permute.default, node, list(axes))

    def join(self, node: fx.Node, start: int, count: int) -> fx.Node:
        """Join ``count`` neighbouring axes from ``start``; none give an axis of size 1."""
        if count == 0:
            return self.call(_ATEN.unsqueeze.default, node, start)
        return node if count == 1 else self.call(_ATEN.flatten.using_ints, node, start, start + count - 1)

    def split(self, node: fx.Node, axis: int, sizes: Sequence[Any]) -> fx.Node:
        """Split an axis into axes of these sizes, the inverse of :meth:`join`."""
        if not sizes:
            return self.call(_ATEN.squeeze.dim, node, axis)
        return node if len(sizes) == 1 else self.call(_ATEN.unflatten.int, node, axis, list(sizes))


def arguments_of(node: fx.Node) -> Any:
    """Return a node's arguments, which may be anything that its operation takes."""
    return node.args


def constant_nodes(graph_module: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes that depend on parameters alone."""
    constant: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        is_computed = node.op == "call_function" and node.all_input_nodes
        if node.op == "get_attr" or (is_computed and constant.issuperset(node.all_input_nodes)):
            constant.add(node)
    return constant


def evaluate(graph_module: fx.GraphModule, operand: fx.Node) -> Tensor:
    """Return the value of a node that depends on parameters alone."""
    needed = {operand}
    for node in reversed(list(graph_module.graph.nodes)):
        if node in needed:
            needed.update(node.all_input_nodes)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph_module.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[operand])
    with torch.no_grad():
        value: Tensor = fx.GraphModule(graph_module, graph)()
    return value.detach().clone()


def size_hint(size: Any) -> int:
    """Return a size as a number: that of the example inputs for a free one."""
    return int(size) if is_concrete_int(size) else int(size.node.hint or 2)

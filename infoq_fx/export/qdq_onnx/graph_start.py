"""Computes constants by nodes at the start of a graph, which runtimes run once, as they load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

__all__ = ["Array", "GraphStart", "read_array"]

Array: TypeAlias = np.ndarray[Any, Any]


def read_array(value: ir.Value) -> Array:
    """Return the values of an initializer."""
    assert value.const_value is not None
    array: Array = value.const_value.numpy()
    return array


@dataclass
class GraphStart:
    """Nodes on constants, which are inserted before the first node of a graph."""

    model: ir.Model

    def __post_init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.made: dict[str, ir.Value] = {}

    def constant(self, name: str, array: Array | np.generic) -> ir.Value:
        """Return the initializer of a name, which is added if there is none."""
        if name not in self.made:
            free = name
            while free in self.model.graph.initializers:
                free = f"{free}_"
            tensor = ir.Tensor(np.asarray(array, order="C"), name=free)
            value = ir.Value(name=free, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.model.graph.initializers[free] = self.made[name] = value
        return self.made[name]

    def number(self, number: int) -> ir.Value:
        """Return an int32 scalar."""
        return self.constant(f"i{number}", np.int32(number))

    def shape(self, sizes: Sequence[int]) -> ir.Value:
        """Return a shape, for Reshape."""
        key = f"shape {list(sizes)}"
        if key not in self.made:
            count = sum(name.startswith("shape ") for name in self.made)
            self.made[key] = self.constant(f"s{count}", np.array(sizes, np.int64))
        return self.made[key]

    def as_int32(self, name: str, array: Array) -> ir.Value:
        """Store an array of a narrower type under a name, and return it as int32."""
        value: ir.Value = self.call("Cast", self.constant(name, array), to=ir.DataType.INT32.value)
        return value

    def call(self, op_type: str, *inputs: ir.Value, outputs: int = 1, **attributes: int) -> Any:
        """Add a node, and return its output, or the list of its outputs if it has several."""
        given = [ir.AttrInt64(name, value) for name, value in attributes.items()]
        node = ir.Node("", op_type, inputs, given, num_outputs=outputs)
        for index, value in enumerate(node.outputs):
            value.name = f"unpacked_{len(self.nodes)}_{index}"
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def call_once(self, name: str, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        """Add a node that others may use too, under a name."""
        if name not in self.made:
            self.made[name] = self.call(op_type, *inputs, **attributes)
        return self.made[name]

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let the readers of an initializer read a computed value, and remove it."""
        new.shape, new.type = old.shape, old.type
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        del self.model.graph.initializers[str(old.name)]

    def split(self, name: str, joined: ir.Value, sizes: Sequence[int], total: int) -> list[ir.Value]:
        """Split a vector of ``total`` elements into parts; what is left after them is not used."""
        if list(sizes) == [total]:
            return [joined]
        rest = [total - sum(sizes)] if sum(sizes) < total else []
        lengths = self.constant(f"{name}_sizes", np.array([*sizes, *rest], np.int64))
        parts: list[ir.Value] = self.call("Split", joined, lengths, outputs=len(sizes) + len(rest))
        return parts[: len(sizes)]

    def insert(self) -> None:
        """Insert the nodes."""
        if self.nodes:
            self.model.graph.insert_before(self.model.graph[0], self.nodes)
        for node in self.nodes:
            node.name = None

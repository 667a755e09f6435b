"""Finds which layer each node belongs to, in an exported file and in the graph that a runtime makes of it."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from infoq_fx.types import Inventory

__all__ = ["drop_quantization", "find_optimized_owners", "find_owners", "find_shared", "tag_nodes"]

_LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_RECURRENT = {"LSTM", "GRU", "RNN"}
_OF_CONSTANTS = {"DequantizeLinear", "Transpose", "Reshape", "Identity", "Cast"}
_JOINING = {"Concat", "MatMul"}  # directions of a recurrent layer; a state's weight with its projection
_SUFFIXES = re.compile(r"(_transposed|_shifted|_gates)(_\d+)?$")
_TAG = re.compile(r"^n(\d+)(?!\d)")


def find_owners(graph: onnx.GraphProto, inventory: Inventory) -> list[str | None]:
    """Return the operation that each node of an exported graph belongs to.

    A layer is found by its weight, a matrix product of activations by its place among them. Everything else belongs to
    the last layer before it, or to the first behind it if there is none before. None is a node that reads and feeds no
    layer. A recurrent node computes the operations of all its weights: it belongs to the first, see
    :func:`find_shared`.
    """
    found = _find_operations(graph, inventory)
    return _follow(graph, [names[0] if names else None for names in found])


def find_shared(graph: onnx.GraphProto, inventory: Inventory) -> dict[str, tuple[str, ...]]:
    """Return the operations that one node computes together, by the one that the node belongs to."""
    return {names[0]: names for names in _find_operations(graph, inventory) if len(names) > 1}


def _find_operations(graph: onnx.GraphProto, inventory: Inventory) -> list[tuple[str, ...]]:
    """The operations that each node of an exported graph computes."""
    made_by = {name: node for node in graph.node for name in node.output}
    stored = {tensor.name for tensor in graph.initializer}
    weights, products = _split_operations(inventory)
    found: list[tuple[str, ...]] = []
    for node in graph.node:
        names: tuple[str, ...] = ()
        if node.op_type in _RECURRENT:
            sources = [path for name in node.input[1:3] for path in _find_constants(name, made_by, stored)]
            names = tuple(weights[path].pop(0) for path in dict.fromkeys(sources) if weights.get(path))
        elif node.op_type in _LAYERS:
            known = [_find_constants(name, made_by, stored) for name in node.input[:2]]
            sources = [path for paths in known for path in paths]
            waiting = weights.get(sources[0]) if sources else products
            if waiting and not all(known):  # a product of constants is computed once, as the file is loaded
                names = (waiting.pop(0),)
        found.append(names)
    return found


def tag_nodes(graph: onnx.GraphProto) -> None:
    """Name each node and its outputs by its position, so that nodes of an optimized graph tell what they were."""
    kept = {value.name for value in [*graph.input, *graph.output]} | {tensor.name for tensor in graph.initializer}
    renamed: dict[str, str] = {}
    for index, node in enumerate(graph.node):
        node.name = f"n{index}"
        for place, name in enumerate(node.output):
            if name and name not in kept:
                renamed[name] = f"n{index}_o{place}"
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [renamed.get(name, name) for name in values]
    del graph.value_info[:]


def find_optimized_owners(graph: onnx.GraphProto, owners: Sequence[str | None]) -> dict[str, str | None]:
    """Return the operation of each node, by its name, in the graph that a runtime made of a tagged one.

    A node that the runtime added, such as a Transpose to another memory layout, belongs to the layer before it.
    """
    found: list[str | None] = []
    for node in graph.node:
        tags = [_TAG.match(text) for text in (node.name, *node.output)]
        places = [int(tag[1]) for tag in tags if tag is not None]
        found.append(owners[places[0]] if places and places[0] < len(owners) else None)
    return {node.name: owner for node, owner in zip(graph.node, _follow(graph, found), strict=True)}


def drop_quantization(
    model: onnx.ModelProto, owners: Sequence[str | None], in_float: Container[str | None], *, keep_weights: bool
) -> None:
    """Let the nodes of some layers read floats, in place; they keep their names and run in float.

    Activations are then the values before QuantizeLinear and DequantizeLinear, and weights are stored dequantized
    unless they are kept in integers. QuantizeLinear and DequantizeLinear that nothing reads any more are removed.
    """
    graph = model.graph
    before, known = _quantized_values(graph), {tensor.name: tensor for tensor in graph.initializer}
    # The integers of recurrent layers are cast to int32 first.
    casts = [node for node in graph.node if node.op_type == "Cast" and node.input[0] in known]
    known |= {node.output[0]: known[node.input[0]] for node in casts}
    for node, owner in zip(graph.node, owners, strict=True):
        if owner not in in_float:
            continue
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            node.input[:] = [before.get(name, name) for name in node.input]
        elif node.op_type == "DequantizeLinear" and not keep_weights and all(name in known for name in node.input):
            graph.initializer.append(numpy_helper.from_array(_dequantize(node, known), node.output[0]))
            node.output[0] = f"{node.output[0]}_unread"
    outputs = {value.name for value in graph.output}
    for _ in range(3):  # the DequantizeLinear, then the Clip or Cast that it read, then the QuantizeLinear
        read = outputs | {name for node in graph.node for name in node.input}
        kept = [node for node in graph.node if any(name in read for name in node.output)]
        del graph.node[:]
        graph.node.extend(kept)


def _split_operations(inventory: Inventory) -> tuple[dict[str, list[str]], list[str]]:
    """Names of operations by the stored tensor of their weight, and of those that multiply activations."""
    kinds = {site.name: site.kind for site in inventory.sites}
    weights: dict[str, list[str]] = {}
    products = []
    for operation in inventory.operations:
        if operation.left is not None and kinds[operation.left] == "weight":
            weights.setdefault(operation.left, []).append(operation.name)
        elif operation.left is None and operation.right is None:  # perhaps a layer left in float
            weights.setdefault(f"{operation.name}.weight", []).append(operation.name)
        else:
            products.append(operation.name)
    return weights, products


def _find_constants(name: str, made_by: Mapping[str, onnx.NodeProto], stored: set[str]) -> list[str]:
    """The stored tensors that a value is computed from, if it is computed from constants alone; else none."""
    if name in stored:
        return [_SUFFIXES.sub("", name)]
    node = made_by.get(name)
    if node is None or node.op_type not in _OF_CONSTANTS | _JOINING:
        return []
    read = node.input if node.op_type in _JOINING else node.input[:1]
    found = [_find_constants(source, made_by, stored) for source in read]
    return [path for paths in found for path in paths] if all(found) else []


def _follow(graph: onnx.GraphProto, owners: list[str | None]) -> list[str | None]:
    """Give nodes without an owner that of the last node they read, else that of the first node that reads them."""
    position = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    readers: dict[int, list[int]] = {}
    found = list(owners)
    for index, node in enumerate(graph.node):
        sources = [position[name] for name in node.input if name in position]
        for source in sources:
            readers.setdefault(source, []).append(index)
        if found[index] is None:
            known = [source for source in sources if found[source] is not None]
            found[index] = found[max(known)] if known else None
    for index in reversed(range(len(found))):
        if found[index] is None:
            found[index] = next((found[r] for r in sorted(readers.get(index, ())) if found[r] is not None), None)
    return found


def _quantized_values(graph: onnx.GraphProto) -> dict[str, str]:
    """The value that each DequantizeLinear of a QuantizeLinear stands for, Clip between them included."""
    made_by = {name: node for node in graph.node for name in node.output}

    def trace(node: onnx.NodeProto) -> Iterator[str]:
        source = made_by.get(node.input[0])
        while source is not None and source.op_type == "Clip":
            source = made_by.get(source.input[0])
        if source is not None and source.op_type == "QuantizeLinear":
            yield source.input[0]

    return {node.output[0]: x for node in graph.node if node.op_type == "DequantizeLinear" for x in trace(node)}


def _dequantize(node: onnx.NodeProto, known: Mapping[str, onnx.TensorProto]) -> np.ndarray[Any, Any]:
    integers, scale, *rest = (numpy_helper.to_array(known[name]) for name in node.input)
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    shape = [1] * integers.ndim
    if scale.size > 1:
        shape[axis] = scale.size
    zero = rest[0].astype(np.int32).reshape(shape) if rest and rest[0].size > 1 else (rest[0] if rest else 0)
    return np.asarray((integers.astype(np.int32) - zero) * scale.reshape(shape if scale.size > 1 else ()), np.float32)

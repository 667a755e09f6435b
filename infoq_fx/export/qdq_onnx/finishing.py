"""Finishes a lowered ONNX model: names from module paths, metadata, and removal of what only takes space."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from infoq_fx.core.targets import IR_VERSION, OPSET_VERSION, Container
from infoq_fx.core.version import __version__
from infoq_fx.export.qdq_onnx.packing import pack_weights
from infoq_fx.export.qdq_onnx.parameters import pack_parameters
from infoq_fx.export.qdq_onnx.quant_nodes import QONNX_DOMAIN, QONNX_OPSET
from infoq_fx.export.qdq_onnx.slimming import drop_defaults, shorten, slim_values
from infoq_fx.export.qdq_onnx.translation.placeholders import DOMAIN
from infoq_fx.types import BASELINE_BITS, Allocation

__all__ = ["METADATA_KEY", "finish"]

METADATA_KEY = "infoq.allocation"
# Names of axes by the number of axes and the axis.
_AXES = {
    **{(2, 1): "length", (3, 1): "length", (3, 2): "length", (4, 2): "height", (4, 3): "width"},
    **{(5, 2): "depth", (5, 3): "height", (5, 4): "width"},
}
_DEQUANTIZERS = {"DequantizeLinear", "Quant"}
_CONTAINER_KEY, _VERSION_KEY = "infoq.container", "infoq.version"


def finish(model: ir.Model, allocation: Allocation, container: Container | None) -> None:
    """Name the nodes, set the metadata and reduce the size of a lowered model, in place.

    A model with QONNX nodes has no container; it keeps its shapes, which ONNX cannot infer behind them.

    Layers are named by the module path of their weight; packed containers name others only where
    onnxruntime 1.20 needs it. The metadata has the
    allocation, with its budget and criterion, as JSON.
    """
    _name_sizes(model)
    _compute_outputs(model)
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]
    ClearMetadataAndDocStringPass()(model)
    is_packed = container is not None and container.is_packed
    if is_packed:
        shorten(model)
    _name_nodes(model, others=None if not is_packed else "n" if _has_slices(model) else "")
    if is_packed:
        pack_parameters(model)
        pack_weights(model)
    model.opset_imports.pop(DOMAIN, None)
    if container is None:
        model.opset_imports[QONNX_DOMAIN] = QONNX_OPSET
    else:
        for node in model.graph:
            drop_defaults(node)
        slim_values(model)
    model.opset_imports[""], model.ir_version = OPSET_VERSION, IR_VERSION
    model.producer_name, model.producer_version = DOMAIN, __version__
    model.metadata_props[METADATA_KEY] = _describe(allocation)
    model.metadata_props[_CONTAINER_KEY] = "qonnx" if container is None else container.name
    model.metadata_props[_VERSION_KEY] = __version__


def _describe(allocation: Allocation) -> str:
    """The allocation as JSON, without what describes its scores and costs; other sites have 8 bits."""
    described = dataclasses.asdict(dataclasses.replace(allocation, scores={}, cost=None, scored_for=None))
    named = {site: bits for site, bits in allocation.bits.items() if bits != BASELINE_BITS}
    described |= {"bits": named, "others": BASELINE_BITS}
    return json.dumps(_without_nothing(described), sort_keys=True, separators=(",", ":"))


def _without_nothing(described: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_nothing(value) if isinstance(value, dict) and name != "bits" else value
        for name, value in described.items()
        if value is not None and (name == "bits" or value not in ({}, ()))
    }


def _name_nodes(model: ir.Model, *, others: str | None) -> None:
    """Name layers by the path of their weight (``layer1.0.conv1``) and others by their old name, all unique."""
    paths = {node: path for node in model.graph if (path := _layer_path(node)) is not None}
    used: set[str] = set()
    for node in model.graph:
        base, count = paths.get(node) or (node.name or node.op_type if others is None else others), 1
        name = base
        while name in used:
            name, count = f"{base}_{count}", count + 1
        node.name = name or None
        used |= {name} if name else set()


def _has_slices(model: ir.Model) -> bool:
    """Whether several slices read one value: onnxruntime 1.20 names the Split that replaces them after a node."""
    counts = [
        sum(reader.op_type in ("Slice", "Gather") for reader, _ in value.uses())
        for node in model.graph
        for value in node.outputs
    ]
    return max(counts, default=0) > 1


def _layer_path(node: ir.Node) -> str | None:
    """The module path of the stored weight that a node reads; None if it reads none."""
    for value in node.inputs[1:2] if node.op_type not in _DEQUANTIZERS else ():
        producer = None if value is None else value.producer()
        if producer is not None and producer.op_type in _DEQUANTIZERS and _is_stored(producer.inputs[0]):
            return str(producer.name).removesuffix("/DQ").removesuffix("/Quant").removesuffix(".weight")
    return None


def _is_stored(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer()


def _compute_outputs(model: ir.Model) -> None:
    """Let an Identity compute every output that is a constant or an input, which the ONNX checker asks for."""
    for index, value in enumerate(model.graph.outputs):
        if value.producer() is None:
            copied = ir.Node("", "Identity", [value], num_outputs=1)
            result = copied.outputs[0]
            result.name, result.shape, result.type = value.name, value.shape, value.type
            value.name = f"{value.name}_value" if value.is_initializer() else value.name
            model.graph.append(copied)
            model.graph.outputs[index] = result


def _name_sizes(model: ir.Model) -> None:
    """Name free sizes of the inputs ``batch``, ``height``, ``width``, ... instead of the exporter's symbols."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and str(size.value) not in names:
                known = "batch" if axis == 0 else _AXES.get((len(value.shape or ()), axis), f"size_{axis}")
                is_taken = axis > 0 and known in names.values()
                names[str(size.value)] = f"{value.name}_{known}" if is_taken else known
    outputs = [value for node in model.graph for value in node.outputs]
    for value in [*model.graph.inputs, *outputs] if names else []:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, names) for size in value.shape])


def _renamed(size: Any, names: Mapping[str, str]) -> Any:
    """A size with the symbols in it renamed, ``s77 + 1`` too."""
    if not isinstance(size, ir.SymbolicDim):
        return size
    return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(size.value))

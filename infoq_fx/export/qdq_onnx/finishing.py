"""Finishes a lowered ONNX model: names from module paths, metadata, and removal of what only takes space."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from infoq_fx.core.targets import Container
from infoq_fx.core.version import __version__
from infoq_fx.export.qdq_onnx.slimming import drop_defaults, shorten, slim_values
from infoq_fx.export.qdq_onnx.tracing import DOMAIN
from infoq_fx.types import BASELINE_BITS, Allocation

__all__ = ["METADATA_KEY", "finish"]

METADATA_KEY = "infoq.allocation"
_CONTAINER_KEY, _VERSION_KEY = "infoq.container", "infoq.version"


def finish(model: ir.Model, allocation: Allocation, container: Container) -> None:
    """Name the nodes, set the metadata and reduce the size of a lowered model, in place.

    Layers are named by the module path of their weight; packed containers name only these. The metadata has the
    allocation, with its budget and criterion, as JSON.
    """
    _name_batch(model)
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]
    ClearMetadataAndDocStringPass()(model)
    if container.is_packed:
        shorten(model)
    _name_nodes(model, layers_only=container.is_packed)
    for node in model.graph:
        drop_defaults(node)
    slim_values(model)
    model.opset_imports.pop(DOMAIN, None)
    model.opset_imports[""] = container.opset_version
    model.ir_version = container.ir_version
    model.producer_name, model.producer_version = DOMAIN, __version__
    model.metadata_props[METADATA_KEY] = _describe(allocation)
    model.metadata_props[_CONTAINER_KEY], model.metadata_props[_VERSION_KEY] = container.name, __version__


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


def _name_nodes(model: ir.Model, *, layers_only: bool) -> None:
    """Name layers by the path of their weight (``layer1.0.conv1``) and others by their old name, all unique."""
    paths = {node: path for node in model.graph if (path := _layer_path(node)) is not None}
    used: set[str] = set()
    for node in model.graph:
        base, count = paths.get(node) or ("" if layers_only else node.name or node.op_type), 1
        name = base
        while name in used:
            name, count = f"{base}_{count}", count + 1
        node.name = name or None
        used |= {name} if name else set()


def _layer_path(node: ir.Node) -> str | None:
    """The module path of the stored weight that a node reads; None if it reads none."""
    for value in node.inputs[1:2] if node.op_type != "DequantizeLinear" else ():
        producer = None if value is None else value.producer()
        if producer is not None and producer.op_type == "DequantizeLinear" and _is_stored(producer.inputs[0]):
            return str(producer.name).removesuffix("/DQ").removesuffix(".weight")
    return None


def _is_stored(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer()


def _name_batch(model: ir.Model) -> None:
    """Name the dynamic first dimension ``batch`` instead of the exporter's symbol."""
    first = model.graph.inputs[0].shape
    symbol = str(first[0].value) if first and isinstance(first[0], ir.SymbolicDim) else None
    outputs = [value for node in model.graph for value in node.outputs]
    for value in [*model.graph.inputs, *outputs] if symbol else []:
        if value.shape is not None:
            renamed = [
                str(d.value).replace(str(symbol), "batch") if isinstance(d, ir.SymbolicDim) else d for d in value.shape
            ]
            value.shape = ir.Shape(renamed)

"""The last touches: names that a user knows, metadata that says what the file is, nothing that only takes space."""

from __future__ import annotations

import dataclasses
import itertools
import json

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from infoq_fx.onnx_export.tracing import DOMAIN
from infoq_fx.spec import Allocation
from infoq_fx.targets import Container
from infoq_fx.version import __version__

__all__ = ["METADATA_KEY", "finish"]

METADATA_KEY = "infoq.allocation"
_CONTAINER_KEY, _VERSION_KEY = "infoq.container", "infoq.version"
_ONES = {"dilations", "strides"}  # lists whose default, ones, is in the words of the specification only


def finish(model: ir.Model, allocation: Allocation, container: Container) -> None:
    """Name, describe and slim down a lowered model, in place.

    Layers take the module path of their weight, every node a name of its own. The allocation, with its budget and
    criterion, stands in the metadata as JSON.
    """
    _name_batch(model)
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]
    ClearMetadataAndDocStringPass()(model)
    _name_nodes(model)
    for node in model.graph:
        _drop_defaults(node)
    _slim_values(model)
    model.opset_imports.pop(DOMAIN, None)
    model.opset_imports[""] = container.opset_version
    model.ir_version = container.ir_version
    model.producer_name, model.producer_version = DOMAIN, __version__
    model.metadata_props[METADATA_KEY] = _describe(allocation)
    model.metadata_props[_CONTAINER_KEY], model.metadata_props[_VERSION_KEY] = container.name, __version__


def _describe(allocation: Allocation) -> str:
    """All but the scores, which stand in the table."""
    described = {name: value for name, value in dataclasses.asdict(allocation).items() if name != "scores"}
    return json.dumps(described, sort_keys=True, separators=(",", ":"))


def _slim_values(model: ir.Model) -> None:
    """Short names for what flows inside, without the shapes and types that runtimes infer: a tenth of a small file."""
    outputs, taken = {id(value) for value in model.graph.outputs}, {value.name for value in model.graph.inputs}
    taken |= {*model.graph.initializers, *(value.name for value in model.graph.outputs)}
    names = (f"v{number}" for number in itertools.count())
    for node in model.graph:
        for value in node.outputs:
            if id(value) not in outputs:
                value.name = next(name for name in names if name not in taken)
                value.shape = value.type = None
    for value in model.graph.initializers.values():
        value.shape = value.type = None
        value.metadata_props.clear()


def _name_nodes(model: ir.Model) -> None:
    """Layers by the path of their weight (``layer1.0.conv1``), the others by what they were, all different."""
    for node in model.graph:
        for value in node.inputs[1:2] if node.op_type != "DequantizeLinear" else ():
            producer = None if value is None else value.producer()
            if producer is not None and producer.op_type == "DequantizeLinear" and _is_stored(producer.inputs[0]):
                node.name = str(producer.name).removesuffix("/DQ").removesuffix(".weight")
    used: set[str] = set()
    for node in model.graph:
        base, count = node.name or node.op_type, 1
        while node.name in used or not node.name:
            node.name, count = f"{base}_{count}", count + 1
        used.add(node.name)


def _is_stored(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer()


def _drop_defaults(node: ir.Node) -> None:
    """Attributes that say what is so without them."""
    if node.domain or not onnx.defs.has(node.op_type):
        return
    known = onnx.defs.get_schema(node.op_type).attributes
    for name, attribute in list(node.attributes.items()):
        if name not in known or attribute.is_ref():
            continue
        default = ir.serde.deserialize_attribute(known[name].default_value) if known[name].default_value.name else None
        is_ones = name in _ONES and set(attribute.as_ints()) == {1}
        if is_ones or (default is not None and default.value == attribute.value):
            del node.attributes[name]


def _name_batch(model: ir.Model) -> None:
    """Call the free first dimension ``batch`` instead of by the exporter's symbol."""
    first = model.graph.inputs[0].shape
    symbol = str(first[0].value) if first and isinstance(first[0], ir.SymbolicDim) else None
    outputs = [value for node in model.graph for value in node.outputs]
    for value in [*model.graph.inputs, *outputs] if symbol else []:
        if value.shape is not None:
            renamed = [
                str(d.value).replace(str(symbol), "batch") if isinstance(d, ir.SymbolicDim) else d for d in value.shape
            ]
            value.shape = ir.Shape(renamed)

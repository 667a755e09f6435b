"""Placeholder ops of a traced model, whose form in the file is chosen later."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
from onnxscript import values

__all__ = ["DOMAIN", "FLOAT", "INTEGER", "LIST", "TEXT", "find_placeholders", "make_placeholder"]

DOMAIN = "infoq_fx"
_TYPES = onnx.defs.OpSchema.AttrType
FLOAT, INTEGER, LIST, TEXT = _TYPES.FLOAT, _TYPES.INT, _TYPES.INTS, _TYPES.STRING
"""Types of attributes."""


def find_placeholders(model: ir.Model, op_type: str) -> list[ir.Node]:
    """Return the placeholder ops of a type, in graph order."""
    return [node for node in model.graph if node.domain == DOMAIN and node.op_type == op_type]


def make_placeholder(name: str, inputs: list[str], attributes: dict[str, Any]) -> values.Op:
    """Register the schema of a placeholder op, so that the exporter can create nodes of it."""
    schema = onnx.defs.OpSchema
    floats, integers = ["tensor(float)"], ["tensor(float)", "tensor(int8)", "tensor(int32)"]
    definition = schema(
        name,
        DOMAIN,
        1,
        inputs=[schema.FormalParameter(x, f"T{x}") for x in inputs],
        outputs=[schema.FormalParameter("y", "T")],
        type_constraints=[*[(f"T{x}", integers, "") for x in inputs], ("T", floats, "")],
        attributes=[schema.Attribute(key, kind, required=True) for key, kind in attributes.items()],
    )
    if not onnx.defs.has(name, domain=DOMAIN):
        onnx.defs.register_schema(definition)
    return values.Op(values.Opset(DOMAIN, 1), name)

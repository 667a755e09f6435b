"""Traces the quantized graph to ONNX IR, with placeholder ops for quantization."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import values
from torch import nn

from infoq_fx.conversion.quantized import Provenance
from infoq_fx.errors import ExportError
from infoq_fx.graph.capture import export_quietly
from infoq_fx.quantization.custom_ops import dequantize_op, quantize_dequantize_op

__all__ = ["DOMAIN", "find_placeholders", "trace"]

DOMAIN = "infoq_fx"
_LAST_OPSET = 23  # later opsets do not change the operators that the exporter writes


def trace(quantized: nn.Module, provenance: Provenance, opset_version: int) -> ir.Model:
    """Translate the module to ONNX IR, with quantization and dequantization as placeholder ops of domain ``infoq_fx``.

    Raises:
        ExportError: torch cannot translate the graph.
    """
    names = list(provenance.example_inputs)
    table: dict[Any, Callable[..., Any]] = {
        quantize_dequantize_op: _translate_quantize_dequantize,
        dequantize_op: _translate_dequantize,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = export_quietly(quantized, tuple(provenance.example_inputs.values()))
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=min(opset_version, _LAST_OPSET),
                custom_translation_table=table,
                input_names=names,
                output_names=list(provenance.output_names),
                verbose=False,
            )
        except Exception as error:
            reason = " ".join(str(error).split())[-400:]
            raise ExportError(
                f"torch.onnx.export cannot translate the quantized graph: {reason}; quantize a part"
            ) from error
    if exported is None:
        raise ExportError("torch.onnx.export returned no model; install a later torch")
    return exported.model


def find_placeholders(model: ir.Model, op_type: str) -> list[ir.Node]:
    """Return the placeholder ops of a type, in graph order."""
    return [node for node in model.graph if node.domain == DOMAIN and node.op_type == op_type]


def _placeholder(name: str, inputs: list[str], attributes: dict[str, Any]) -> values.Op:
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


_TYPES = onnx.defs.OpSchema.AttrType
_QUANTIZE_DEQUANTIZE = _placeholder(
    "QuantizeDequantize",
    ["x"],
    {"scale": _TYPES.FLOAT, "zero_point": _TYPES.INT, "bits": _TYPES.INT, "site": _TYPES.STRING},
)
_DEQUANTIZE = _placeholder(
    "Dequantize", ["q", "scale"], {"axis": _TYPES.INT, "bits": _TYPES.INT, "site": _TYPES.STRING}
)


def _translate_quantize_dequantize(x: Any, scale: float, zero_point: int, bits: int, site: str) -> Any:
    return _QUANTIZE_DEQUANTIZE(x, scale=scale, zero_point=zero_point, bits=bits, site=site)


def _translate_dequantize(q: Any, scale: Any, axis: int, bits: int, site: str) -> Any:
    return _DEQUANTIZE(q, scale, axis=axis, bits=bits, site=site)

"""Traces the quantized graph to ONNX IR, with placeholder ops for quantization."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from infoq_fx.conversion.quantized import Provenance, plain_graph
from infoq_fx.errors import ExportError
from infoq_fx.export.qdq_onnx.translation.placeholders import FLOAT, INTEGER, TEXT, make_placeholder
from infoq_fx.export.qdq_onnx.translation.recurrent import RECURRENT_TRANSLATIONS
from infoq_fx.graph.program.exporting import FreeAxes, export_quietly, exporting
from infoq_fx.quantization.custom_ops import dequantize_op, quantize_dequantize_op

__all__ = ["trace"]

_LOGGER = logging.getLogger(__name__)
_LAST_OPSET = 23  # later opsets do not change the operators that the exporter writes


def trace(
    quantized: nn.Module, provenance: Provenance, opset_version: int, *, has_fixed_sizes: bool = False
) -> ir.Model:
    """Translate the module to ONNX IR, with quantization and dequantization as placeholder ops of domain ``infoq_fx``.

    With fixed sizes they are those of one of the example inputs' samples.

    Raises:
        ExportError: torch cannot translate the graph.
    """
    try:
        has_free_axes = bool(provenance.free_axes) and not has_fixed_sizes
        model = _translate(quantized, provenance, opset_version, has_free_axes, has_fixed_sizes)
    except Exception as error:
        if not provenance.free_axes or has_fixed_sizes:
            raise _describe_failure(error) from error
        try:
            model = _translate(quantized, provenance, opset_version, has_free_axes=False, has_fixed_sizes=False)
        except Exception as error:
            raise _describe_failure(error) from error
        _LOGGER.warning("the file has fixed sizes: torch.onnx.export cannot translate the graph with free ones")
    _rename_tensors(model)
    return model


def _describe_failure(error: Exception) -> ExportError:
    reason = " ".join(str(error).split())[-400:]
    return ExportError(f"torch.onnx.export cannot translate the quantized graph: {reason}; quantize a part")


def _translate(
    quantized: nn.Module, provenance: Provenance, opset_version: int, has_free_axes: bool, has_fixed_sizes: bool
) -> ir.Model:
    table: dict[Any, Callable[..., Any]] = {
        quantize_dequantize_op: _translate_quantize_dequantize,
        dequantize_op: _translate_dequantize,
        **RECURRENT_TRANSLATIONS,
    }
    examples = provenance.form.file_inputs(provenance.example_inputs)
    axes: FreeAxes = {index: provenance.free_axes.get(name, ()) for index, name in enumerate(examples) if has_free_axes}
    is_batch_free = provenance.batch_size is None and not has_fixed_sizes
    if has_fixed_sizes and provenance.batch_size is None:
        examples = {name: x[:1] for name, x in examples.items()}
    with exporting():
        program = export_quietly(
            _in_file_dtypes(quantized, provenance), tuple(examples.values()), axes, is_batch_free=is_batch_free
        )
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=min(opset_version, _LAST_OPSET),
            custom_translation_table=table,
            input_names=list(examples),
            output_names=list(provenance.output_names),
            verbose=False,
        )
    if exported is None:
        raise ExportError("torch.onnx.export returned no model; install a later torch")
    return exported.model


def _in_file_dtypes(quantized: nn.Module, provenance: Provenance) -> nn.Module:
    """The module's graph with casts at inputs and outputs of another dtype than float32."""
    plain, form = plain_graph(quantized), provenance.form
    narrow = {index: dtype for index, dtype in form.output_dtypes.items() if dtype != torch.bfloat16}
    if not isinstance(plain, fx.GraphModule) or not (form.file_dtypes or narrow):
        return plain
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(plain.graph, copies))
    for node in [node for node in graph.nodes if node.op == "placeholder" and node.target in form.file_dtypes]:
        with graph.inserting_after(node):
            cast = graph.call_function(torch.ops.aten._to_copy.default, (node,), {"dtype": torch.float32})
        node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)
    output = graph.output_node()
    leaves, tree = pytree.tree_flatten(output.args[0])
    with graph.inserting_before(output):
        for index, dtype in narrow.items():
            leaves[index] = graph.call_function(torch.ops.aten._to_copy.default, (leaves[index],), {"dtype": dtype})
    output.args = (pytree.tree_unflatten(leaves, tree),)
    return fx.GraphModule(plain, graph)


def _rename_tensors(model: ir.Model) -> None:
    """Give stored tensors that are called like an input or an output another name; both are in one file."""
    taken = {value.name for value in [*model.graph.inputs, *model.graph.outputs] if not value.is_initializer()}
    for value in list(model.graph.initializers.values()):
        name, count = value.name, 1
        while value.name in taken:
            value.name = f"{name}_{count}" if f"{name}_{count}" not in model.graph.initializers else value.name
            count += 1


_QUANTIZE_DEQUANTIZE = make_placeholder(
    "QuantizeDequantize", ["x"], {"scale": FLOAT, "zero_point": INTEGER, "bits": INTEGER, "site": TEXT}
)
_DEQUANTIZE = make_placeholder("Dequantize", ["q", "scale"], {"axis": INTEGER, "bits": INTEGER, "site": TEXT})


def _translate_quantize_dequantize(x: Any, scale: float, zero_point: int, bits: int, site: str) -> Any:
    return _QUANTIZE_DEQUANTIZE(x, scale=scale, zero_point=zero_point, bits=bits, site=site)


def _translate_dequantize(q: Any, scale: Any, axis: int, bits: int, site: str) -> Any:
    return _DEQUANTIZE(q, scale, axis=axis, bits=bits, site=site)

"""Write a quantized module as a QDQ ONNX file that runtimes load; the only file that knows ONNX."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from onnxscript import values
from torch import Tensor, nn

from infoq_fx.capture import export_quietly
from infoq_fx.errors import ExportError, OptionError
from infoq_fx.quantized import Provenance, provenance_of
from infoq_fx.quantizers import dequantize_op, quantize_dequantize_op
from infoq_fx.spec import MAX_BITS, Allocation

__all__ = ["METADATA_KEY", "export_onnx"]

METADATA_KEY = "infoq.allocation"
_DOMAIN = "infoq_fx"
_OPSET_VERSION = 18
_IR_VERSION = 8
_TOLERATED_ERROR = 0.25


def export_onnx(quantized: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a quantized module as ONNX: opset 18, IR 8, dynamic batch, integers in int8, uint8 and int32.

    A weight of fewer than 8 bits is stored as int8 with values within its bit-width, one of 8 bits as uint8 around
    zero point 128; an activation of fewer than 8 bits is QuantizeLinear, Clip on the uint8 value, DequantizeLinear.
    The allocation stands as JSON in the model's metadata under ``METADATA_KEY``. The file is put in its place only
    after the ONNX checker, strict shape inference and a run in onnxruntime that agrees with the module.

    Args:
        quantized: what :func:`infoq_fx.quantize` or :func:`infoq_fx.convert` returned.
        path: of the file; its folder must exist.

    Returns:
        The path.

    Raises:
        OptionError: not a quantized module.
        ExportError: the path cannot be written, torch cannot export the graph, or a check failed; no file is left
            and one that was there before stays as it was.
    """
    provenance = provenance_of(quantized)
    if provenance is None:
        raise OptionError(f"{type(quantized).__name__} is not a quantized module; pass what quantize() returned")
    target = Path(path)
    with _new_file_beside(target) as draft:
        model = _trace(quantized, provenance)
        for graph_pass in (_store_transposed, _lower_dequantize, _gather_integers, _lower_quantize_dequantize):
            graph_pass(model)
        _finish(model, provenance.allocation)
        proto = ir.serde.serialize_model(model)
        _check(proto)
        draft.write_bytes(proto.SerializeToString(deterministic=True))
        _check_run(draft, quantized, provenance)
    return target


@contextlib.contextmanager
def _new_file_beside(target: Path) -> Iterator[Path]:
    """A file to write, moved to ``target`` when the block ends well and removed otherwise."""
    if target.is_dir():
        raise ExportError(f"cannot write {target}: it is a folder; give the path of a file")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise ExportError(
            f"cannot write {target}: {error.strerror}; give a path in a folder that exists and is writable"
        ) from error
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        draft.chmod(0o666 & ~_umask())
        draft.replace(target)
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error.strerror}; check space and permissions") from error
    finally:
        draft.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _trace(quantized: nn.Module, provenance: Provenance) -> ir.Model:
    """The module as ONNX IR, with the project's own ops as placeholders of domain ``infoq_fx``."""
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
                opset_version=_OPSET_VERSION,
                custom_translation_table=table,
                input_names=names,
                output_names=list(provenance.output_names),
                verbose=False,
            )
        except Exception as error:
            reason = " ".join(str(error).split())[-400:]
            raise ExportError(f"torch.onnx.export cannot translate the quantized graph: {reason}") from error
    if exported is None:
        raise ExportError("torch.onnx.export returned no model")
    return exported.model


def _placeholder(name: str, inputs: list[str], attributes: dict[str, Any]) -> values.Op:
    """A schema for a placeholder op, so that the exporter can put nodes of it into a graph."""
    schema = onnx.defs.OpSchema
    floats, integers = ["tensor(float)"], ["tensor(float)", "tensor(int8)", "tensor(int32)"]
    definition = schema(
        name,
        _DOMAIN,
        1,
        inputs=[schema.FormalParameter(x, f"T{x}") for x in inputs],
        outputs=[schema.FormalParameter("y", "T")],
        type_constraints=[*[(f"T{x}", integers, "") for x in inputs], ("T", floats, "")],
        attributes=[schema.Attribute(key, kind, required=True) for key, kind in attributes.items()],
    )
    if not onnx.defs.has(name, domain=_DOMAIN):
        onnx.defs.register_schema(definition)
    return values.Op(values.Opset(_DOMAIN, 1), name)


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


def _nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.domain == _DOMAIN and node.op_type == op_type]


def _store_transposed(model: ir.Model) -> None:
    """Transpose weights in the file where the graph would do it at run time.

    1. Dequantize -> Transpose(1, 0): the readers of the Transpose read transposed integers.
    2. Dequantize -> Gemm(transB=1): the same, with transB=0.

    Left alone: a weight that an embedding reads too, which stands in the file once.
    """
    for node in _nodes(model, "Dequantize"):
        weight = node.outputs[0]
        if any(reader.op_type == "Gather" for reader, _ in weight.uses()):
            continue
        moved: ir.Value | None = None
        for reader, index in list(weight.uses()):
            is_transpose = reader.op_type == "Transpose" and tuple(reader.attributes["perm"].as_ints()) == (1, 0)
            is_gemm = reader.op_type == "Gemm" and index == 1 and reader.attributes.get_int("transB", 0) == 1
            if not (is_transpose or is_gemm):
                continue
            if moved is None:
                moved = _transposed(model, node)
            if is_transpose:
                reader.outputs[0].replace_all_uses_with(moved, replace_graph_outputs=False)
                reader.graph.remove(reader, safe=True)  # type: ignore[union-attr]
            else:
                reader.replace_input_with(1, moved)
                reader.attributes["transB"] = ir.AttrInt64("transB", 0)
        if not weight.uses():
            node.graph.remove(node, safe=True)  # type: ignore[union-attr]
    RemoveUnusedNodesPass()(model)


def _transposed(model: ir.Model, node: ir.Node) -> ir.Value:
    source = node.inputs[0]
    assert source is not None
    assert source.const_value is not None
    integers = np.ascontiguousarray(source.const_value.numpy().T)
    stored = _add_initializer(model, f"{source.name}_transposed", integers)
    attributes = {**node.attributes, "axis": ir.AttrInt64("axis", 1 - node.attributes["axis"].as_int())}
    moved = ir.Node(_DOMAIN, "Dequantize", [stored, node.inputs[1]], list(attributes.values()), num_outputs=1)
    moved.outputs[0].name = f"{node.outputs[0].name}_transposed"
    node.graph.insert_before(node, moved)  # type: ignore[union-attr]
    return moved.outputs[0]


def _lower_dequantize(model: ir.Model) -> None:
    """Dequantize -> DequantizeLinear; weights get the zero point that integer kernels look for.

    Weights that use all of 8 bits are stored shifted, as uint8 with zero point 128: products of uint8 with int8
    saturate on x86 processors without VNNI, those with fewer bits or of uint8 with uint8 do not.
    """
    for node in _nodes(model, "Dequantize"):
        source, scale = node.inputs
        assert source is not None
        assert source.const_value is not None
        assert scale is not None
        inputs: list[ir.Value | None] = [source, scale]
        if source.const_value.dtype == ir.DataType.INT8:
            integers: np.ndarray[Any, Any] = source.const_value.numpy()
            zero_points = np.zeros(math.prod(scale.shape or ()), np.int8)  # type: ignore[arg-type]
            if node.attributes["bits"].as_int() == MAX_BITS:
                shifted = (integers.astype(np.int16) + 128).astype(np.uint8)
                inputs[0] = _add_initializer(model, f"{source.name}_shifted", shifted)
                zero_points = np.full(zero_points.shape, 128, np.uint8)
            inputs.append(_add_initializer(model, f"{source.name}_zero_point", zero_points))
        lowered = ir.Node("", "DequantizeLinear", inputs, [node.attributes["axis"]], num_outputs=1)
        _take_over(node, [lowered], node.attributes["site"].as_string())


def _gather_integers(model: ir.Model) -> None:
    """DequantizeLinear -> Gather: rows are gathered as integers, and only they are dequantized.

    1. scales of features (axis 1): Gather -> DequantizeLinear along the last axis.
    2. scales of rows (axis 0, a weight that a linear layer shares): they are gathered too, and multiply. The linear
       layer's DequantizeLinear -> Transpose becomes Transpose -> DequantizeLinear, so that runtimes transpose integers
       as they load.
    """
    for node in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
        readers = [reader for reader, index in node.outputs[0].uses() if index == 0]
        gathers = [reader for reader in readers if reader.op_type == "Gather"]
        transposes = [reader for reader in readers if reader.op_type == "Transpose"] if gathers else []
        axis = node.attributes.get_int("axis", 1)
        for reader in [*gathers, *transposes]:
            integers, scale, zero_point = node.inputs
            assert integers is not None
            operands = [integers, *reader.inputs[1:]]
            moved = ir.Node("", reader.op_type, operands, reader.attributes.values(), num_outputs=1)
            moved.outputs[0].type = ir.TensorType(integers.dtype)  # type: ignore[arg-type]
            moved.outputs[0].shape = reader.outputs[0].shape
            if reader in gathers and axis == 0:
                chain = [moved, *_scale_rows(model, moved, node, reader)]
            else:
                last = ir.AttrInt64("axis", -1 if reader in gathers else 1 - axis)
                inputs = [moved.outputs[0], scale, zero_point]
                chain = [moved, ir.Node("", "DequantizeLinear", inputs, [last], num_outputs=1)]
            _take_over(reader, chain, f"{str(node.name).removesuffix('/DequantizeLinear')}/{reader.name}")
        if gathers and not node.outputs[0].uses():
            node.graph.remove(node, safe=True)  # type: ignore[union-attr]


def _scale_rows(model: ir.Model, rows: ir.Node, node: ir.Node, gather: ir.Node) -> list[ir.Node]:
    _, scale, zero_point = node.inputs
    assert zero_point is not None
    assert zero_point.const_value is not None
    one = _add_initializer(model, "one", np.float32(1))
    zero = _add_initializer(model, f"{zero_point.name}_of_rows", zero_point.const_value.numpy()[0])
    last = _add_initializer(model, "last_axis", np.array([-1], np.int64))
    plain = ir.Node("", "DequantizeLinear", [rows.outputs[0], one, zero], num_outputs=1)
    scales = ir.Node("", "Gather", [scale, gather.inputs[1]], num_outputs=1)
    columns = ir.Node("", "Unsqueeze", [scales.outputs[0], last], num_outputs=1)
    product = ir.Node("", "Mul", [plain.outputs[0], columns.outputs[0]], num_outputs=1)
    for step in (scales, columns):
        step.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    product.outputs[0].type, product.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), gather.outputs[0].shape
    return [plain, scales, columns, product]


def _lower_quantize_dequantize(model: ir.Model) -> None:
    """QuantizeDequantize -> QuantizeLinear, Clip on uint8 below 8 bits, DequantizeLinear."""
    for node in _nodes(model, "QuantizeDequantize"):
        site = node.attributes["site"].as_string()
        bits = node.attributes["bits"].as_int()
        scale = _add_initializer(model, f"{site}_scale", np.float32(node.attributes["scale"].as_float()))
        zero = _add_initializer(model, f"{site}_zero_point", np.uint8(node.attributes["zero_point"].as_int()))
        chain = [ir.Node("", "QuantizeLinear", [node.inputs[0], scale, zero], num_outputs=1)]
        if bits < MAX_BITS:
            low = _add_initializer(model, f"{site}_quant_min", np.uint8(0))
            high = _add_initializer(model, f"{site}_quant_max", np.uint8((1 << bits) - 1))
            chain.append(ir.Node("", "Clip", [chain[-1].outputs[0], low, high], num_outputs=1))
        chain.append(ir.Node("", "DequantizeLinear", [chain[-1].outputs[0], scale, zero], num_outputs=1))
        _take_over(node, chain, site)


def _take_over(node: ir.Node, chain: list[ir.Node], site: str) -> None:
    """Put a chain in the place of a placeholder; its last output takes the placeholder's name and readers."""
    old, new = node.outputs[0], chain[-1].outputs[0]
    for index, step in enumerate(chain):
        is_repeated = step.op_type in [earlier.op_type for earlier in chain[:index]]
        step.name = f"{site}/{step.op_type}{index if is_repeated else ''}"
        step.outputs[0].name = f"{step.name}_output"
        if step.outputs[0].type is None:
            step.outputs[0].shape = old.shape
            is_integer = step.op_type != "DequantizeLinear"
            step.outputs[0].type = ir.TensorType(ir.DataType.UINT8 if is_integer else ir.DataType.FLOAT)
    new.name = old.name
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, chain)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _add_initializer(model: ir.Model, name: str, array: np.ndarray[Any, Any] | np.generic) -> ir.Value:
    if name not in model.graph.initializers:
        tensor = ir.Tensor(np.asarray(array), name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        model.graph.initializers[name] = value
    return model.graph.initializers[name]


def _finish(model: ir.Model, allocation: Allocation) -> None:
    _name_batch(model)
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]
    ClearMetadataAndDocStringPass()(model)
    used: set[str] = set()
    for node in model.graph:
        base, count = node.name or node.op_type, 1
        while node.name in used or not node.name:
            node.name, count = f"{base}_{count}", count + 1
        used.add(node.name)
    model.opset_imports.pop(_DOMAIN, None)
    model.ir_version = _IR_VERSION
    model.producer_name = _DOMAIN
    described = dataclasses.asdict(allocation)
    model.metadata_props[METADATA_KEY] = json.dumps(described, sort_keys=True)


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


def _check(proto: onnx.ModelProto) -> None:
    try:
        onnx.checker.check_model(proto, full_check=True)
        onnx.shape_inference.infer_shapes(proto, strict_mode=True, check_type=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph fails the ONNX checker: {error}") from error


def _check_run(draft: Path, quantized: nn.Module, provenance: Provenance) -> None:
    """Run the file, unoptimised, beside the module on the example inputs."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    feeds = {name: x.detach().cpu().numpy() for name, x in provenance.example_inputs.items()}
    try:
        session = onnxruntime.InferenceSession(str(draft), options, providers=["CPUExecutionProvider"])
        found = session.run(list(provenance.output_names), feeds)
    except Exception as error:
        raise ExportError(f"onnxruntime {onnxruntime.__version__} refuses the exported file: {error}") from error
    with torch.no_grad():
        outputs = quantized(*provenance.example_inputs.values())
    expected = [x.cpu().numpy() for x in _flat_tensors(outputs)]
    for name, ours, theirs in zip(provenance.output_names, expected, found, strict=True):
        if ours.shape != theirs.shape:
            raise ExportError(f"onnxruntime gives {name!r} the shape {theirs.shape}, the module {ours.shape}")
        # Sums in another order flip single steps, which grow on their way; a wrong graph is off by its whole size.
        distance = float(np.linalg.norm(ours - theirs))
        if not distance <= _TOLERATED_ERROR * float(np.linalg.norm(ours)):
            raise ExportError(f"onnxruntime disagrees with the module at output {name!r} by {distance:g} (L2)")


def _flat_tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [tensor for item in items for tensor in _flat_tensors(item)]

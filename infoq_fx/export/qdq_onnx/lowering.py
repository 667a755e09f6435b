"""Lowers placeholder ops to ONNX operators, with integers in the chosen container."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from infoq_fx.core.targets import Container, Target
from infoq_fx.export.qdq_onnx.translation.placeholders import DOMAIN, find_placeholders
from infoq_fx.export.qdq_onnx.translation.recurrent import WIDENED, order_gates
from infoq_fx.types import MAX_BITS

__all__ = ["MIRRORED", "add_initializer", "lower", "store_transposed", "take_over"]

MIRRORED = "infoq_fx.mirrored"
_SHORT_NAMES = {"QuantizeLinear": "Q", "DequantizeLinear": "DQ"}
_VIEWS = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Identity"}


def lower(model: ir.Model, container: Container, target: Target) -> None:
    """Replace all placeholders, in place.

    Weights are stored as int8 or float16, transposed if the graph would transpose them at run time. An activation of
    fewer than 8 bits is QuantizeLinear, Clip on the uint8 value, DequantizeLinear: a float Clip before QuantizeLinear
    would prevent the fusion of integer kernels.
    """
    if not target.quantizes_before_parameters:
        _drop_outputs_before_parameters(model)
        _write_relus_as_maxima(model)
    store_transposed(model)
    _make_scales_positive(model)
    _lower_dequantize(model, target)
    _gather_integers(model)
    _keep_reduced_axes(model)
    _lower_quantize_dequantize(model, shares_scales=container.is_packed)
    if container.is_packed:
        _derive_bias_scales(model)


def _drop_outputs_before_parameters(model: ir.Model) -> None:
    """Remove the QuantizeDequantize between a convolution, views and a Concat with a parameter."""
    for node in find_placeholders(model, "QuantizeDequantize"):
        source, reader = node.inputs[0], node
        assert source is not None
        producer = source.producer()
        while len(uses := reader.outputs[0].uses()) == 1 and (reader is node or reader.op_type in _VIEWS):
            reader = next(iter(uses)).node
        is_joined = reader.op_type == "Concat" and any(_is_parameter(value) for value in reader.inputs)
        if producer is not None and producer.op_type == "Conv" and is_joined:
            node.outputs[0].replace_all_uses_with(source, replace_graph_outputs=True)
            node.graph.remove(node, safe=True)  # type: ignore[union-attr]


def _write_relus_as_maxima(model: ir.Model) -> None:
    """Write a Relu behind a Concat with a parameter as Max: OpenVINO 2026.4 computes the fused one wrongly.

    It does so where the batch is dynamic.
    """
    for node in [node for node in model.graph if node.op_type == "Relu"]:
        source = node.inputs[0]
        producer = None if source is None else source.producer()
        if producer is not None and producer.op_type == "Concat" and any(map(_is_parameter, producer.inputs)):
            zero = add_initializer(model, "no_less_than", np.float32(0))
            maximum = ir.Node("", "Max", [source, zero], num_outputs=1, name=node.name)
            old, new = node.outputs[0], maximum.outputs[0]
            new.name, new.shape, new.type = old.name, old.shape, old.type
            model.graph.insert_before(node, maximum)
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)


def _is_parameter(value: ir.Value | None) -> bool:
    while value is not None and (producer := value.producer()) is not None and producer.op_type in _VIEWS:
        value = producer.inputs[0]
    return value is not None and value.const_value is not None


def store_transposed(model: ir.Model) -> None:
    """Transpose weights in the file instead of at run time.

    Parameters of recurrent layers are stored as ONNX's operators read them.

    1. Dequantize -> Transpose(1, 0): the readers of the Transpose read transposed integers.
    2. Dequantize -> Gemm(transB=1): the same, with transB=0.

    Left alone: a weight that an embedding also reads, so that it is stored only once.
    """
    order_gates(model, functools.partial(add_initializer, model))
    for node in find_placeholders(model, "Dequantize"):
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
    stored = add_initializer(model, f"{source.name}_transposed", integers)
    attributes = {**node.attributes, "axis": ir.AttrInt64("axis", 1 - node.attributes["axis"].as_int())}
    moved = ir.Node(DOMAIN, "Dequantize", [stored, node.inputs[1]], list(attributes.values()), num_outputs=1)
    moved.outputs[0].name = f"{node.outputs[0].name}_transposed"
    node.graph.insert_before(node, moved)  # type: ignore[union-attr]
    return moved.outputs[0]


def _make_scales_positive(model: ir.Model) -> None:
    """Negate the integers of channels with a negative scale, which runtimes need not take.

    ``MIRRORED`` in a weight's meta says which: booleans that broadcast to it.
    """
    found: dict[ir.Value, Any] = {}
    scales: set[ir.Value] = set()
    for node in find_placeholders(model, "Dequantize"):
        source, scale = node.inputs
        is_negative = scale.const_value.numpy() < 0  # type: ignore[union-attr]
        if is_negative.any() and source is not None and scale is not None:
            shape = [1] * len(source.shape or ())
            if is_negative.ndim:
                shape[node.attributes["axis"].as_int()] = -1
            found[source] = is_negative.reshape(shape)
            scales.add(scale)
    for source, is_mirrored in found.items():
        integers = source.const_value.numpy()  # type: ignore[union-attr]
        source.const_value = ir.Tensor(np.where(is_mirrored, -integers, integers), name=source.name)
        source.meta[MIRRORED] = is_mirrored
    for scale in scales:
        scale.const_value = ir.Tensor(np.abs(scale.const_value.numpy()), name=scale.name)  # type: ignore[union-attr]


def _lower_dequantize(model: ir.Model, target: Target) -> None:
    for node in find_placeholders(model, "Dequantize"):
        source, scale = node.inputs
        assert source is not None
        assert source.const_value is not None
        assert scale is not None
        if source.const_value.dtype == ir.DataType.FLOAT16:
            take_over(node, _cast_weight(model, node), node.attributes["site"].as_string())
            continue
        inputs: list[ir.Value | None] = [source, scale]
        chain: list[ir.Node] = []
        if WIDENED in node.attributes:
            # OpenVINO 2026.4 refuses recurrent layers whose weights it does not fold, and it does not fold int8 ones.
            widened = ir.Node("", "Cast", [source], [ir.AttrInt64("to", int(ir.DataType.INT32))], num_outputs=1)
            widened.outputs[0].type = ir.TensorType(ir.DataType.INT32)
            inputs, chain = [widened.outputs[0], scale], [widened]
        elif source.const_value.dtype == ir.DataType.INT8:
            inputs = _store_weight(model, source, scale, node.attributes["bits"].as_int(), target)
        lowered = ir.Node("", "DequantizeLinear", inputs, [node.attributes["axis"]], num_outputs=1)
        take_over(node, [*chain, lowered], node.attributes["site"].as_string())


def _cast_weight(model: ir.Model, node: ir.Node) -> list[ir.Node]:
    """Operators that compute a weight from float16, and multiply its channels by their units if these are not all 1."""
    source, scale = node.inputs
    cast = ir.Node("", "Cast", [source], [ir.AttrInt64("to", ir.DataType.FLOAT.value)], num_outputs=1)
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), node.outputs[0].shape
    units = scale.const_value.numpy()  # type: ignore[union-attr]
    if bool((units == 1).all()):
        return [cast]
    shape = [1] * len(source.shape)  # type: ignore[union-attr, arg-type]
    if units.ndim:
        shape[node.attributes["axis"].as_int()] = -1
    unit = add_initializer(model, f"{source.name}_unit", units.reshape(shape))  # type: ignore[union-attr]
    product = ir.Node("", "Mul", [cast.outputs[0], unit], num_outputs=1)
    product.outputs[0].type, product.outputs[0].shape = cast.outputs[0].type, cast.outputs[0].shape
    return [cast, product]


def _store_weight(
    model: ir.Model, source: ir.Value, scale: ir.Value, bits: int, target: Target
) -> list[ir.Value | None]:
    """The operands of a weight's DequantizeLinear."""
    assert source.const_value is not None
    integers: np.ndarray[Any, Any] = source.const_value.numpy()
    channels = math.prod(scale.shape or ())
    if bits == MAX_BITS and target.shifts_full_weights:
        shifted = add_initializer(model, f"{source.name}_shifted", (integers.astype(np.int16) + 128).astype(np.uint8))
        return [shifted, scale, add_initializer(model, f"z128_{channels}", np.full(channels, 128, np.uint8))]
    return [source, scale, add_initializer(model, f"z{channels}", np.zeros(channels, np.int8))]


def _gather_integers(model: ir.Model) -> None:
    """Move DequantizeLinear after Gather, so that only the gathered rows of 8-bit integers are dequantized.

    1. scales of features (axis 1): Gather -> DequantizeLinear along the last axis.
    2. scales of rows (axis 0, a weight shared with a linear layer): the scales are gathered too and multiplied. The
       linear layer's DequantizeLinear -> Transpose becomes Transpose -> DequantizeLinear, so that runtimes transpose
       the integers at load time.
    """
    for node in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
        readers = [reader for reader, index in node.outputs[0].uses() if index == 0]
        gathers = [reader for reader in readers if reader.op_type == "Gather"]
        transposes = [reader for reader in readers if reader.op_type == "Transpose"] if gathers else []
        axis, (integers, scale, *rest) = node.attributes.get_int("axis", 1), node.inputs
        assert integers is not None
        for reader in [*gathers, *transposes]:
            operands = [integers, *reader.inputs[1:]]
            moved = ir.Node("", reader.op_type, operands, reader.attributes.values(), num_outputs=1)
            moved.outputs[0].type = ir.TensorType(integers.dtype)  # type: ignore[arg-type]
            moved.outputs[0].shape = reader.outputs[0].shape
            if reader in gathers and axis == 0:
                chain = [moved, *_scale_rows(model, moved, node, reader)]
            else:
                last = ir.AttrInt64("axis", -1 if reader in gathers else 1 - axis)
                inputs = [moved.outputs[0], scale, *rest]
                chain = [moved, ir.Node("", "DequantizeLinear", inputs, [last], num_outputs=1)]
            take_over(reader, chain, f"{str(node.name).removesuffix('/DQ')}/{reader.name}")
        if gathers and not node.outputs[0].uses():
            node.graph.remove(node, safe=True)  # type: ignore[union-attr]


def _keep_reduced_axes(model: ir.Model) -> None:
    """Write a reduction of dequantized embeddings as one that keeps the axes, and a Squeeze.

    OpenVINO 2026.4 moves the scales of the features behind the reduction, and takes those of another axis if the
    reduction removes one.
    """
    for node in [node for node in model.graph if node.op_type.startswith("Reduce")]:
        source = node.inputs[0]
        producer = None if source is None else source.producer()
        is_by_channel = (
            producer is not None and producer.op_type == "DequantizeLinear" and _has_axis(producer.inputs[1])
        )
        keeps_axes = bool(node.attributes.get_int("keepdims", 1))
        if not is_by_channel or len(node.inputs) < 2 or keeps_axes:
            continue
        attributes = [*(x for x in node.attributes.values() if x.name != "keepdims"), ir.AttrInt64("keepdims", 1)]
        kept = ir.Node("", node.op_type, node.inputs, attributes, num_outputs=1)
        squeezed = ir.Node("", "Squeeze", [kept.outputs[0], node.inputs[1]], num_outputs=1)
        kept.outputs[0].type = node.outputs[0].type
        squeezed.outputs[0].type, squeezed.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        take_over(node, [kept, squeezed], str(node.name))


def _has_axis(scale: ir.Value | None) -> bool:
    return scale is not None and scale.const_value is not None and len(scale.const_value.shape) == 1


def _scale_rows(model: ir.Model, rows: ir.Node, node: ir.Node, gather: ir.Node) -> list[ir.Node]:
    _, scale, zero_point = node.inputs
    assert zero_point is not None
    assert zero_point.const_value is not None
    one = add_initializer(model, "one", np.float32(1))
    zero = add_initializer(model, f"{zero_point.name}_of_rows", zero_point.const_value.numpy()[0])
    last = add_initializer(model, "last_axis", np.array([-1], np.int64))
    plain = ir.Node("", "DequantizeLinear", [rows.outputs[0], one, zero], num_outputs=1)
    scales = ir.Node("", "Gather", [scale, gather.inputs[1]], num_outputs=1)
    columns = ir.Node("", "Unsqueeze", [scales.outputs[0], last], num_outputs=1)
    product = ir.Node("", "Mul", [plain.outputs[0], columns.outputs[0]], num_outputs=1)
    for step in (scales, columns):
        step.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    product.outputs[0].type, product.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), gather.outputs[0].shape
    return [plain, scales, columns, product]


def _lower_quantize_dequantize(model: ir.Model, *, shares_scales: bool) -> None:
    for node in find_placeholders(model, "QuantizeDequantize"):
        site = node.attributes["site"].as_string()
        bits = node.attributes["bits"].as_int()
        step = np.float32(node.attributes["scale"].as_float())
        name = f"scale_{float(step):g}" if shares_scales and float(f"{float(step):g}") == step else f"{site}_scale"
        scale = add_initializer(model, name, step)
        zero = _add_scalar(model, "zero", node.attributes["zero_point"].as_int())
        chain = [ir.Node("", "QuantizeLinear", [node.inputs[0], scale, zero], num_outputs=1)]
        if bits < MAX_BITS:
            low, high = _add_scalar(model, "quant_min", 0), _add_scalar(model, "quant_max", (1 << bits) - 1)
            chain.append(ir.Node("", "Clip", [chain[-1].outputs[0], low, high], num_outputs=1))
        chain.append(ir.Node("", "DequantizeLinear", [chain[-1].outputs[0], scale, zero], num_outputs=1))
        take_over(node, chain, site)


def _derive_bias_scales(model: ir.Model) -> None:
    """Compute scales of biases as products of the input's and the weight's scales, which runtimes fold at load time."""
    for node in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
        integers, scale = node.inputs[:2]
        if not _is_constant(integers, ir.DataType.INT32) or not _is_constant(scale, ir.DataType.FLOAT):
            continue
        for reader, _ in node.outputs[0].uses():
            operands = _scales_of_product(reader)
            if operands is None:
                continue
            factors = [value.const_value.numpy() for value in operands]  # type: ignore[union-attr]
            if np.array_equal(factors[0] * factors[1], scale.const_value.numpy()):  # type: ignore[union-attr]
                product = ir.Node("", "Mul", operands, num_outputs=1, name=f"{node.name}_scale")
                product.outputs[0].name = f"{node.outputs[0].name}_scale"
                node.graph.insert_before(node, product)  # type: ignore[union-attr]
                node.replace_input_with(1, product.outputs[0])
                break


def _scales_of_product(reader: ir.Node) -> list[ir.Value] | None:
    """The operands' scales of the layer that a bias belongs to, from the node that reads the bias."""
    if reader.op_type == "Add":
        products = [value.producer() for value in reader.inputs if value is not None]
        reader = next((node for node in products if node is not None and node.op_type == "MatMul"), reader)
    scales = []
    for value in reader.inputs[:2]:
        producer = None if value is None else value.producer()
        if producer is None or producer.op_type != "DequantizeLinear":
            return None
        scale = producer.inputs[1]
        if scale is None or not _is_constant(scale, ir.DataType.FLOAT):
            return None
        scales.append(scale)
    return scales


def _is_constant(value: ir.Value | None, dtype: ir.DataType) -> bool:
    return value is not None and value.const_value is not None and value.const_value.dtype == dtype


def take_over(node: ir.Node, chain: list[ir.Node], site: str) -> None:
    """Replace a placeholder by a chain of nodes, whose last output gets the placeholder's name and readers."""
    old, new = node.outputs[0], chain[-1].outputs[0]
    for index, step in enumerate(chain):
        is_repeated = step.op_type in [earlier.op_type for earlier in chain[:index]]
        step.name = f"{site}/{_SHORT_NAMES.get(step.op_type, step.op_type)}{index if is_repeated else ''}"
        step.outputs[0].name = f"{old.name}_{step.op_type}{index}"
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


def _add_scalar(model: ir.Model, name: str, value: int) -> ir.Value:
    """A uint8 scalar, shared by all sites with the same value."""
    return add_initializer(model, f"{name}_{value}", np.uint8(value))


def add_initializer(model: ir.Model, name: str, array: np.ndarray[Any, Any] | np.generic) -> ir.Value:
    """An initializer with these values: the one of that name if it holds them, else a new one under a free name."""
    tensor, held = ir.Tensor(np.asarray(array), name=name), model.graph.initializers
    base, count = name, 1
    while name in held:
        if _holds(held[name], tensor):
            return held[name]
        name, count = f"{base}_{count}", count + 1
    tensor.name = name
    held[name] = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    return held[name]


def _holds(value: ir.Value, tensor: ir.TensorProtocol) -> bool:
    found = value.const_value
    return (
        found is not None
        and found.dtype == tensor.dtype
        and found.shape == tensor.shape
        and found.tobytes() == tensor.tobytes()
    )

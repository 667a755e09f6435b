"""Lowers placeholder ops to QONNX ``Quant`` nodes, which state any bit-width, for FINN and hls4ml."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from infoq_fx.export.qdq_onnx.lowering import add_initializer, store_transposed, take_over
from infoq_fx.export.qdq_onnx.translation.placeholders import find_placeholders

__all__ = ["QONNX_DOMAIN", "QONNX_OPSET", "lower_to_quant", "write_out_quant"]

QONNX_DOMAIN, QONNX_OPSET = "qonnx.custom_op.general", 1


def lower_to_quant(model: ir.Model) -> None:
    """Replace all placeholders, in place.

    1. A weight: its values in float32, and a signed Quant of its bit-width with its scales. A bias: its values.
    2. An activation with zero point 0: an unsigned Quant of its bit-width; in the middle of the range, a signed one.
    3. With another zero point: a Clip to its range, and a signed Quant that holds the range. It may have one bit more.

    No Quant has a zero point: FINN takes none, and QONNX rounds after adding it, so that ties go to other values.

    Reference:
        Pappalardo et al., "QONNX: Representing Arbitrary-Precision Quantized Neural Networks", 2022.
    """
    store_transposed(model)
    for node in find_placeholders(model, "Dequantize"):
        _lower_parameter(model, node)
    for node in find_placeholders(model, "QuantizeDequantize"):
        _lower_activation(model, node)


def write_out_quant(model: ir.Model) -> None:
    """Replace Quant nodes by the standard operators that they stand for, in place, so that any runtime can run them.

    Reference:
        The QONNX specification: ``(round(clip(x / scale + zeropt)) - zeropt) * scale``, here with zeropt 0.
    """
    for index, node in enumerate([node for node in model.graph if node.op_type == "Quant"]):
        source, scale, _, width = node.inputs
        assert scale is not None
        assert width is not None
        assert width.const_value is not None
        levels = 2.0 ** float(width.const_value.numpy())
        low = -levels / 2 if node.attributes["signed"].as_int() else 0.0
        bounds = [np.float32(low), np.float32(low + levels - 1)]
        limits = [add_initializer(model, f"quant_{index}_{which}", bound) for which, bound in enumerate(bounds)]
        chain = [ir.Node("", "Div", [source, scale], num_outputs=1)]
        for op_type, others in (("Clip", limits), ("Round", []), ("Mul", [scale])):
            chain.append(ir.Node("", op_type, [chain[-1].outputs[0], *others], num_outputs=1))
        for step in chain:
            step.outputs[0].type, step.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), node.outputs[0].shape
        take_over(node, chain, f"quant_{index}")
    model.opset_imports.pop(QONNX_DOMAIN, None)


def _lower_parameter(model: ir.Model, node: ir.Node) -> None:
    source, scale = node.inputs
    site = node.attributes["site"].as_string()
    integers, scales = _values(source), _values(scale)
    shape = [1] * integers.ndim
    if scales.ndim:
        shape[node.attributes["axis"].as_int()] = -1
    steps = scales.reshape(shape) if integers.ndim else scales
    values = add_initializer(model, f"{site}_values", (integers.astype(np.float32) * steps).astype(np.float32))
    if integers.dtype != np.int8:
        node.outputs[0].replace_all_uses_with(values, replace_graph_outputs=True)
        node.graph.remove(node, safe=True)  # type: ignore[union-attr]
        return
    bits = node.attributes["bits"].as_int()
    take_over(node, [_quant(model, values, f"{site}_quant_scale", steps, bits, is_signed=True)], site)


def _lower_activation(model: ir.Model, node: ir.Node) -> None:
    site, bits = node.attributes["site"].as_string(), node.attributes["bits"].as_int()
    step, zero_point = np.float32(node.attributes["scale"].as_float()), node.attributes["zero_point"].as_int()
    source, low, high = node.inputs[0], -zero_point, (1 << bits) - 1 - zero_point
    assert source is not None
    chain: list[ir.Node] = []
    if low == 0 or low == -(1 << (bits - 1)):
        width = bits
    else:
        width = 1 + max((-low - 1).bit_length(), high.bit_length())
        bounds = [
            add_initializer(model, f"{site}_{name}", np.float32(n) * step) for name, n in (("low", low), ("high", high))
        ]
        chain.append(ir.Node("", "Clip", [source, *bounds], num_outputs=1))
        source = chain[0].outputs[0]
        source.type, source.shape = ir.TensorType(ir.DataType.FLOAT), node.outputs[0].shape
    chain.append(_quant(model, source, f"{site}_quant_scale", step, width, is_signed=low != 0))
    take_over(node, chain, site)


def _quant(
    model: ir.Model,
    source: ir.Value,
    name: str,
    scale: np.ndarray[Any, Any] | np.float32,
    bits: int,
    *,
    is_signed: bool,
) -> ir.Node:
    inputs = [
        source,
        add_initializer(model, name, np.asarray(scale, np.float32)),
        add_initializer(model, "zeropt", np.float32(0)),
        add_initializer(model, f"bits_{bits}", np.float32(bits)),
    ]
    attributes = [
        ir.AttrInt64("signed", int(is_signed)),
        ir.AttrInt64("narrow", 0),
        ir.AttrString("rounding_mode", "ROUND"),
    ]
    quant = ir.Node(QONNX_DOMAIN, "Quant", inputs, attributes, num_outputs=1)
    quant.outputs[0].type, quant.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), source.shape
    return quant


def _values(value: ir.Value | None) -> np.ndarray[Any, Any]:
    assert value is not None
    assert value.const_value is not None
    array: np.ndarray[Any, Any] = value.const_value.numpy()
    return array

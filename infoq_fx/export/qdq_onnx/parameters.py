"""Stores scales, biases and zero points in fewer bytes, with operators that runtimes compute once, as they load."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx_ir as ir

from infoq_fx.export.qdq_onnx.graph_start import Array, GraphStart, read_array

__all__ = ["pack_parameters"]

_TABLE_ENTRIES = 256
_MOST_SHIFT = 4  # of biases, see infoq_fx.quantization.codebooks.bias_multiple
_NODES_BYTES = 150  # the operators of one of the three kinds in the file


def pack_parameters(model: ir.Model) -> None:
    """Store the parameters per channel of a lowered model in fewer bytes, in place, where that makes the file smaller.

    Scales have few significant bits, so that many are equal: a byte each, the index into a table of up to 256 values.
    Biases that fit 16 bits, as multiples of up to 16, take 16. Zero points of zero are computed.
    """
    vectors = [value for value in model.graph.initializers.values() if _is_vector(value)]
    start = GraphStart(model)
    _look_up_scales(start, [value for value in vectors if value.dtype == ir.DataType.FLOAT])
    _widen_biases(start, [value for value in vectors if value.dtype == ir.DataType.INT32 and _is_read_at(value, 0)])
    _compute_zeros(start, [value for value in vectors if value.dtype == ir.DataType.INT8 and _is_read_at(value, 2)])
    start.insert()


def _is_vector(value: ir.Value) -> bool:
    """Whether an initializer has several values along one axis; OpenVINO refuses single computed ones."""
    tensor = value.const_value
    return tensor is not None and len(tensor.shape) == 1 and tensor.size > 1 and not value.is_graph_output()


def _is_read_at(value: ir.Value, index: int) -> bool:
    return all(use.node.op_type == "DequantizeLinear" and use.idx == index for use in value.uses())


def _look_up_scales(start: GraphStart, scales: list[ir.Value]) -> None:
    known: set[float] = set()
    chosen: list[ir.Value] = []
    # Values are compared as bits: -0.0 is not 0.0.
    for value in sorted(scales, key=lambda value: (-read_array(value).size, str(value.name))):
        found = set(read_array(value).view(np.uint32).tolist())
        added = 4 * len(found - known)
        if added < 3 * read_array(value).size and len(found | known) <= _TABLE_ENTRIES:
            known |= found
            chosen.append(value)
    count = sum(read_array(value).size for value in chosen)
    if not chosen or 3 * count < 4 * len(known) + _NODES_BYTES:
        return
    table = np.array(sorted(known), np.uint32)
    joined = np.concatenate([read_array(value).view(np.uint32) for value in chosen])
    places = start.as_int32("scales", np.searchsorted(table, joined).astype(np.uint8))
    values = start.call("Gather", start.constant("scale_table", table.view(np.float32)), places)
    _distribute(start, "scale", values, chosen)


def _widen_biases(start: GraphStart, biases: list[ir.Value]) -> None:
    """Store biases in 16 bits, those of one power of two that all values are multiples of together."""
    groups: defaultdict[int, list[ir.Value]] = defaultdict(list)
    for value in biases:
        shift = _find_shift(read_array(value))
        if shift is not None:
            groups[shift].append(value)
    for shift, group in sorted(groups.items()):
        if 2 * sum(read_array(value).size for value in group) < _NODES_BYTES:
            continue
        name = f"bias{shift or ''}"
        joined = np.concatenate([(read_array(value) >> shift).astype(np.int16) for value in group])
        values = start.as_int32(f"{name}es", joined)
        if shift:
            values = start.call("Mul", values, start.number(1 << shift))
        _distribute(start, name, values, group)


def _find_shift(integers: Array) -> int | None:
    """The least power of two, as an exponent, in multiples of which the values fit 16 bits; None if there is none."""
    limits = np.iinfo(np.int16)
    for shift in range(_MOST_SHIFT + 1):
        if (integers & ((1 << shift) - 1)).any():
            return None
        if limits.min <= (integers >> shift).min(initial=0) and (integers >> shift).max(initial=0) <= limits.max:
            return shift
    return None


def _compute_zeros(start: GraphStart, zero_points: list[ir.Value]) -> None:
    zeros = [value for value in zero_points if not read_array(value).any()]
    count = sum(read_array(value).size for value in zeros)
    if zeros and count > _NODES_BYTES:
        zero = start.constant("zero", np.int8(0))
        _distribute(start, "zeros", start.call("Expand", zero, start.shape([count])), zeros)


def _distribute(start: GraphStart, name: str, joined: ir.Value, values: list[ir.Value]) -> None:
    sizes = [read_array(value).size for value in values]
    for value, part in zip(values, start.split(name, joined, sizes, sum(sizes)), strict=True):
        start.replace(value, part)

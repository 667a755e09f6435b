"""Reduces the bytes of nodes and names, which matter in the files of small networks."""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir

__all__ = ["drop_defaults", "shorten", "slim_values"]

_ONES = {"dilations", "strides"}  # lists whose default of ones is only in the text of the specification
_SUFFIXES = {"_transposed": "", "_gates": "", ".weight_scale": ".scale"}


def drop_defaults(node: ir.Node) -> None:
    """Remove attributes that are equal to their defaults."""
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


def slim_values(model: ir.Model) -> None:
    """Shorten the names of inner values and remove shapes and types that runtimes infer: a tenth of a small file."""
    outputs, taken = {id(value) for value in model.graph.outputs}, {value.name for value in model.graph.inputs}
    taken |= {*model.graph.initializers, *(value.name for value in model.graph.outputs)}
    names = (name for name in _count_in_letters() if name not in taken)
    for node in model.graph:
        for value in node.outputs:
            if id(value) not in outputs:
                value.name = next(names)
                value.shape = value.type = None
    for value in model.graph.initializers.values():
        value.shape = value.type = None
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()


def shorten(model: ir.Model) -> None:
    """Also remove everything that a runtime can infer, for containers made for small files.

    It removes ReLUs before quantizers with zero point 0, since these saturate at 0, and kernel shapes, which are those
    of the weights. Scalars are named by their value, and suffixes of names are removed if the names stay unique.
    """
    for node in list(model.graph):
        if node.op_type == "Relu" and _is_done_by_readers(node):
            source, output = node.inputs[0], node.outputs[0]
            assert source is not None
            output.replace_all_uses_with(source)
            model.graph.remove(node, safe=True)
        elif node.op_type in ("Conv", "ConvTranspose"):
            node.attributes.pop("kernel_shape", None)
    taken = {*model.graph.initializers, *(value.name for value in [*model.graph.inputs, *model.graph.outputs])}
    for value in list(model.graph.initializers.values()):
        name = _short_name(value)
        if name not in taken:
            value.name = name
            taken.add(name)


def _count_in_letters() -> Iterator[str]:
    """``a`` to ``z``, ``aa``, ``ab``, ..."""
    for length in itertools.count(1):
        yield from map("".join, itertools.product(string.ascii_lowercase, repeat=length))


def _is_done_by_readers(node: ir.Node) -> bool:
    """Whether all readers of the node saturate at 0 anyway."""
    output = node.outputs[0]
    return not output.is_graph_output() and all(
        reader.op_type == "QuantizeLinear" and index == 0 and _starts_at_zero(reader) for reader, index in output.uses()
    )


def _starts_at_zero(quantize: ir.Node) -> bool:
    zero_point = quantize.inputs[2].const_value if len(quantize.inputs) > 2 and quantize.inputs[2] is not None else None
    return zero_point is not None and zero_point.dtype == ir.DataType.UINT8 and not zero_point.numpy().any()


def _short_name(value: ir.Value) -> str:
    name, tensor = str(value.name), value.const_value
    for suffix, short in _SUFFIXES.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix) + short
    if tensor is None or tensor.shape or not name.startswith(("zero_", "scale_")):
        return name
    number = float(np.asarray(tensor.numpy()))
    fraction, exponent = math.frexp(number)
    return f"2^{exponent - 1}" if fraction == 0.5 and number < 1 else f"{number:g}"

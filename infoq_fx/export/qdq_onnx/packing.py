"""Packs integer weights into as many bits as they need, with operators that runtimes compute once, as they load.

A value of b bits is cut into fields of 4, 2 and 1 bits, and equal fields are stored several in a byte: 3 bits are one
field of 2 and one of 1. Unpacking looks each byte up in a table of its fields, adds the fields, and looks the sum up in
the 2^b int8 values: all integers of b bits, or the levels of this weight (a codebook). Mirrored channels, which are
stored as a bit each, look up the negatives of these values. onnxruntime and OpenVINO both fold these operators;
OpenVINO does not fold bit operations, and would then run the layers in float.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from infoq_fx.core.targets import CHAIN_BYTES, LEVELS_BYTES, MIRROR_BYTES, MIRROR_CHAIN_BYTES, NODE_BYTES
from infoq_fx.export.qdq_onnx.graph_start import Array, GraphStart, read_array
from infoq_fx.export.qdq_onnx.lowering import MIRRORED

__all__ = ["pack_weights"]

_FIELDS = {4: 1, 2: 2, 1: 3}  # the bits of a field, and log2 of how many a byte holds
_GROUP = 8  # values that take whole bytes at any bit-width
_WIDTHS = range(1, 8)


@dataclass(frozen=True)
class _Weight:
    """An int8 initializer, and how it is stored.

    ``integers`` are its values, those of the ``mirrored`` channels negated; ``mirrored`` broadcasts to them, None for
    no channel. ``width`` are the bits that they take, ``levels`` their values if their range needs more bits.
    """

    value: ir.Value
    integers: Array
    mirrored: Array | None
    width: int
    levels: Array | None

    @property
    def size(self) -> int:
        return int(self.integers.size)

    @property
    def extra_bytes(self) -> int:
        """Bytes of the file besides the packed values."""
        found = NODE_BYTES if self.levels is None else NODE_BYTES + LEVELS_BYTES + len(self.levels)
        if self.mirrored is not None:
            found += MIRROR_BYTES + _packed_bytes(self.mirrored.size, 1)
            found += 0 if self.levels is None else len(self.levels)
        return found

    def codes(self, width: int) -> Array:
        """The values as unsigned integers of a bit-width that holds them, flat."""
        values = self.integers.ravel()
        if self.levels is not None:
            return np.searchsorted(self.levels, values)
        return values.astype(np.int16) + (1 << (width - 1))


def pack_weights(model: ir.Model) -> None:
    """Pack the int8 weights of a lowered model, in place, where that makes the file smaller.

    A weight takes the narrowest bit-width that holds its values or tells its levels apart, or a wider one that others
    take too if the operators of its own would take more space. Weights of one bit-width are stored together.
    """
    values = [value for value in model.graph.initializers.values() if _is_weight(value)]
    plain = [_choose_form(value, read_array(value), None) for value in values]
    forms = [plain, [min(form, _mirror(form), key=_count_bytes) for form in plain]]
    weights, (_, chosen) = min(((form, _choose_widths(form)) for form in forms), key=lambda found: found[1][0])
    groups: defaultdict[int, list[_Weight]] = defaultdict(list)
    for weight in weights:
        fitting = [width for width in chosen if width >= weight.width]
        if fitting and _packed_bytes(weight.size, fitting[0]) < weight.size:
            groups[fitting[0]].append(weight)
    start = GraphStart(model)
    mirrored = _store_mirrored(start, [weight for _, group in sorted(groups.items()) for weight in group])
    for width, group in sorted(groups.items()):
        _store_packed(start, width, group, mirrored)
    start.insert()


def _is_weight(value: ir.Value) -> bool:
    """Whether an initializer holds int8 values that are not zero points."""
    tensor = value.const_value
    is_int8 = tensor is not None and tensor.dtype == ir.DataType.INT8 and tensor.size > 0
    reads_as_zero_point = any(use.node.op_type == "DequantizeLinear" and use.idx == 2 for use in value.uses())
    return is_int8 and not reads_as_zero_point and not value.is_graph_output()


def _mirror(plain: _Weight) -> _Weight:
    """A weight with its mirrored channels stored as such."""
    mirrored = plain.value.meta.get(MIRRORED)
    if mirrored is None or not mirrored.any():
        return plain
    return _choose_form(plain.value, np.where(mirrored, -plain.integers, plain.integers), mirrored)


def _count_bytes(weight: _Weight) -> int:
    return _packed_bytes(weight.size, weight.width) + weight.extra_bytes


def _choose_form(value: ir.Value, integers: Array, mirrored: Array | None) -> _Weight:
    largest = max(int(integers.max()), -int(integers.min()) - 1, 0)
    width, levels = 1 + largest.bit_length(), np.unique(integers)
    by_level = max(1, (len(levels) - 1).bit_length())
    is_smaller = (width - by_level) * integers.size > 8 * (LEVELS_BYTES + len(levels))
    if is_smaller:
        return _Weight(value, integers, mirrored, by_level, levels)
    return _Weight(value, integers, mirrored, width, None)


def _packed_bytes(count: int, width: int) -> int:
    return math.ceil(count * width / 8)


def _choose_widths(weights: Iterable[_Weight]) -> tuple[int, tuple[int, ...]]:
    """The bit-widths whose operators make the file smallest, after the bytes that it then has for the weights.

    Each weight takes the next one up, or a byte a value.
    """
    held: defaultdict[int, list[_Weight]] = defaultdict(list)
    for weight in weights:
        held[weight.width].append(weight)

    def total(chosen: tuple[int, ...]) -> int:
        size, has_mirrored = CHAIN_BYTES * len(chosen), False
        for width, group in held.items():
            taken = next((own for own in chosen if own >= width), 8)
            has_mirrored |= taken < 8 and any(weight.mirrored is not None for weight in group)
            size += _packed_bytes(sum(weight.size for weight in group), taken)
            size += sum(weight.extra_bytes for weight in group) if taken < 8 else 0
        return size + (MIRROR_CHAIN_BYTES if has_mirrored else 0)

    used = [width for width in _WIDTHS if held[width]]
    every = itertools.chain.from_iterable(itertools.combinations(used, count) for count in range(len(used) + 1))
    return min((total(chosen), chosen) for chosen in every)


def _store_packed(start: GraphStart, width: int, weights: list[_Weight], mirrored: Mapping[ir.Value, ir.Value]) -> None:
    """Store weights in ``width`` bits a value, and compute them where they are read."""
    has_mirrored = any(weight.mirrored is not None for weight in weights)
    are_plain = not has_mirrored and all(weight.levels is None for weight in weights)
    every = np.arange(-(1 << (width - 1)), 1 << (width - 1)).astype(np.int8)
    integers = start.constant(f"int{width}", every) if are_plain else None
    codes = [weight.codes(width) for weight in weights]
    # Next to each value is its negative, or the same value again: codes are even.
    parts = _split_unpacked(start, f"int{width}", width, codes, integers, unit=int(has_mirrored))
    for index, (weight, part) in enumerate(zip(weights, parts, strict=True)):
        found = start.call("Reshape", part, start.shape(weight.integers.shape))
        own, name = (every, f"int{width}") if weight.levels is None else (weight.levels, f"q{width}_{index}")
        if weight.mirrored is not None:
            found, name = start.call("Add", found, mirrored[weight.value]), name.replace("int", "m")
        if has_mirrored:
            own = np.stack([own, own if weight.mirrored is None else -own], 1).ravel()
        if not are_plain:
            found = start.call("Gather", start.constant(name, own), found)
        start.replace(weight.value, found)


def _store_mirrored(start: GraphStart, weights: Sequence[_Weight]) -> dict[ir.Value, ir.Value]:
    """Store which channels are mirrored, by weight: int32, 1 for these, in a shape that broadcasts to the weight."""
    found: dict[ir.Value, ir.Value] = {}
    for behind in sorted({_axes_behind(weight.mirrored) for weight in weights if weight.mirrored is not None}):
        flags = {
            weight.value: weight.mirrored.ravel().astype(np.int16)
            for weight in weights
            if weight.mirrored is not None and _axes_behind(weight.mirrored) == behind
        }
        parts = _split_unpacked(start, f"m{behind}", 1, list(flags.values()), None, shape=[-1, *[1] * behind])
        found.update(zip(flags, parts, strict=True))
    return found


def _axes_behind(mirrored: Array) -> int:
    """How many axes follow the channels."""
    return int(mirrored.ndim - 1 - np.argmax(mirrored.shape))


def _split_unpacked(
    start: GraphStart,
    name: str,
    width: int,
    codes: Sequence[Array],
    levels: ir.Value | None,
    *,
    unit: int = 0,
    shape: Sequence[int] = (-1,),
) -> list[ir.Value]:
    """Store codes of ``width`` bits together under a name, and return them as computed, in this shape; see _unpack."""
    joined = np.concatenate(codes)
    values = np.zeros(-(-joined.size // _GROUP) * _GROUP, np.uint8)
    values[: joined.size] = joined
    unpacked = _unpack(start, name, width, values.reshape(-1, 2, 2, 2), levels, unit)
    shaped = start.call("Reshape", unpacked, start.shape(shape))
    return start.split(name, shaped, [code.size for code in codes], values.size)


def _unpack(start: GraphStart, name: str, width: int, values: Array, levels: ir.Value | None, unit: int) -> ir.Value:
    """The values as computed from their packed fields: int32, times two to the ``unit``, or their levels.

    ``values`` are unsigned, ``[groups, 2, 2, 2]``.
    """
    fields = [bits for bits in _FIELDS if width & bits]
    parts: list[ir.Value] = []
    for bits, shift in zip(fields, itertools.accumulate(fields, initial=0), strict=False):
        table = _table(start, bits)
        if shift + unit:
            power = start.number(1 << (shift + unit))
            table = start.call_once(f"fields_{bits}_{shift + unit}", "Mul", table, power)
        if len(fields) == 1 and levels is not None:
            table = start.call("Gather", levels, table)
        stored = start.as_int32(f"{name}_{bits}", _pack_field(values >> shift, bits))
        parts.append(start.call("Gather", table, stored))
    total = functools.reduce(functools.partial(start.call, "Add"), parts)
    return total if len(fields) == 1 or levels is None else start.call("Gather", levels, total)


def _table(start: GraphStart, bits: int) -> ir.Value:
    """The fields of every byte, int32 ``[256, 2, ...]``, the lowest first."""
    dims = [2] * _FIELDS[bits]
    places = np.int32(1) << (bits * np.arange(8 // bits, dtype=np.int32))
    # Transpose without its attribute reverses the axes.
    divisors = start.constant(f"places_{bits}", places.reshape(dims).T.reshape(*dims, 1))
    every_byte = start.call_once("bytes", "Range", start.number(0), start.number(256), start.number(1))
    shifted = start.call_once(f"shifted_{bits}", "Div", every_byte, divisors)
    field = start.call_once(f"field_{bits}", "Mod", shifted, start.number(1 << bits))
    return start.call_once(f"fields_{bits}", "Transpose", field)


def _pack_field(values: Array, bits: int) -> Array:
    """Pack the lowest bits of the values, ``8 / bits`` a byte."""
    count = 8 // bits
    fields = (values & ((1 << bits) - 1)).reshape(-1, count).astype(np.uint16)
    packed: Array = (fields << (bits * np.arange(count, dtype=np.uint16))).sum(1).astype(np.uint8)
    return packed.reshape(len(values), *[2] * (3 - _FIELDS[bits]))

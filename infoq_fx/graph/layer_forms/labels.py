"""Reads products of tensors as contractions: a label for every axis of the operands and of the result."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from infoq_fx.graph.layer_forms.building import arguments_of

__all__ = ["Label", "Operand", "Product", "peel", "read_product"]

_ATEN = torch.ops.aten

Label = str | int


@dataclass(frozen=True)
class Operand:
    """A tensor of a product with the label of each axis; None for an axis of size 1 that is broadcast."""

    node: fx.Node
    labels: tuple[Label | None, ...]


@dataclass(frozen=True)
class Product:
    """A sum over the labels that the result lacks: ``factor * product + addend_factor * addend``."""

    operands: tuple[Operand, ...]
    output: tuple[Label, ...]
    addend: fx.Node | None = None
    factor: Any = 1
    addend_factor: Any = 1


def read_product(node: fx.Node) -> Product | None:
    """Read a node as a product; None if it is none, or has a diagonal."""
    read = _READERS.get(node.target)
    value = node.meta.get("val")
    if read is None or not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return None
    product = read(node)
    if product is None or any(_has_repeats(operand.labels) for operand in product.operands):
        return None
    return replace(product, operands=tuple(_mark_broadcast(product.operands)))


def peel(operand: Operand, others: Iterable[Operand]) -> Operand:
    """Follow an operand through transposes and expansions to the tensor that they were made from.

    An expanded axis is dropped where another operand has its label.
    """
    held = {label for other in others for label in other.labels}
    while (source := _step(operand, held)) is not None:
        operand = source
    return operand


def _step(operand: Operand, held: set[Label | None]) -> Operand | None:
    node, labels = operand.node, operand.labels
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source, *rest = arguments_of(node)
    ndim = source.meta["val"].ndim if isinstance(source.meta.get("val"), torch.Tensor) else -1
    if node.target in (_ATEN.clone.default, _ATEN.contiguous.default, _ATEN.alias.default):
        return Operand(source, labels)
    if node.target in (_ATEN.t.default, _ATEN.transpose.int, _ATEN.permute.default):
        axes = _permutation(node, rest, ndim)
        return Operand(source, tuple(label for _, label in sorted(zip(axes, labels, strict=True))))
    if node.target is _ATEN.unsqueeze.default:
        axis = rest[0] % len(labels)
        is_dropped = labels[axis] is None or labels[axis] in held
        return Operand(source, (*labels[:axis], *labels[axis + 1 :])) if is_dropped else None
    if node.target in (_ATEN.expand.default, _ATEN.repeat.default):
        return _peel_expansion(operand, source, held)
    return None


def _permutation(node: fx.Node, rest: Sequence[Any], ndim: int) -> list[int]:
    """The axis of the source for each axis of the result."""
    axes = list(range(ndim))
    if node.target is _ATEN.permute.default:
        return [axis % ndim for axis in rest[0]]
    first, second = (axis % ndim for axis in (rest if rest else (0, ndim - 1)))
    axes[first], axes[second] = axes[second], axes[first]
    return axes


def _peel_expansion(operand: Operand, source: fx.Node, held: set[Label | None]) -> Operand | None:
    labels, sizes = operand.labels, source.meta["val"].shape
    added = len(labels) - len(sizes)
    if any(label is not None and label not in held for label in labels[:added]):
        return None
    found: list[Label | None] = []
    given = arguments_of(operand.node)[1]
    for axis, (label, size) in enumerate(zip(labels[added:], sizes, strict=True)):
        factor = given[added + axis]
        is_one = is_concrete_int(size) and int(size) == 1
        is_same = factor == 1 if operand.node.target is _ATEN.repeat.default else not is_one or factor in (1, -1)
        if is_same:
            found.append(label)
        elif is_one and (label is None or label in held):
            found.append(None)
        else:
            return None
    return Operand(source, tuple(found))


def _has_repeats(labels: Sequence[Label | None]) -> bool:
    named = [label for label in labels if label is not None]
    return len(set(named)) < len(named)


def _mark_broadcast(operands: Sequence[Operand]) -> list[Operand]:
    """Set the labels of axes of size 1 that other operands have larger to None."""

    def is_one(size: Any) -> bool:
        return is_concrete_int(size) and int(size) == 1

    pairs = [list(zip(x.labels, x.node.meta["val"].shape, strict=True)) for x in operands]
    large = {label for axes in pairs for label, size in axes if not is_one(size)}
    return [
        Operand(x.node, tuple(None if is_one(size) and label in large else label for label, size in axes))
        for x, axes in zip(operands, pairs, strict=True)
    ]


def _ndim(node: Any) -> int:
    return int(node.meta["val"].ndim)


def _matmul_of(left: Any, right: Any) -> Product:
    batch = [f"batch{i}" for i in range(max(_ndim(left), _ndim(right)) - 2)]
    rows, columns = (["row"] if _ndim(left) > 1 else []), (["column"] if _ndim(right) > 1 else [])
    own = [batch[len(batch) - max(_ndim(x) - 2, 0) :] for x in (left, right)]
    ends = [*rows, "inner"], ["inner", *columns]
    operands = [Operand(x, (*first, *end)) for x, first, end in zip((left, right), own, ends, strict=True)]
    return Product(tuple(operands), (*batch, *rows, *columns))


def _read_matmul(node: fx.Node) -> Product:
    return _matmul_of(*arguments_of(node)[:2])


def _read_sum(node: fx.Node) -> Product:
    """``addmm``, ``baddbmm`` and ``addbmm``, which sums over the batch."""
    addend, left, right = arguments_of(node)[:3]
    found = _matmul_of(left, right)
    if node.target is _ATEN.addbmm.default:
        found = replace(found, output=found.output[1:])
    return replace(found, addend=addend, factor=node.kwargs.get("alpha", 1), addend_factor=node.kwargs.get("beta", 1))


def _read_linear(node: fx.Node) -> Product:
    """A linear layer, for one whose input is the parameter and whose weight is computed."""
    x, weight, *bias = arguments_of(node)
    lead = tuple(f"lead{i}" for i in range(_ndim(x) - 1))
    operands = Operand(x, (*lead, "inner")), Operand(weight, ("out", "inner"))
    return Product(operands, (*lead, "out"), addend=bias[0] if bias else None)


def _read_inner(node: fx.Node) -> Product | None:
    left, right = arguments_of(node)
    if not _ndim(left) or not _ndim(right):
        return None
    lead = [tuple(f"{side}{i}" for i in range(_ndim(x) - 1)) for side, x in (("left", left), ("right", right))]
    operands = [Operand(x, (*own, "inner")) for x, own in zip((left, right), lead, strict=True)]
    return Product(tuple(operands), (*lead[0], *lead[1]))


def _read_tensordot(node: fx.Node) -> Product:
    left, right, *dims = arguments_of(node)
    axes = [[axis % _ndim(x) for axis in given] for x, given in zip((left, right), dims, strict=True)]
    operands = []
    for side, x, summed in zip(("left", "right"), (left, right), axes, strict=True):
        labels = [f"{side}{i}" for i in range(_ndim(x))]
        for number, axis in enumerate(summed):
            labels[axis] = f"inner{number}"
        operands.append(Operand(x, tuple(labels)))
    output = tuple(label for x in operands for label in x.labels if label and not str(label).startswith("inner"))
    return Product(tuple(operands), output)


def _read_multi_dot(node: fx.Node) -> Product:
    given = arguments_of(node)[0]
    last = len(given) - 1
    operands = []
    for index, x in enumerate(given):
        is_vector = _ndim(x) == 1
        operands.append(
            Operand(x, (index + 1,) if is_vector and index == 0 else (index,) if is_vector else (index, index + 1))
        )
    ends = [0] if _ndim(given[0]) > 1 else []
    return Product(tuple(operands), (*ends, *([last + 1] if _ndim(given[-1]) > 1 else [])))


def _read_einsum(node: fx.Node) -> Product | None:
    equation, given = arguments_of(node)[:2]
    inputs, arrow, output = str(equation).replace(" ", "").partition("->")
    terms = inputs.split(",")
    lengths = [_ndim(x) - len(term.replace("...", "")) for term, x in zip(terms, given, strict=True)]
    most = max([length for term, length in zip(terms, lengths, strict=True) if "..." in term], default=0)
    named = [_label(term, length, most) for term, length in zip(terms, lengths, strict=True)]
    if arrow:
        result = _label(output, most, most)
    else:
        every = list(itertools.chain(*named))
        result = [x for x in dict.fromkeys(every) if isinstance(x, int)]
        result = [*sorted(result), *sorted(x for x in set(every) if isinstance(x, str) and every.count(x) == 1)]
    if _has_repeats(result):
        return None
    found = [Operand(x, tuple(labels)) for x, labels in zip(given, named, strict=True)]
    return Product(tuple(found), tuple(result))


def _label(term: str, length: int, most: int) -> list[Label]:
    """Letters as labels; numbers for the axes of an ellipsis, counted from its end."""
    before, dots, after = term.partition("...")
    return [*before, *(range(most - length, most) if dots else ()), *after]


_READERS: dict[Any, Callable[[fx.Node], Product | None]] = {
    _ATEN.einsum.default: _read_einsum,
    _ATEN.matmul.default: _read_matmul,
    _ATEN.mm.default: _read_matmul,
    _ATEN.bmm.default: _read_matmul,
    _ATEN.mv.default: _read_matmul,
    _ATEN.addmm.default: _read_sum,
    _ATEN.baddbmm.default: _read_sum,
    _ATEN.addbmm.default: _read_sum,
    _ATEN.linear.default: _read_linear,
    _ATEN.inner.default: _read_inner,
    _ATEN.tensordot.default: _read_tensordot,
    _ATEN.linalg_multi_dot.default: _read_multi_dot,
}

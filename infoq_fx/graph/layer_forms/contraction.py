"""Computes contractions by linear layers and grouped convolutions where an operand is a parameter, else by matmul."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from infoq_fx.graph.layer_forms.building import Place, evaluate, size_hint
from infoq_fx.graph.layer_forms.labels import Label, Operand
from infoq_fx.graph.layers import module_path, read_tensor

__all__ = ["StoredWeights", "contract"]

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class StoredWeights:
    """The parameters of a graph that were stored in another layout, each once.

    ``constant`` are the nodes that depend on parameters alone. ``nodes`` are the readers of stored weights, by what
    they were made of. ``roots`` has the path of the parameter that a stored one was made of, if it was one.
    """

    constant: set[fx.Node]
    nodes: dict[Any, fx.Node] = field(default_factory=dict)
    roots: dict[str, str] = field(default_factory=dict)

    def is_constant(self, operand: Operand) -> bool:
        """Return whether an operand depends on parameters alone."""
        return operand.node in self.constant

    def layout(self, place: Place, operand: Operand, order: Sequence[Label], shape: Sequence[int]) -> fx.Node:
        """Return a node of the parameter with its axes in an order, then reshaped; itself where nothing changes."""
        node = operand.node
        axes = [operand.labels.index(label) for label in order]
        sizes = [int(size) for size in node.meta["val"].shape]
        is_same = axes == list(range(len(sizes))) and sizes == list(shape)
        if is_same and node.op == "get_attr":
            return node
        key = _key(node), tuple(axes), tuple(shape)
        if key not in self.nodes:
            value = (
                read_tensor(place.graph_module, node) if node.op == "get_attr" else evaluate(place.graph_module, node)
            )
            value = value.permute(*axes, *(i for i in range(value.ndim) if i not in axes)).reshape(tuple(shape))
            self.nodes[key] = self._store(place, node, value.contiguous().clone())
            self.constant.add(self.nodes[key])
        return self.nodes[key]

    def _store(self, place: Place, node: fx.Node, value: Tensor) -> fx.Node:
        roots = list(dict.fromkeys(_roots(node)))
        path = f"{roots[0]}_rows" if len(roots) == 1 else f"{module_path(place.node)}.weight".removeprefix(".")
        stored = place.store(path, value)
        if len(roots) == 1:
            self.roots[str(stored.target)] = roots[0]
        return stored


def contract(place: Place, operands: Iterable[Operand], output: Sequence[Label], weights: StoredWeights) -> fx.Node:
    """Compute a contraction, two operands at a time, those first whose product is smallest.

    Args:
        place: where nodes go.
        operands: two or more, of which at most all but one depend on parameters alone.
        output: labels of the result's axes; an operand has each of them.
        weights: of the graph.
    """
    given = list(operands)
    left = [_sum_own(place, x, i, given, output, weights) for i, x in enumerate(given)]
    while len(left) > 1:
        pairs = [
            (i, j)
            for i, j in itertools.combinations(range(len(left)), 2)
            if not (weights.is_constant(left[i]) and weights.is_constant(left[j]))
        ]
        first, second = min(pairs, key=lambda pair: _size_of_product(left, pair, output))
        others = [x for i, x in enumerate(left) if i not in (first, second)]
        kept = {*output, *(label for x in others for label in x.labels)}
        left = [_multiply(place, left[first], left[second], kept, output, weights), *others]
    return _in_order(place, left[0], output).node


def _sum_own(
    place: Place,
    operand: Operand,
    index: int,
    operands: Sequence[Operand],
    output: Sequence[Label],
    weights: StoredWeights,
) -> Operand:
    """Sum over the labels that nothing else has."""
    elsewhere = {*output, *(label for i, x in enumerate(operands) if i != index for label in x.labels)}
    axes = [i for i, label in enumerate(operand.labels) if label is not None and label not in elsewhere]
    if not axes:
        return operand
    node = place.call(_ATEN.sum.dim_IntList, operand.node, axes)
    if weights.is_constant(operand):
        weights.constant.add(node)
    return Operand(node, tuple(label for i, label in enumerate(operand.labels) if i not in axes))


def _size_of_product(operands: Sequence[Operand], pair: tuple[int, int], output: Sequence[Label]) -> int:
    others = {label for i, x in enumerate(operands) if i not in pair for label in x.labels}
    sizes = {
        label: size_hint(size)
        for i in pair
        for label, size in zip(operands[i].labels, operands[i].node.meta["val"].shape, strict=True)
        if label in output or label in others
    }
    return math.prod(sizes.values())


def _multiply(
    place: Place,
    left: Operand,
    right: Operand,
    kept: set[Label | None],
    output: Sequence[Label],
    weights: StoredWeights,
) -> Operand:
    if weights.is_constant(left):
        left, right = right, left
    shared = [label for label in left.labels if label is not None and label in right.labels]
    summed = [label for label in shared if label not in kept]
    if not summed:
        return _multiply_elements(place, left, right, output)
    groups = [label for label in shared if label in kept]
    rows, columns = ([label for label in x.labels if label is not None and label not in shared] for x in (left, right))
    if not weights.is_constant(right):
        return _multiply_matrices(place, left, right, groups, rows, columns, summed)
    apply = _apply_groups if groups else _apply_linear
    return apply(place, left, right, groups, rows, columns, summed, weights)


def _multiply_elements(place: Place, left: Operand, right: Operand, output: Sequence[Label]) -> Operand:
    """A product without a sum, with axes in the order of the output where it has them."""
    named = [label for label in dict.fromkeys((*left.labels, *right.labels)) if label is not None]
    order = sorted(named, key=lambda label: output.index(label) if label in output else len(output))
    aligned = []
    for operand in (left, right):
        own = [label for label in order if label in operand.labels]
        node = _in_order(place, operand, own).node
        for axis, label in enumerate(order):
            if label not in own:
                node = place.call(_ATEN.unsqueeze.default, node, axis)
        aligned.append(node)
    return Operand(place.call(_ATEN.mul.Tensor, *aligned), tuple(order))


def _multiply_matrices(
    place: Place,
    left: Operand,
    right: Operand,
    groups: list[Label],
    rows: list[Label],
    columns: list[Label],
    summed: list[Label],
) -> Operand:
    a = _in_order(place, left, [*groups, *rows, *summed]).node
    b = _in_order(place, right, [*groups, *summed, *columns]).node
    a = place.join(a, len(groups) + len(rows), len(summed))
    a = place.join(a, len(groups), len(rows))
    b = place.join(b, len(groups) + len(summed), len(columns))
    b = place.join(b, len(groups), len(summed))
    node = place.call(_ATEN.matmul.default, a, b)
    node = place.split(node, len(groups) + 1, _sizes(place, right, columns))
    node = place.split(node, len(groups), _sizes(place, left, rows))
    return Operand(node, (*groups, *rows, *columns))


def _apply_linear(
    place: Place,
    x: Operand,
    weight: Operand,
    groups: list[Label],
    lead: list[Label],
    outs: list[Label],
    summed: list[Label],
    weights: StoredWeights,
) -> Operand:
    """A linear layer over the summed labels, for a weight that shares no other label with its input."""
    sizes = _static_sizes(weight)
    summed = [label for label in weight.labels if label in summed]
    shape = math.prod(sizes[label] for label in outs), math.prod(sizes[label] for label in summed)
    rows = weights.layout(place, weight, [*outs, *summed], shape)
    source = place.join(_in_order(place, x, [*lead, *summed]).node, len(lead), len(summed))
    node = place.call(_ATEN.linear.default, source, rows)
    return Operand(place.split(node, len(lead), [sizes[label] for label in outs]), (*lead, *outs))


def _apply_groups(
    place: Place,
    x: Operand,
    weight: Operand,
    groups: list[Label],
    lead: list[Label],
    outs: list[Label],
    summed: list[Label],
    weights: StoredWeights,
) -> Operand:
    """A grouped convolution of kernel size 1: each group, as an expert, has a matrix of its own."""
    sizes = _static_sizes(weight)
    counts = [math.prod(sizes[label] for label in part) for part in (groups, outs, summed)]
    rows = weights.layout(place, weight, [*groups, *outs, *summed], (counts[0] * counts[1], counts[2], 1))
    first, others = lead[:1], lead[1:]
    source = _in_order(place, x, [*first, *groups, *summed, *others]).node
    source = place.join(source, len(first) + len(groups) + len(summed), len(others))
    source = place.join(source, len(first), len(groups) + len(summed))
    source = source if first else place.join(source, 0, 0)
    node = place.call(_ATEN.conv1d.default, source, rows, None, [1], [0], [1], counts[0])
    node = place.split(node, 2, _sizes(place, x, others))
    node = place.split(node, 1, [sizes[label] for label in (*groups, *outs)])
    node = node if first else place.call(_ATEN.squeeze.dim, node, 0)
    return Operand(node, (*first, *groups, *outs, *others))


def _in_order(place: Place, operand: Operand, order: Sequence[Label]) -> Operand:
    """The operand without broadcast axes, its axes in an order."""
    node, labels = operand.node, list(operand.labels)
    for axis in reversed(range(len(labels))):
        if labels[axis] is None:
            node = place.call(_ATEN.squeeze.dim, node, axis)
            del labels[axis]
    return Operand(place.permute(node, [labels.index(label) for label in order]), tuple(order))


def _sizes(place: Place, operand: Operand, labels: Sequence[Label]) -> list[Any]:
    return [place.size(operand.node, operand.labels.index(label)) for label in labels]


def _static_sizes(weight: Operand) -> Mapping[Label | None, int]:
    return dict(zip(weight.labels, map(int, weight.node.meta["val"].shape), strict=True))


def _key(node: fx.Node) -> Any:
    """What a constant node computes, equal for equal subgraphs."""
    if node.op == "get_attr":
        return str(node.target)
    given: Any = (node.args, dict(node.kwargs))
    name: Any = lambda operand: str(_key(operand))  # noqa: E731
    return str(node.target), repr(fx.map_arg(given, name))


def _roots(node: fx.Node) -> list[str]:
    if node.op == "get_attr":
        return [str(node.target)]
    return [path for operand in node.all_input_nodes for path in _roots(operand)]

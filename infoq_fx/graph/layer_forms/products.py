"""Writes products with parameters as linear layers and grouped convolutions, whose weights are quantized."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx

from infoq_fx.graph.layer_forms.building import Place, constant_nodes
from infoq_fx.graph.layer_forms.contraction import StoredWeights, contract
from infoq_fx.graph.layer_forms.labels import Operand, Product, peel, read_product
from infoq_fx.graph.layers import LAYER_OPS, read_tensor, write_tensor

__all__ = ["write_products_as_layers"]

_ATEN = torch.ops.aten


def write_products_as_layers(graph_module: fx.GraphModule) -> bool:
    """Write ``einsum``, ``matmul``, ``bmm``, ``tensordot`` and their relatives in terms of few operations.

    1. one operand is a parameter of two or more dimensions, perhaps transposed, expanded or computed from others:
       a linear layer, or a grouped convolution where both operands have an axis that the result keeps (experts).
       The parameter is stored as ``[outputs, inputs]`` under its own path.
    2. ``bilinear``: a linear layer over the products of both inputs.
    3. an ``einsum`` of two or more activations: ``matmul``.

    Left alone: products that are linear layers already, those with a vector, and diagonals.
    """
    weights = StoredWeights(constant_nodes(graph_module))
    changed = False
    for node in list(graph_module.graph.nodes):
        place = Place(graph_module, node)
        result = _write_bilinear(place, weights) if node.target is _ATEN.bilinear.default else _write(place, weights)
        if result is not None:
            node.replace_all_uses_with(result)
            graph_module.graph.erase_node(node)
            changed = True
    if changed:
        graph_module.graph.eliminate_dead_code()
        _restore_paths(graph_module, weights)
    return changed


def _write(place: Place, weights: StoredWeights) -> fx.Node | None:
    node = place.node
    product = read_product(node)
    if product is None or len(product.operands) < 2 or _is_layer(node, weights):
        return None
    operands = list(product.operands)
    for index in sorted(range(len(operands)), key=lambda i: operands[i].node not in weights.constant):
        operands[index] = peel(operands[index], [x for i, x in enumerate(operands) if i != index])
    constant = [weights.is_constant(operand) for operand in operands]
    matrices = [c and sum(label is not None for label in x.labels) > 1 for c, x in zip(constant, operands, strict=True)]
    is_einsum = node.target is _ATEN.einsum.default
    if all(constant) or not (any(matrices) or (is_einsum and not any(constant))):
        return None
    found = contract(place, operands, product.output, weights)
    return _add(place, product, found)


def _add(place: Place, product: Product, found: fx.Node) -> fx.Node:
    if product.factor != 1:
        found = place.call(_ATEN.mul.Tensor, found, product.factor)
    addend: Any = product.addend
    if addend is None or product.addend_factor == 0:
        return found
    is_bias = found.target is _ATEN.linear.default and len(found.args) == 2 and addend.op == "get_attr"
    if is_bias and product.addend_factor == 1 and addend.meta["val"].shape == found.meta["val"].shape[-1:]:
        found.args = (*found.args, addend)
        return found
    if product.addend_factor != 1:
        addend = place.call(_ATEN.mul.Tensor, addend, product.addend_factor)
    return place.call(_ATEN.add.Tensor, found, addend)


def _is_layer(node: fx.Node, weights: StoredWeights) -> bool:
    """Whether a node is a layer as it is: its weight is a matrix of parameters, and its input is not."""
    op = LAYER_OPS.get(node.target)
    if op is None:
        return False
    source, weight = node.args[op.source], node.args[op.weight]
    is_linear = node.target is _ATEN.linear.default and weight in weights.constant
    is_matrix = isinstance(weight, fx.Node) and weight.op == "get_attr" and weight.meta["val"].ndim == 2
    return (is_linear or is_matrix) and source not in weights.constant


def _write_bilinear(place: Place, weights: StoredWeights) -> fx.Node | None:
    left, right, weight, *rest = place.node.args
    if weight not in weights.constant:
        return None
    assert isinstance(weight, fx.Node)
    outs, *ins = (int(size) for size in weight.meta["val"].shape)
    pairs = place.call(
        _ATEN.mul.Tensor,
        place.call(_ATEN.unsqueeze.default, left, -1),
        place.call(_ATEN.unsqueeze.default, right, -2),
    )
    rows = weights.layout(place, Operand(weight, (0, 1, 2)), (0, 1, 2), (outs, ins[0] * ins[1]))
    return place.call(_ATEN.linear.default, place.call(_ATEN.flatten.using_ints, pairs, -2, -1), rows, *rest)


def _restore_paths(graph_module: fx.GraphModule, weights: StoredWeights) -> None:
    """Move stored weights to the paths of the parameters that they were made of, where nothing reads those."""
    nodes = [node for node in graph_module.graph.nodes if node.op == "get_attr"]
    read = {str(node.target) for node in nodes}
    counts = Counter(root for path, root in weights.roots.items() if path in read)
    for path, root in weights.roots.items():
        if path not in read or root in read or counts[root] > 1:
            continue
        value = read_tensor(graph_module, path)
        write_tensor(graph_module, root, value)
        owner, _, name = path.rpartition(".")
        delattr(graph_module.get_submodule(owner), name)
        for node in nodes:
            if node.target == path:
                node.target = root

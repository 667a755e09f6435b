"""Folds weights and biases that are computed from parameters alone."""

from __future__ import annotations

import torch
from torch import fx

from infoq_fx.graph.layers import LAYER_OPS, free_path, module_path, write_tensor

__all__ = ["fold_constants"]


def fold_constants(graph_module: fx.GraphModule) -> bool:
    """Replace computed weights and biases by their values.

    1. the weight or bias of a layer is computed from parameters only (weight norm, a slice of a packed
       projection, a transpose): the subgraph is evaluated and becomes a buffer under the layer's path.

    Left alone: operands that depend on an input, and operands that are parameters already.
    """
    constant = _constant_nodes(graph_module)
    changed = False
    for node in list(graph_module.graph.nodes):
        op = LAYER_OPS.get(node.target)
        if op is None:
            continue
        for operand, kind in ((node.args[op.weight], "weight"), (op.bias_of(node), "bias")):
            if isinstance(operand, fx.Node) and operand in constant and operand.op != "get_attr":
                _replace(
                    graph_module, operand, free_path(graph_module, f"{module_path(node)}.{kind}".removeprefix("."))
                )
                changed = True
    return changed


def _constant_nodes(graph_module: fx.GraphModule) -> set[fx.Node]:
    constant: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        is_computed = node.op == "call_function" and node.all_input_nodes
        if node.op == "get_attr" or (is_computed and constant.issuperset(node.all_input_nodes)):
            constant.add(node)
    return constant


def _replace(graph_module: fx.GraphModule, operand: fx.Node, name: str) -> None:
    needed = {operand}
    for node in reversed(list(graph_module.graph.nodes)):
        if node in needed:
            needed.update(node.all_input_nodes)
    ordered = [node for node in graph_module.graph.nodes if node in needed]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in ordered:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[operand])
    with torch.no_grad():
        value = fx.GraphModule(graph_module, graph)()
    write_tensor(graph_module, name, value.detach().clone())
    with graph_module.graph.inserting_before(operand):
        folded = graph_module.graph.get_attr(name)
    folded.meta = dict(operand.meta)
    operand.replace_all_uses_with(folded)

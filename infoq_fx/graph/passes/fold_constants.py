"""Folds weights and biases that are computed from parameters alone."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from infoq_fx.graph.layer_forms.building import constant_nodes, evaluate
from infoq_fx.graph.layers import LAYER_OPS, RECURRENT_OPS, free_path, module_path, write_tensor

__all__ = ["drop_unread_tensors", "fold_constants"]


def fold_constants(graph_module: fx.GraphModule) -> bool:
    """Replace computed weights and biases by their values.

    1. the weight or bias of a layer is computed from parameters only (weight norm, a slice of a packed
       projection, a transpose): the subgraph is evaluated and becomes a buffer under the layer's path.

    Left alone: operands that depend on an input, and operands that are parameters already.
    """
    constant = constant_nodes(graph_module)
    changed = False
    for node in list(graph_module.graph.nodes):
        for operand, kind in list(_parameters_of(node)):
            if operand in constant and operand.op != "get_attr":
                path = free_path(graph_module, f"{module_path(node)}.{kind}".removeprefix("."))
                _replace(graph_module, operand, path)
                changed = True
    return changed


def drop_unread_tensors(graph_module: fx.GraphModule) -> bool:
    """Remove parameters and buffers that the graph does not read, as those that others were computed from."""
    read = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    held = [*graph_module.named_parameters(remove_duplicate=False), *graph_module.named_buffers(remove_duplicate=False)]
    unread = [path for path, _ in held if path not in read]
    for path in unread:
        owner, _, name = path.rpartition(".")
        delattr(graph_module.get_submodule(owner), name)
    return bool(unread)


def _parameters_of(node: fx.Node) -> Iterator[tuple[fx.Node, str]]:
    op = LAYER_OPS.get(node.target)
    operands = [] if op is None else [(node.args[op.weight], "weight"), (op.bias_of(node), "bias")]
    if node.target in RECURRENT_OPS:
        operands = [(operand, f"weight_{index}") for index, operand in enumerate(node.args[2])]  # type: ignore[arg-type]
    for operand, kind in operands:
        if isinstance(operand, fx.Node):
            yield operand, kind


def _replace(graph_module: fx.GraphModule, operand: fx.Node, name: str) -> None:
    write_tensor(graph_module, name, evaluate(graph_module, operand))
    with graph_module.graph.inserting_before(operand):
        folded = graph_module.graph.get_attr(name)
    folded.meta = dict(operand.meta)
    operand.replace_all_uses_with(folded)

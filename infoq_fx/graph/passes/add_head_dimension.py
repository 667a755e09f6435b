"""Adds the head dimension that ONNX export requires to attention over three dimensions."""

from __future__ import annotations

import torch
from torch import fx

from infoq_fx.graph.layers import ATTENTION

__all__ = ["add_head_dimension"]


def add_head_dimension(graph_module: fx.GraphModule) -> bool:
    """Rewrite attention over ``[samples, tokens, features]`` as attention with one head.

    1. query, key and value (and a mask) of three dimensions: each gets a second dimension of size 1, which is
       removed from the result.

    Left alone: attention over four dimensions.
    """
    changed = False
    for node in list(graph_module.graph.nodes):
        if node.target is ATTENTION and node.meta["val"].ndim == 3:
            _lift(graph_module, node)
            changed = True
    return changed


def _lift(graph_module: fx.GraphModule, node: fx.Node) -> None:
    graph, fake = graph_module.graph, node.meta["val"]
    with graph.inserting_before(node):
        for source in list(node.all_input_nodes):
            if source.meta["val"].ndim == 3:
                lifted = graph.call_function(torch.ops.aten.unsqueeze.default, (source, 1))
                lifted.meta = {**source.meta, "val": source.meta["val"].unsqueeze(1)}
                node.replace_input_with(source, lifted)
    with graph.inserting_after(node):
        result = graph.call_function(torch.ops.aten.squeeze.dim, (node, 1))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
    node.meta["val"] = fake.unsqueeze(1)

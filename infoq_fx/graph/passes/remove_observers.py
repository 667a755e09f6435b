"""Removes the observers from a prepared graph."""

from __future__ import annotations

from torch import fx

from infoq_fx.graph.layers import called_modules
from infoq_fx.quantization.quantizers import Observe

__all__ = ["remove_observers"]


def remove_observers(graph_module: fx.GraphModule) -> bool:
    """Remove every observer; its readers get its input."""
    found = [(node, module) for node, module in called_modules(graph_module) if isinstance(module, Observe)]
    for node, _ in found:
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph_module.graph.erase_node(node)
    return bool(found)

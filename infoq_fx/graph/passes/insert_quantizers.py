"""Inserts a configurable quantizer at every site of a plan."""

from __future__ import annotations

from torch import fx

from infoq_fx.graph.layers import free_path
from infoq_fx.graph.operands import Placement
from infoq_fx.graph.sites import SitePlan
from infoq_fx.quantization.quantizers import Quantizer

__all__ = ["insert_quantizers"]


def insert_quantizers(graph_module: fx.GraphModule, plan: SitePlan) -> bool:
    """Insert one :class:`Quantizer` per placement, between its node and the users that it names.

    1. a weight: all quantized layers that read it read one quantizer.
    2. an activation: the layers and fused residual additions that read it.

    Left alone: users that the plan does not name keep the float value.
    """
    for placement in plan.placements:
        _insert(graph_module, placement)
    return bool(plan.placements)


def _insert(graph_module: fx.GraphModule, placement: Placement) -> None:
    target = free_path(graph_module, f"quantizers.{placement.site.name}.quantizer")
    graph_module.add_submodule(target, Quantizer(placement.site))
    with graph_module.graph.inserting_after(placement.node):
        quantized = graph_module.graph.call_module(target, (placement.node,))
    quantized.meta = {key: placement.node.meta[key] for key in ("val",) if key in placement.node.meta}
    for user in placement.users:
        user.replace_input_with(placement.node, quantized)

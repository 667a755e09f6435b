"""The prepared model: a graph with configurable quantize and observe nodes, and what is known of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from infoq_fx.quantization.quantizers import Observe, Quantizer
from infoq_fx.types import Inventory, RoundedWeight

__all__ = ["PreparedModel"]


@dataclass(frozen=True)
class PreparedModel:
    """A captured model with quantizers at every site and observers at every place that has a name.

    ``example_inputs`` are two samples by input name. ``classifier`` is the weight site of the layer that makes
    the logits, None where there is none. ``batch_size`` is None unless the graph is fixed to one. ``origin`` is the
    float model behind a model that was changed to be quantized better, by the steps ``recovered_by``. ``rounded`` are
    weights by site and bit-width that measurements take in place of those rounded to nearest; conversion does not.
    """

    graph_module: fx.GraphModule
    inventory: Inventory
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    example_inputs: Mapping[str, Tensor]
    batch_size: int | None = None
    classifier: str | None = None
    origin: PreparedModel | None = None
    recovered_by: tuple[str, ...] = ()
    rounded: Mapping[tuple[str, int], RoundedWeight] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return next(iter(self.example_inputs.values())).device

    def quantizer_nodes(self) -> Iterator[tuple[fx.Node, Quantizer]]:
        """Every quantize node with its module, in graph order."""
        for node in self.graph_module.graph.nodes:
            if node.op == "call_module":
                module = self.graph_module.get_submodule(str(node.target))
                if isinstance(module, Quantizer):
                    yield node, module

    def observer_nodes(self) -> dict[str, fx.Node]:
        """The observe node behind every name that an observer may have."""
        named = {}
        for node in self.graph_module.graph.nodes:
            if node.op == "call_module":
                module = self.graph_module.get_submodule(str(node.target))
                if isinstance(module, Observe):
                    named.update(dict.fromkeys(module.names, node))
        return named

    def __str__(self) -> str:
        sites = self.inventory.sites
        weights = [site for site in sites if site.kind == "weight"]
        elements = sum(site.numel for site in weights)
        searched = sum(site.is_searched and site.kind == "activation" for site in sites)
        return (
            f"PreparedModel: {len(weights)} weight sites with {elements:,} weights, {searched} activation sites, "
            f"{len(self.observer_nodes())} observer names"
        )

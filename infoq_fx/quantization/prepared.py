"""The prepared model: a graph with configurable quantizer and observer nodes, and its metadata."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from infoq_fx.core.readings import LossFunction, Reading
from infoq_fx.errors import OptionError
from infoq_fx.quantization.call_forms import CallForm
from infoq_fx.quantization.quantizers import Observe, Quantizer
from infoq_fx.types import Inventory, RoundedWeight

__all__ = ["PreparedModel", "check_prepared"]


@dataclass(frozen=True)
class PreparedModel:
    """A captured model with a quantizer at every site and an observer at every named tensor.

    ``example_inputs`` are two samples by input name. ``classifier`` is the weight site of the layer that computes
    the logits, None if there is none. ``batch_size`` is None unless the graph is fixed to one. ``form`` tells how the
    model itself is called and answers, where the graph cannot. ``free_axes`` are axes besides the first, by input name,
    that may have any size. ``origin`` is the prepared model before recovery changed its parameters, by the steps
    ``recovered_by``; ``recovery_tried`` has those that did not help too. ``rounded`` are weights by site and bit-width
    that measurements use in place of those rounded to nearest; conversion does not. ``readings`` say what each output
    means, in the order of ``output_names``; ``loss_function``, if given, compares the outputs in their place.
    ``output_notes`` say the same to people, and how it was found.
    """

    graph_module: fx.GraphModule
    inventory: Inventory
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    example_inputs: Mapping[str, Tensor]
    batch_size: int | None = None
    classifier: str | None = None
    form: CallForm = field(default_factory=CallForm)
    free_axes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    origin: PreparedModel | None = None
    recovered_by: tuple[str, ...] = ()
    recovery_tried: tuple[str, ...] = ()
    rounded: Mapping[tuple[str, int], RoundedWeight] = field(default_factory=dict)
    readings: tuple[Reading, ...] = ()
    loss_function: LossFunction | None = None
    output_notes: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """The device that the model runs on."""
        return next(iter(self.example_inputs.values())).device

    def quantizer_nodes(self) -> Iterator[tuple[fx.Node, Quantizer]]:
        """Yield every quantizer node with its module, in graph order."""
        for node in self.graph_module.graph.nodes:
            module = self.quantizer_at(node)
            if module is not None:
                yield node, module

    def quantizer_at(self, node: object) -> Quantizer | None:
        """Return the module of a quantizer node, None for any other node or argument of one."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        module = self.graph_module.get_submodule(str(node.target))
        return module if isinstance(module, Quantizer) else None

    def observer_nodes(self) -> dict[str, fx.Node]:
        """Return the observer node of every name that an :class:`~infoq_fx.types.Observer` may have."""
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


def check_prepared(prepared: Any, call: str) -> None:
    """Check that an argument of ``call`` is a prepared model.

    Raises:
        OptionError: it is something else.
    """
    if not isinstance(prepared, PreparedModel):
        raise OptionError(f"{call}() got a {type(prepared).__name__}; give what prepare() or recover() returned")

"""The result: a graph module that remembers its allocation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from infoq_fx.allocation.summary import Summary, summarize_allocation
from infoq_fx.errors import OptionError
from infoq_fx.graph.passes.annotate_bits import annotate_bits, read_bits
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.table import SensitivityTable
from infoq_fx.types import Allocation, Inventory

__all__ = ["Provenance", "QuantizedModule", "allocation_of", "provenance_of", "summarize", "wrap_quantized"]

_META_KEY = "infoq"


@dataclass(frozen=True)
class Provenance:
    """What a quantized module remembers of its making; nothing of it is ever changed, so that copies share it.

    Two example samples by input name serve the export. ``batch_size`` is None unless the graph is fixed to one.
    ``inventory`` is what it was prepared as, ``table`` the scores that the allocation was found with, where
    :func:`infoq_fx.quantize` made it. ``prepared`` is what it was converted from, in this process; a file does not
    hold it.
    """

    allocation: Allocation
    example_inputs: Mapping[str, Tensor]
    output_names: tuple[str, ...]
    batch_size: int | None = None
    inventory: Inventory | None = None
    table: SensitivityTable | None = field(default=None, repr=False)
    prepared: PreparedModel | None = field(default=None, compare=False, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Provenance:
        return self

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        kept = (self.allocation, self.example_inputs, self.output_names, self.batch_size, self.inventory, self.table)
        return Provenance, kept


class QuantizedModule(fx.GraphModule):
    """A quantized graph. Its nodes carry their bits in ``node.meta["infoq"]``, also after pickle and deepcopy."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # fx pickles a graph as its code and drops all meta.
        build, arguments = super().__reduce__()
        return _rebuild, (build, arguments, self.meta.get(_META_KEY))

    def _repr_html_(self) -> str:
        return summarize(self).html


def wrap_quantized(graph_module: fx.GraphModule, provenance: Provenance) -> QuantizedModule:
    """Attach its provenance to a converted graph and annotate its nodes."""
    module = QuantizedModule(graph_module, graph_module.graph, class_name="QuantizedModule")
    annotate_bits(module)
    module.meta[_META_KEY] = provenance
    return module


def allocation_of(quantized: nn.Module | ExportedProgram) -> Allocation:
    """The allocation behind a quantized module.

    Args:
        quantized: what :func:`infoq_fx.quantize` or :func:`infoq_fx.convert` returned, a copy of it, or what
            ``torch.export`` made of it; after an export only the bit-widths are known.

    Raises:
        OptionError: the model holds no quantized site.
    """
    provenance = provenance_of(quantized)
    if provenance is not None:
        return provenance.allocation
    graph = getattr(quantized, "graph", None)
    bits = read_bits(graph) if isinstance(graph, fx.Graph) else {}
    if not bits:
        raise OptionError(f"{type(quantized).__name__} holds no quantized site; pass what quantize() returned")
    return Allocation(bits=bits)


def summarize(source: Allocation | nn.Module | ExportedProgram, inventory: Inventory | None = None) -> Summary:
    """A table of an allocation: every layer's bits, score and share of the size, the cost, and the uniform bit-width.

    Args:
        source: a quantized module, or an allocation, which needs ``inventory``.
        inventory: what the prepared model holds, ``table.inventory``.

    Returns:
        Text; a notebook shows it as a table. Without an inventory (a module read back from ``torch.export``) the
        allocation alone.

    Raises:
        OptionError: the model holds no quantized site.
    """
    allocation = source if isinstance(source, Allocation) else allocation_of(source)
    provenance = None if isinstance(source, Allocation) else provenance_of(source)
    known = inventory or (None if provenance is None else provenance.inventory)
    if known is None:
        return Summary(str(allocation), allocation._repr_html_())
    return summarize_allocation(allocation, known)


def provenance_of(quantized: nn.Module | ExportedProgram) -> Provenance | None:
    """What the module remembers; None after ``torch.export`` or for a model that is not quantized."""
    meta = getattr(quantized, "meta", None)
    found = meta.get(_META_KEY) if isinstance(meta, dict) else None
    return found if isinstance(found, Provenance) else None


def _rebuild(
    build: Callable[..., fx.GraphModule], arguments: tuple[Any, ...], provenance: Provenance
) -> QuantizedModule:
    return wrap_quantized(build(*arguments), provenance)

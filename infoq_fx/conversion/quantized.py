"""The quantized module, a graph module with a record of its allocation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from infoq_fx.allocation.summary import FileSize, Summary, summarize_allocation
from infoq_fx.conversion.activation_summary import summarize_activations
from infoq_fx.core.readings import Ignored, LossFunction, Reading
from infoq_fx.errors import OptionError
from infoq_fx.graph.layers import read_tensor
from infoq_fx.graph.passes.annotate_bits import annotate_bits, read_bits
from infoq_fx.quantization.activation_ranges import rank_activations
from infoq_fx.quantization.call_forms import CallForm
from infoq_fx.quantization.codebooks import read_codebook
from infoq_fx.quantization.custom_ops import dequantize_op
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.table import SensitivityTable
from infoq_fx.types import CODEBOOK_BITS, Allocation, Inventory

__all__ = [
    "Provenance",
    "QuantizedModule",
    "allocation_of",
    "find_wide_weights",
    "plain_graph",
    "provenance_of",
    "summarize",
    "wrap_quantized",
]

_META_KEY = "infoq"


@dataclass(frozen=True)
class Provenance:
    """The record of how a quantized module was made; it is immutable, so that copies of the module share it.

    ``example_inputs`` are two samples by input name, for export. ``batch_size`` is None unless the graph is fixed to
    one. ``inventory`` is that of the prepared model, ``table`` the scores that the allocation was found with, if
    :func:`infoq_fx.quantize` made it. ``prepared`` is the model that it was converted from, in this process; it is not
    saved to files. ``form`` tells how the float model is called and answers: the module does the same.
    ``free_axes`` are axes besides the first, by input name, that may have any size.
    """

    allocation: Allocation
    example_inputs: Mapping[str, Tensor]
    output_names: tuple[str, ...]
    batch_size: int | None = None
    inventory: Inventory | None = None
    table: SensitivityTable | None = field(default=None, repr=False)
    prepared: PreparedModel | None = field(default=None, compare=False, repr=False)
    form: CallForm = field(default_factory=CallForm, repr=False)
    free_axes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    readings: tuple[Reading, ...] = ()
    loss_function: LossFunction | None = field(default=None, compare=False, repr=False)
    output_notes: tuple[str, ...] = ()

    @property
    def read_outputs(self) -> tuple[int, ...]:
        """Indices of the outputs that are read."""
        return tuple(i for i, reading in enumerate(self.readings) if not isinstance(reading, Ignored))

    def __deepcopy__(self, memo: dict[int, Any]) -> Provenance:
        return self

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        kept = (self.allocation, self.example_inputs, self.output_names, self.batch_size, self.inventory, self.table)
        return Provenance, (*kept, None, self.form, dict(self.free_axes), self.readings, None, self.output_notes)


class QuantizedModule(fx.GraphModule):
    """A quantized graph module; ``node.meta["infoq"]`` has each node's bits, also after pickle and deepcopy.

    It takes and returns what the float model does: its structure of outputs, with None and constants, and its dtypes.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module on inputs ``[samples, ...]``, by position or by name."""
        provenance = provenance_of(self)
        if provenance is None or provenance.form.is_plain:
            return super().__call__(*args, **kwargs)
        form, given = provenance.form, (*args, *kwargs.values())
        taken = {name: form.take(x) for name, x in kwargs.items()}
        outputs = super().__call__(*(form.take(x) for x in args), **taken)
        has_floats = any(isinstance(x, Tensor) and x.dtype == torch.float32 for x in given)
        return form.give(outputs, narrow=not (has_floats and form.input_dtypes))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # fx pickles a graph as its code and drops all meta.
        build, arguments = super().__reduce__()
        return _rebuild, (build, arguments, self.meta.get(_META_KEY))

    def _repr_html_(self) -> str:
        return summarize(self).html


def wrap_quantized(graph_module: fx.GraphModule, provenance: Provenance) -> QuantizedModule:
    """Turn a converted graph into a quantized module: attach its provenance and annotate its nodes."""
    module = QuantizedModule(graph_module, graph_module.graph, class_name="QuantizedModule")
    annotate_bits(module)
    module.meta[_META_KEY] = provenance
    return module


def plain_graph(quantized: nn.Module) -> nn.Module:
    """Return a module that shares the graph and tensors of a quantized one, and gives tensors alone, as the graph does.

    A module whose outputs have that form already is returned itself.
    """
    provenance = provenance_of(quantized)
    if provenance is None or provenance.form.is_plain or not isinstance(quantized, fx.GraphModule):
        return quantized
    return fx.GraphModule(quantized, quantized.graph, class_name="QuantizedModule")


def allocation_of(quantized: nn.Module | ExportedProgram) -> Allocation:
    """Return the allocation of a quantized module.

    Args:
        quantized: what :func:`infoq_fx.quantize` or :func:`infoq_fx.convert` returned, a copy of it, or what
            ``torch.export`` made of it; after ``torch.export`` only the bit-widths are known.

    Raises:
        OptionError: the model has no quantized site.
    """
    provenance = provenance_of(quantized)
    if provenance is not None:
        return provenance.allocation
    graph = getattr(quantized, "graph", None)
    bits = read_bits(graph) if isinstance(graph, fx.Graph) else {}
    if not bits:
        raise OptionError(f"{type(quantized).__name__} holds no quantized site; pass what quantize() returned")
    return Allocation(bits=bits)


def summarize(
    source: Allocation | nn.Module | ExportedProgram | PreparedModel,
    inventory: Inventory | None = None,
    *,
    file: FileSize | None = None,
) -> Summary:
    """Return a table of an allocation: bits, score and share of the size by layer, the cost, the uniform bit-width.

    Of a prepared model, it is a table of its activations, see :func:`infoq_fx.rank_activations`.

    Args:
        source: a quantized module, an allocation, which needs ``inventory``, or a prepared model.
        inventory: of the prepared model: ``table.inventory``.
        file: ``infoq_fx.measure_file("model.onnx")``, to say how many bytes of the file are counted and how many are
            its graph.

    Returns:
        Text; a notebook shows it as a table. Without an inventory (a module read back from ``torch.export``) it is the
        allocation alone.

    Raises:
        OptionError: the model has no quantized site.
    """
    if isinstance(source, PreparedModel):
        return summarize_activations(rank_activations(source))
    allocation = source if isinstance(source, Allocation) else allocation_of(source)
    provenance = None if isinstance(source, Allocation) else provenance_of(source)
    known = inventory or (None if provenance is None else provenance.inventory)
    if known is None:
        return Summary(str(allocation), allocation._repr_html_())
    return summarize_allocation(allocation, known, () if provenance is None else provenance.output_notes, file)


def find_wide_weights(quantized: nn.Module) -> list[str]:
    """Return the sites of the weights whose integers are not all within their bit-width.

    They are levels of a codebook, or negatives of them in channels with a negative scale.
    """
    if not isinstance(quantized, fx.GraphModule):
        return []
    found = []
    for node in quantized.graph.nodes:
        if node.target is dequantize_op and node.args[3] <= CODEBOOK_BITS:
            integers, scale = (read_tensor(quantized, operand) for operand in node.args[:2])
            is_wide = bool((scale < 0).any()) or read_codebook(integers, node.args[3]) is not None
            found += [str(node.args[4])] if is_wide else []
    return found


def provenance_of(quantized: nn.Module | ExportedProgram) -> Provenance | None:
    """Return the provenance of a module; None after ``torch.export`` or for a model that is not quantized."""
    meta = getattr(quantized, "meta", None)
    found = meta.get(_META_KEY) if isinstance(meta, dict) else None
    return found if isinstance(found, Provenance) else None


def _rebuild(
    build: Callable[..., fx.GraphModule], arguments: tuple[Any, ...], provenance: Provenance
) -> QuantizedModule:
    return wrap_quantized(build(*arguments), provenance)

"""Converts a prepared model into a quantized module at the bit-widths of an allocation."""

from __future__ import annotations

import copy
import dataclasses

from infoq_fx.conversion.quantized import Provenance, QuantizedModule, wrap_quantized
from infoq_fx.errors import OptionError
from infoq_fx.graph.passes.convert_quantizers import convert_quantizers
from infoq_fx.graph.passes.pass_manager import bind_options, run_passes
from infoq_fx.graph.passes.quantize_biases import quantize_biases
from infoq_fx.graph.passes.remove_observers import remove_observers
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.table import SensitivityTable
from infoq_fx.types import Allocation

__all__ = ["check_allocation", "convert_prepared"]


def convert_prepared(
    prepared: PreparedModel, allocation: Allocation, table: SensitivityTable | None
) -> QuantizedModule:
    """Convert a prepared model; see :func:`infoq_fx.convert`. ``table`` holds the scores behind the allocation."""
    check_allocation(prepared, allocation)
    allocation = dataclasses.replace(allocation, recovered_by=prepared.recovered_by)
    graph_module = copy.deepcopy(prepared.graph_module)
    passes = [remove_observers, bind_options(convert_quantizers, bits=allocation.bits), quantize_biases]
    provenance = Provenance(
        allocation,
        prepared.example_inputs,
        prepared.output_names,
        batch_size=prepared.batch_size,
        inventory=prepared.inventory,
        table=table,
        prepared=prepared.origin or prepared,
    )
    return wrap_quantized(run_passes(graph_module, passes), provenance)


def check_allocation(prepared: PreparedModel, allocation: Allocation) -> None:
    """Check that an allocation gives every site a bit-width that it was calibrated for.

    Raises:
        OptionError: it is not an allocation; or a site has no bit-width, or one that it was not calibrated for.
    """
    if not isinstance(allocation, Allocation):
        raise OptionError(
            f"the allocation is a {type(allocation).__name__}; give what allocate() or refine() returned, or "
            "Allocation(bits={site: bits})"
        )
    for _, quantizer in prepared.quantizer_nodes():
        name, known = quantizer.site.name, quantizer.calibrated_bits
        if allocation.bits.get(name) not in known:
            found = allocation.bits.get(name, "no bit-width")
            raise OptionError(
                f"the allocation gives site {name!r} {found}; take one that it was calibrated for, of {known}"
            )

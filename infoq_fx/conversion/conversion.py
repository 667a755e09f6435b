"""Converts a prepared model into a quantized module at the bit-widths of an allocation."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterable

from infoq_fx.allocation.cost import limits_bitops
from infoq_fx.conversion.quantized import Provenance, QuantizedModule, wrap_quantized
from infoq_fx.errors import OptionError
from infoq_fx.graph.passes.convert_quantizers import convert_quantizers
from infoq_fx.graph.passes.pass_manager import bind_options, run_passes
from infoq_fx.graph.passes.quantize_biases import quantize_biases
from infoq_fx.graph.passes.remove_observers import remove_observers
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.table import SensitivityTable
from infoq_fx.types import BASELINE_BITS, CODEBOOK_BITS, Allocation

__all__ = ["check_allocation", "convert_prepared", "warn_of_codebooks", "warn_of_other_recovery"]

# Recovery steps that leave the rounding of weights as it is.
_NO_ROUNDING = {"range_equalization", "bias_correction", "output_tuning"}


def convert_prepared(
    prepared: PreparedModel, allocation: Allocation, table: SensitivityTable | None
) -> QuantizedModule:
    """Convert a prepared model; see :func:`infoq_fx.convert`. ``table`` holds the scores behind the allocation."""
    check_allocation(prepared, allocation)
    allocation = dataclasses.replace(allocation, recovered_by=prepared.recovered_by)
    graph_module = copy.deepcopy(prepared.graph_module)
    bits = prepared.inventory.complete_floats(allocation.bits)
    passes = [remove_observers, bind_options(convert_quantizers, bits=bits), quantize_biases]
    provenance = Provenance(
        allocation,
        prepared.example_inputs,
        prepared.output_names,
        batch_size=prepared.batch_size,
        inventory=prepared.inventory,
        table=table,
        prepared=prepared.origin or prepared,
        readings=prepared.readings,
        loss_function=prepared.loss_function,
        output_notes=prepared.output_notes,
        form=prepared.form,
        free_axes=prepared.free_axes,
    )
    return wrap_quantized(run_passes(graph_module, passes), provenance)


def check_allocation(prepared: PreparedModel, allocation: Allocation) -> None:
    """Check that an allocation gives every site a bit-width that it was calibrated for.

    Raises:
        OptionError: it is not an allocation; or a site has no bit-width, or one that it was not calibrated for, or tied
            sites have different ones.
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
    for tie in prepared.inventory.ties:
        given = {name: allocation.bits[name] for name in tie}
        if len(set(given.values())) > 1:
            raise OptionError(f"the allocation gives tied sites {given} bits; give them one, or prepare without tie")


def warn_of_codebooks(prepared: PreparedModel, allocation: Allocation, *, stacklevel: int) -> None:
    """Warn if an allocation was found for BitOps and weights have codebooks, for which BitOps say nothing."""
    weights = [site for site in prepared.inventory.sites if site.levels == "codebook"]
    if limits_bitops(allocation.budget) and any(allocation.bits[site.name] <= CODEBOOK_BITS for site in weights):
        warnings.warn(
            "the budget of this allocation limits BitOps, and weights have codebooks of levels, which hardware that "
            "multiplies integers of few bits cannot take: prepare with levels='mirrored', and score again",
            UserWarning,
            stacklevel=stacklevel,
        )


def warn_of_other_recovery(allocation: Allocation, tried: Iterable[str], *, stacklevel: int) -> None:
    """Warn if the scores behind an allocation are for weights rounded by recovery, and no such step was ``tried``.

    Such scores give the bits to other layers than weights rounded to nearest need: SqueezeNet at 4 bits has a top-1 of
    54.4 with them, and of 64.9 with scores for rounding to nearest.
    """
    if allocation.scored_for in (None, "none") or any(step not in _NO_ROUNDING for step in tried):
        return
    if all(bits == BASELINE_BITS for bits in allocation.bits.values()):
        return
    warnings.warn(
        f"the scores behind this allocation are for weights rounded by {allocation.scored_for!r}, and these weights "
        "are rounded to nearest: call recover(prepared, allocation, data) and convert its result, or score and refine "
        "with recovery='none'",
        UserWarning,
        stacklevel=stacklevel,
    )

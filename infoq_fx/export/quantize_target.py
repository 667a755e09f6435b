"""Quantizes to a budget or an existing allocation, for the FX pass and the Dynamo backend."""

from __future__ import annotations

import dataclasses
import glob
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from infoq_fx.allocation.cost import limits_bitops
from infoq_fx.api import convert, prepare, quantize, recover
from infoq_fx.conversion.quantized import QuantizedModule
from infoq_fx.core.data import read_data
from infoq_fx.errors import OptionError, UnsupportedModelError, unknown_name_error
from infoq_fx.graph.model_inputs import find_arguments
from infoq_fx.quantization.codebooks import Levels, choose_levels
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.types import MAX_BITS, Allocation, Budget

__all__ = ["check_options", "quantize_target", "shorten_names"]


# Options that still apply when an allocation is given.
_ALLOCATION_OPTIONS = (
    "calibration_data",
    "example_inputs",
    "recovery",
    "seed",
    "device",
    "levels",
    "cache_dir",
    "progress",
)


_FIXED_OUTPUT = ".output"  # part of the names of sites with fixed bits


def check_options(face: str, target: Any, options: Mapping[str, Any]) -> None:
    """Check the arguments of ``face``, the public function or class that the messages name.

    Raises:
        OptionError: the target is of another type, or an option is unknown.
    """
    if isinstance(target, bool) or not isinstance(target, int | float | Budget | Allocation):
        found = type(target).__name__
        raise OptionError(f"{face}() got a {found} as its target; give a mean bit-width, a Budget or an Allocation")
    known = [name for name in inspect.signature(quantize).parameters if name not in ("model", "budget")]
    known = list(_ALLOCATION_OPTIONS) if isinstance(target, Allocation) else known
    for name in options:
        if name not in known:
            kind = "an allocation" if isinstance(target, Allocation) else "a budget"
            raise unknown_name_error(f"option of {face}() with {kind}", name, known)


def quantize_target(
    model: nn.Module | ExportedProgram, target: float | Budget | Allocation, options: Mapping[str, Any]
) -> QuantizedModule:
    """Quantize a model to a mean bit-width, a budget or an existing allocation."""
    if isinstance(target, Allocation):
        return _quantize_by(model, target, **options)
    return quantize(model, target, **options)


def _quantize_by(
    model: nn.Module | ExportedProgram,
    allocation: Allocation,
    *,
    calibration_data: Any = None,
    example_inputs: Any = None,
    recovery: Any = "fast",
    seed: int = 0,
    device: torch.device | str = "cpu",
    levels: Levels = "auto",
    cache_dir: Any = None,
    progress: bool = True,
) -> QuantizedModule:
    """Calibrate at an allocation's bit-widths, recover and convert; layers that it does not contain stay in float."""
    data = None if calibration_data is None else read_data(calibration_data, find_arguments(model))
    examples = example_inputs if data is None else data.example_inputs
    draft = prepare(model, example_inputs=examples, bits=MAX_BITS, activation_bits=None, device=device)
    weights = {site.name for site in draft.inventory.sites}
    known = {glob.escape(name): allocation.bits[name] for name in weights if name in allocation.bits}
    if not known:
        raise OptionError(
            f"the allocation has no layer of this model; its sites are {shorten_names(allocation.bits)}, "
            f"the model's {shorten_names(weights)}; give one that was found for this model"
        )
    prepared = prepare(
        model,
        data,
        example_inputs=example_inputs,
        bits=MAX_BITS,
        activation_bits=sorted({bits for name, bits in allocation.bits.items() if name not in weights}) or None,
        ignore=[glob.escape(name.rpartition(".")[0] or name) for name in weights if name not in allocation.bits],
        pin=known,
        device=device,
        levels=choose_levels(levels, counts_bitops=limits_bitops(allocation.budget)),
    )
    fitted = _fit_allocation(allocation, prepared)
    if data is not None:
        prepared = recover(prepared, fitted, data, recovery, seed=seed, cache_dir=cache_dir, progress=progress)
    return convert(prepared, fitted)


def _fit_allocation(allocation: Allocation, prepared: PreparedModel) -> Allocation:
    """The allocation for the sites of this captured graph; sites with fixed bits may have other names in it."""
    sites = {site.name: site for site in prepared.inventory.sites}
    missing = [name for name in allocation.bits if name not in sites and _FIXED_OUTPUT not in name]
    if missing:
        raise UnsupportedModelError(
            f"{len(missing)} of {len(allocation.bits)} sites of the allocation are not in the captured graph: "
            f"{shorten_names(missing)}; if torch.compile broke the model into parts, use fullgraph=True to see where"
        )
    bits = {name: site.bits[0] for name, site in sites.items() if not site.is_searched}
    return dataclasses.replace(allocation, bits=bits | {n: b for n, b in allocation.bits.items() if n in sites})


def shorten_names(names: Iterable[str], count: int = 3) -> str:
    """Return the first ``count`` names as text, and how many more there are."""
    held = sorted(names)
    return ", ".join(map(repr, held[:count])) + (f" and {len(held) - count} more" if len(held) > count else "")

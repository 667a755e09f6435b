"""Reads the inputs of commands: samples, prepared models, scores and worker processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infoq_fx.cli.application import say
from infoq_fx.cli.options import read_bits, read_dynamic, read_numbers, read_outputs, read_pins, read_ties
from infoq_fx.errors import OptionError
from infoq_fx.types import Budget, Inventory

if TYPE_CHECKING:
    from torch import Tensor

    from infoq_fx.quantization.prepared import PreparedModel

__all__ = [
    "DEFAULT_ACTIVATION_BITS",
    "DEFAULT_BITS",
    "check_same_sites",
    "make_workers",
    "prepare_model",
    "read_samples",
]

_FREEDOM = {"uniform": 0, "mirrored": 1, "codebook": 2}  # which levels hold those of which

DEFAULT_BITS, DEFAULT_ACTIVATION_BITS = "2,3,4,5,6,7,8", "8"


def read_samples(options: Mapping[str, Any], path: Path | None = None) -> tuple[Tensor, Tensor | None]:
    """Read the samples of a command's DATA, or of another path, by its options."""
    from infoq_fx.cli.model_files import load_samples

    return load_samples(
        path or options["data"],
        limit=options["samples"],
        image_size=options["image_size"],
        resize=options["resize"],
        mean=read_numbers(options["mean"], "--mean"),
        std=read_numbers(options["std"], "--std"),
        labels=options["labels"],
    )


def prepare_model(options: dict[str, Any], samples: Any, budget: Budget | None = None) -> PreparedModel:
    """Load and prepare a command's MODEL; candidate bit-widths that were not given get their defaults.

    The budget, if given, is only checked to be feasible.
    """
    from infoq_fx.api import prepare
    from infoq_fx.cli.model_files import load_model

    options["bits"] = options["bits"] or DEFAULT_BITS
    options["activation_bits"] = options["activation_bits"] or DEFAULT_ACTIVATION_BITS
    say("loading and calibrating the model", progress=options["progress"])
    return prepare(
        load_model(options["model"], weights=options["weights"]),
        samples,
        bits=require_bits(options["bits"]),
        activation_bits=read_bits(options["activation_bits"], "--activation-bits"),
        ignore=options["ignore"] or (),
        pin=read_pins(options["pin"]),
        tie=read_ties(options.get("tie")),
        outputs=read_outputs(options["outputs"]),
        device=options["device"],
        dynamic=read_dynamic(options.get("dynamic")),
        levels=_choose_levels(options),
        budget=budget,
    )


def _choose_levels(options: dict[str, Any]) -> Any:
    """What --levels says; by default what the target, or what is limited or minimized, needs."""
    from infoq_fx.quantization.codebooks import choose_levels

    if options.get("target") == "qonnx":
        if options["levels"] not in ("auto", "uniform"):
            raise OptionError(
                f"--levels {options['levels']} is given with --target qonnx, which takes uniform levels; leave "
                "--levels out, or give another target"
            )
        return "uniform"
    counts_bitops = options.get("minimize") == "bitops" or options.get("bitops") is not None
    return choose_levels(options["levels"], counts_bitops=counts_bitops)


def take_levels(options: dict[str, Any], inventory: Inventory) -> None:
    """Set the levels of weights to those that scores were measured with if the command line gives none.

    Raises:
        OptionError: the budget or the target needs others.
    """
    if options["levels"] != "auto":
        return
    found, needed = inventory.levels, _choose_levels(options)
    if _FREEDOM[found] > _FREEDOM[needed]:
        raise OptionError(
            f"the scores are for weights with --levels {found}, and "
            f"{'--target qonnx needs' if needed == 'uniform' else 'BitOps need'} {needed} ones; leave out --scores, or "
            f"give those of a run with --levels {needed}"
        )
    options["levels"] = found


def require_bits(text: str) -> tuple[int, ...]:
    """Read the bit-widths of weights.

    Raises:
        OptionError: they are 'none', or invalid.
    """
    bits = read_bits(text, "--bits")
    if bits is None:
        raise OptionError(
            "--bits is 'none'; give bit-widths of weights from 2 to 8, or 16 for float, or leave layers in float by "
            "--ignore"
        )
    return bits


def take_bits(options: dict[str, Any], inventory: Inventory) -> None:
    """Set the candidate bit-widths to those of an earlier command if the command line gives none."""
    for option, kind in (("bits", "weight"), ("activation_bits", "activation")):
        sites = [site for site in inventory.sites if site.kind == kind and (site.is_searched or kind == "weight")]
        found = sorted({bits for site in sites for bits in site.bits})
        options[option] = options[option] or (",".join(map(str, found)) if found else "none")


def check_same_sites(prepared: PreparedModel, inventory: Inventory, source: Path) -> None:
    """Check that scores are of the same model and the same options.

    Raises:
        OptionError: they are not; the message shows the first difference.
    """
    mine, theirs = ({site.name: site for site in held.sites} for held in (prepared.inventory, inventory))
    advice = f"give the MODEL and the options that {str(source)!r} was made with; they are in {source.name}.toml"
    if inventory.ties and not prepared.inventory.ties:
        raise OptionError(f"the scores are of tied layers, {', '.join(map(repr, inventory.ties[0]))}; {advice}")
    for name in [*mine, *theirs]:
        if name not in theirs or name not in mine:
            where = "not in the scores" if name in mine else "not in the model"
            raise OptionError(f"site {name!r} is {where}; {advice}")
        if mine[name].levels != theirs[name].levels:
            raise OptionError(
                f"the scores are for --levels {theirs[name].levels}, here it is {mine[name].levels}; {advice}"
            )
        if mine[name] != theirs[name]:
            raise OptionError(
                f"site {name!r} is {mine[name].kind} {mine[name].shape} with candidates {mine[name].bits} here, and "
                f"{theirs[name].kind} {theirs[name].shape} with {theirs[name].bits} in the scores; {advice}"
            )


@contextmanager
def make_workers(count: int) -> Iterator[Executor | None]:
    """Start ``count`` worker processes for scoring; None for 0."""
    if not count:
        yield None
        return
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor

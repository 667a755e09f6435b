"""The options that several commands share, named as in the Python API."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from infoq_fx.cli.configuration import read_configuration
from infoq_fx.errors import OptionError, unknown_name_error
from infoq_fx.tolerance import Tolerance
from infoq_fx.tolerance.tolerance import MINIMIZED
from infoq_fx.types import Budget

__all__ = [
    "ActivationBits",
    "ActivationBytesLimit",
    "Alpha",
    "BitopsLimit",
    "Bits",
    "CacheDir",
    "CompressionLimit",
    "Config",
    "CriterionName",
    "Data",
    "Debug",
    "Device",
    "DynamicAxes",
    "Ignore",
    "ImageSize",
    "Json",
    "Labels",
    "LevelsOption",
    "MaxDrop",
    "MaxNats",
    "Mean",
    "MemoryLimit",
    "MinSqnr",
    "Minimize",
    "Model",
    "Outputs",
    "Pin",
    "Progress",
    "Recovery",
    "Resize",
    "Samples",
    "Seed",
    "SizeBytesLimit",
    "Std",
    "Tie",
    "ValidationData",
    "WeightBitsLimit",
    "Weights",
    "Workers",
    "read_bits",
    "read_dynamic",
    "read_limits",
    "read_numbers",
    "read_outputs",
    "read_pins",
    "read_ties",
    "read_tolerance",
]

_TOLERANCE = "Tolerance (instead of a budget, or within it)"
_BUDGET, _DATA, _SEARCH, _RUN = "Budget (any number of limits at once)", "Data", "Search", "Run"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="An exported .pt2 file, or package.module:callable that returns a module, with arguments if needed: "
        "torchvision.models:resnet18, 'torchvision.models:mobilenet_v2(num_classes=10)', my_file:build.",
    ),
]
Data = Annotated[
    Path,
    typer.Argument(
        metavar="DATA",
        help="A folder of images (with one subfolder per class, if there are labels), or an .npz file with x and, if "
        "there are labels, y. About 1,000 samples are enough; labels are not needed.",
    ),
]
Weights = Annotated[Path | None, typer.Option(help="A state dict from torch.save, for a MODEL that is a callable.")]

WeightBitsLimit = Annotated[float | None, typer.Option(help="Largest mean weight bit-width.", rich_help_panel=_BUDGET)]
CompressionLimit = Annotated[
    float | None, typer.Option(help="Least compression of weights against float32.", rich_help_panel=_BUDGET)
]
SizeBytesLimit = Annotated[
    float | None, typer.Option(help="Largest size of all parameters in bytes.", rich_help_panel=_BUDGET)
]
BitopsLimit = Annotated[
    float | None, typer.Option(help="Largest number of BitOps of one sample.", rich_help_panel=_BUDGET)
]
ActivationBytesLimit = Annotated[
    float | None,
    typer.Option(help="Largest size of all activations of one sample in bytes.", rich_help_panel=_BUDGET),
]

MaxDrop = Annotated[
    float | None,
    typer.Option(
        help="Points of top-1 that may be lost on validation samples; the smallest model within it is sought.",
        rich_help_panel=_TOLERANCE,
    ),
]
MaxNats = Annotated[
    float | None,
    typer.Option(help="Nats a sample that may be lost there; needs no labels.", rich_help_panel=_TOLERANCE),
]
MinSqnr = Annotated[
    float | None,
    typer.Option(help="Least signal-to-quantization-noise ratio there in dB.", rich_help_panel=_TOLERANCE),
]
Minimize = Annotated[
    str,
    typer.Option(
        help="What to make small: size_bytes, bitops, activation_bytes or weight_bits.", rich_help_panel=_TOLERANCE
    ),
]
ValidationData = Annotated[
    Path | None,
    typer.Option(
        help="Samples to measure the loss on; by default every second sample of DATA, which calibrates nothing then.",
        rich_help_panel=_DATA,
    ),
]

Samples = Annotated[
    int, typer.Option(help="Largest number of samples, evenly spread over DATA.", min=1, rich_help_panel=_DATA)
]
ImageSize = Annotated[
    int, typer.Option(help="Side of the square that images are cropped to.", min=1, rich_help_panel=_DATA)
]
Resize = Annotated[
    int | None,
    typer.Option(help="Short side before the crop; by default 8/7 of --image-size.", min=1, rich_help_panel=_DATA),
]
Mean = Annotated[
    str, typer.Option(help="Channel means, from 0 to 1; a single number reads grey images.", rich_help_panel=_DATA)
]
Std = Annotated[str, typer.Option(help="Channel standard deviations, likewise.", rich_help_panel=_DATA)]
Labels = Annotated[
    bool,
    typer.Option(help="Use an image folder's subfolders, numbered by name, as labels.", rich_help_panel=_DATA),
]

Bits = Annotated[str | None, typer.Option(help="Candidate bit-widths of weights.", rich_help_panel=_SEARCH)]
ActivationBits = Annotated[
    str | None,
    typer.Option(
        help="Bit-widths of activations; several are searched jointly, 'none' means float.", rich_help_panel=_SEARCH
    ),
]
CriterionName = Annotated[
    str, typer.Option(help="Sensitivity criterion; infoq-fx audit compares them.", rich_help_panel=_SEARCH)
]
Alpha = Annotated[
    float, typer.Option(help="Factor on activation scores relative to weight scores.", rich_help_panel=_SEARCH)
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(help="Glob on module paths of layers to leave in float; may be repeated.", rich_help_panel=_SEARCH),
]
Pin = Annotated[
    list[str] | None,
    typer.Option(help="A fixed bit-width, such as 'layer1.*=8'; may be repeated.", rich_help_panel=_SEARCH),
]
Tie = Annotated[
    list[str] | None,
    typer.Option(
        help="Globs on module paths of layers with one bit-width in each parent module, such as "
        "'*.q_proj,*.k_proj,*.v_proj'; may be repeated.",
        rich_help_panel=_SEARCH,
    ),
]
LevelsOption = Annotated[
    str,
    typer.Option(
        help="The integers of weights: uniform (all of a bit-width), mirrored (these or their negatives in each "
        "channel), codebook (levels chosen for each weight), or auto: codebook, but mirrored for --bitops and uniform "
        "for --target qonnx.",
        rich_help_panel=_SEARCH,
    ),
]
Outputs = Annotated[
    list[str] | None,
    typer.Option(
        help="What an output means: NAME=KIND or POSITION=KIND, with KIND categorical, bernoulli, quantity or ignored; "
        "may be repeated.",
        rich_help_panel=_SEARCH,
    ),
]
DynamicAxes = Annotated[
    list[str] | None,
    typer.Option(
        "--dynamic",
        help="auto, none, or the axes of an input that may have any size, such as 'image=2,3'; may be repeated.",
        rich_help_panel=_SEARCH,
    ),
]
Recovery = Annotated[
    str,
    typer.Option(help="none, fast or best; or names of steps, separated by commas.", rich_help_panel=_SEARCH),
]

Seed = Annotated[int, typer.Option(help="Seed of all random numbers.", rich_help_panel=_RUN)]
Device = Annotated[str, typer.Option(help="cpu or cuda.", rich_help_panel=_RUN)]
CacheDir = Annotated[
    Path | None,
    typer.Option(help="Folder for finished scores, from which an interrupted run resumes.", rich_help_panel=_RUN),
]
MemoryLimit = Annotated[
    int | None, typer.Option(help="Memory in bytes that scoring may take per process.", min=1, rich_help_panel=_RUN)
]
Workers = Annotated[
    int, typer.Option(help="Number of scoring processes; 0 uses threads of this one.", min=0, rich_help_panel=_RUN)
]
Config = Annotated[
    Path | None,
    typer.Option(
        help="Read options from this TOML file; the command line takes precedence.",
        is_eager=True,
        callback=read_configuration,
        rich_help_panel=_RUN,
    ),
]
Progress = Annotated[bool, typer.Option(help="Show progress bars on standard error.", rich_help_panel=_RUN)]
Json = Annotated[
    bool, typer.Option("--json", help="Print only one JSON document on standard output.", rich_help_panel=_RUN)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors, and the log.", rich_help_panel=_RUN)]


def read_limits(
    budget: float | None,
    compression: float | None,
    size_bytes: float | None,
    bitops: float | None,
    activation_bytes: float | None,
) -> Budget:
    """Build the budget from the command line's limits.

    Raises:
        OptionError: there is no limit, or a limit is not a positive number.
    """
    limits: dict[str, Any] = {
        "weight_bits": budget,
        "compression": compression,
        "size_bytes": size_bytes,
        "bitops": bitops,
        "activation_bytes": activation_bytes,
    }
    if all(limit is None for limit in limits.values()):
        raise OptionError(
            "there is no budget; give --budget (mean weight bits, such as 4), --compression, --size-bytes, --bitops "
            "or --activation-bytes, one or several; quantize also takes --max-drop, --max-nats or --min-sqnr"
        )
    return Budget(**limits)


def read_tolerance(options: Mapping[str, Any], limits: Budget | None) -> Tolerance | None:
    """Build the tolerance from the command line's options, within the limits; None without any.

    Raises:
        OptionError: there are two, one is not a number of at least 0, or an option for one is given without it.
    """
    given = {"drop": options["max_drop"], "nats": options["max_nats"], "sqnr_db": options["min_sqnr"]}
    flags = {"drop": "--max-drop", "nats": "--max-nats", "sqnr_db": "--min-sqnr"}
    asked = [name for name, limit in given.items() if limit is not None]
    if len(asked) > 1:
        raise OptionError(f"{' and '.join(flags[name] for name in asked)} are given; give one of them")
    if not asked:
        if options["validation_data"] is not None:
            raise OptionError("--validation-data is for a tolerance; give --max-drop, --max-nats or --min-sqnr too")
        if options["minimize"] != "size_bytes":
            raise OptionError("--minimize is for a tolerance; give --max-drop, --max-nats or --min-sqnr too")
        return None
    limit = given[asked[0]]
    if not 0 <= limit < math.inf:
        raise OptionError(f"{flags[asked[0]]} is {limit:g}; give a finite number of at least 0")
    if options["minimize"] not in MINIMIZED:
        raise unknown_name_error("cost in --minimize", options["minimize"], MINIMIZED)
    return Tolerance(**given, minimize=options["minimize"], within=limits)


def read_bits(text: str, option: str) -> tuple[int, ...] | None:
    """Parse bit-widths such as ``2,4,8`` or ``2-8``; ``none`` is None.

    Raises:
        OptionError: the text is not such a list.
    """
    if text.strip().lower() == "none":
        return None
    found: list[int] = []
    for part in text.split(","):
        low, _, high = part.strip().partition("-")
        if not (low.isdecimal() and (high or low).isdecimal()):
            raise OptionError(f"{option} is {text!r}; give bit-widths separated by commas, such as 2,4,8, or 2-8")
        found.extend(range(int(low), int(high or low) + 1))
    return tuple(found)


def read_numbers(text: str, option: str) -> tuple[float, ...]:
    """Parse numbers separated by commas.

    Raises:
        OptionError: the text is not such a list.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError(f"{option} is {text!r}; give numbers separated by commas, such as 0.5,0.25") from error


def read_outputs(texts: list[str] | None) -> str | dict[str | int, str]:
    """Return the readings of ``--outputs`` by output name or position; ``"auto"`` without any."""
    if not texts:
        return "auto"
    found: dict[str | int, str] = {}
    for text in texts:
        name, sign, kind = text.partition("=")
        if not (name and sign and kind):
            raise OptionError(f"--outputs is {text!r}; give NAME=KIND, such as boxes=quantity or 0=categorical")
        found[int(name) if name.isdecimal() else name] = kind
    return found


def read_dynamic(texts: list[str] | None) -> dict[str, tuple[int, ...]] | Literal["auto"] | None:
    """Parse axes that stay free by input name; ``"auto"`` if nothing is given, None for ``none``.

    Raises:
        OptionError: an entry is not ``input=axes``.
    """
    if not texts or texts == ["auto"]:
        return "auto"
    if texts == ["none"]:
        return None
    axes = {}
    for text in texts:
        name, _, given = text.rpartition("=")
        if not name or not all(part.isdecimal() for part in given.split(",")):
            raise OptionError(f"--dynamic is {text!r}; give auto, none, or an input and axes, such as 'image=2,3'")
        axes[name] = tuple(int(part) for part in given.split(","))
    return axes


def read_pins(texts: list[str] | None) -> dict[str, int]:
    """Parse fixed bit-widths by glob pattern.

    Raises:
        OptionError: an entry is not ``pattern=bits``.
    """
    pins: dict[str, int] = {}
    for text in texts or ():
        pattern, _, bits = text.rpartition("=")
        if not pattern or not bits.isdecimal():
            raise OptionError(f"--pin is {text!r}; give a glob on module paths and a bit-width, such as 'layer1.*=8'")
        if pins.get(pattern, int(bits)) != int(bits):
            raise OptionError(f"--pin gives {pattern!r} both {pins[pattern]} and {bits} bits; give one of them")
        pins[pattern] = int(bits)
    return pins


def read_ties(texts: list[str] | None) -> list[tuple[str, ...]]:
    """Parse groups of glob patterns separated by commas.

    Raises:
        OptionError: a group has an empty pattern.
    """
    ties = [tuple(part.strip() for part in text.split(",")) for text in texts or ()]
    for text, patterns in zip(texts or (), ties, strict=True):
        if not all(patterns):
            raise OptionError(f"--tie is {text!r}; give globs on module paths, such as '*.q_proj,*.k_proj,*.v_proj'")
    return ties

"""The options that several commands share, under the names that the Python calls give them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from infoq_fx.cli.configuration import read_configuration
from infoq_fx.errors import OptionError
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
    "CountAs",
    "CriterionName",
    "Data",
    "Debug",
    "Device",
    "Ignore",
    "ImageSize",
    "Json",
    "Labels",
    "Mean",
    "MemoryLimit",
    "Model",
    "Pin",
    "Progress",
    "Recovery",
    "Resize",
    "Samples",
    "Seed",
    "SizeBytesLimit",
    "Std",
    "WeightBitsLimit",
    "Weights",
    "Workers",
    "read_bits",
    "read_limits",
    "read_numbers",
    "read_pins",
]

_BUDGET, _DATA, _SEARCH, _RUN = "Budget (any number of limits at once)", "Data", "Search", "Run"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="An exported .pt2 file, or package.module:callable that returns a module, with arguments if it needs "
        "any: torchvision.models:resnet18, 'torchvision.models:mobilenet_v2(num_classes=10)', my_file:build.",
    ),
]
Data = Annotated[
    Path,
    typer.Argument(
        metavar="DATA",
        help="A folder of images (those of one class in a folder of its own, if there are labels), or an .npz file "
        "with x and, if there are labels, y. About 1,000 samples serve; labels are not needed.",
    ),
]
Weights = Annotated[
    Path | None, typer.Option(help="A state dict that torch.save wrote, for a MODEL that is a callable.")
]

WeightBitsLimit = Annotated[float | None, typer.Option(help="Mean weight bit-width, at most.", rich_help_panel=_BUDGET)]
CompressionLimit = Annotated[
    float | None, typer.Option(help="Times smaller than float32 weights, at least.", rich_help_panel=_BUDGET)
]
SizeBytesLimit = Annotated[
    float | None, typer.Option(help="Bytes of all parameters, at most.", rich_help_panel=_BUDGET)
]
BitopsLimit = Annotated[float | None, typer.Option(help="BitOps of one sample, at most.", rich_help_panel=_BUDGET)]
ActivationBytesLimit = Annotated[
    float | None,
    typer.Option(help="Bytes of all activations of one sample, at most.", rich_help_panel=_BUDGET),
]

CountAs = Annotated[
    str | None,
    typer.Option(
        help="Count weights as this container stores them: in packed, 3 bits take 4, and only 4 and 8 are searched.",
        rich_help_panel=_BUDGET,
    ),
]

Samples = Annotated[int, typer.Option(help="Samples, at most, evenly spread over DATA.", min=1, rich_help_panel=_DATA)]
ImageSize = Annotated[
    int, typer.Option(help="Side of the square that images are cropped to.", min=1, rich_help_panel=_DATA)
]
Resize = Annotated[
    int | None,
    typer.Option(help="Short side before the crop; 8/7 of --image-size without it.", min=1, rich_help_panel=_DATA),
]
Mean = Annotated[
    str, typer.Option(help="Of the channels, values from 0 to 1; one number reads grey images.", rich_help_panel=_DATA)
]
Std = Annotated[str, typer.Option(help="Of the channels, likewise.", rich_help_panel=_DATA)]
Labels = Annotated[
    bool,
    typer.Option(help="Number an image folder's subfolders by name and take them as labels.", rich_help_panel=_DATA),
]

Bits = Annotated[str | None, typer.Option(help="Candidate bit-widths of weights.", rich_help_panel=_SEARCH)]
ActivationBits = Annotated[
    str | None,
    typer.Option(
        help="Bit-widths of activations; several are searched jointly, 'none' is float.", rich_help_panel=_SEARCH
    ),
]
CriterionName = Annotated[str, typer.Option(help="What scores; infoq-fx audit compares them.", rich_help_panel=_SEARCH)]
Alpha = Annotated[
    float, typer.Option(help="Weight of activation scores against weight scores.", rich_help_panel=_SEARCH)
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(help="Glob on module paths to leave in float; may be repeated.", rich_help_panel=_SEARCH),
]
Pin = Annotated[
    list[str] | None,
    typer.Option(help="A bit-width settled beforehand, as 'layer1.*=8'; may be repeated.", rich_help_panel=_SEARCH),
]
Recovery = Annotated[
    str,
    typer.Option(help="none, fast or best; or names of steps, with commas between.", rich_help_panel=_SEARCH),
]

Seed = Annotated[int, typer.Option(help="Of everything random.", rich_help_panel=_RUN)]
Device = Annotated[str, typer.Option(help="cpu, or cuda.", rich_help_panel=_RUN)]
CacheDir = Annotated[
    Path | None,
    typer.Option(help="Keep every finished score here: a run that was stopped goes on.", rich_help_panel=_RUN),
]
MemoryLimit = Annotated[
    int | None, typer.Option(help="Bytes that scoring may take in a process.", min=1, rich_help_panel=_RUN)
]
Workers = Annotated[
    int, typer.Option(help="Processes that score; 0 is threads of this one.", min=0, rich_help_panel=_RUN)
]
Config = Annotated[
    Path | None,
    typer.Option(
        help="Take options from this TOML file; the command line goes before.",
        is_eager=True,
        callback=read_configuration,
        rich_help_panel=_RUN,
    ),
]
Progress = Annotated[
    bool, typer.Option(help="Show what is done and the time left, on standard error.", rich_help_panel=_RUN)
]
Json = Annotated[
    bool, typer.Option("--json", help="One JSON document on standard output, nothing else.", rich_help_panel=_RUN)
]
Debug = Annotated[bool, typer.Option("--debug", help="A traceback behind an error, and the log.", rich_help_panel=_RUN)]


def read_limits(
    budget: float | None,
    compression: float | None,
    size_bytes: float | None,
    bitops: float | None,
    activation_bytes: float | None,
    count_as: str | None = None,
) -> Budget:
    """The budget of the command line.

    Raises:
        OptionError: no limit, one that is not a positive number, or an unknown container.
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
            "or --activation-bytes, any number of them"
        )
    return Budget(**limits, container=count_as)


def read_bits(text: str, option: str) -> tuple[int, ...] | None:
    """Bit-widths as ``2,4,8`` or ``2-8``; ``none`` is None.

    Raises:
        OptionError: no such list.
    """
    if text.strip().lower() == "none":
        return None
    found: list[int] = []
    for part in text.split(","):
        low, _, high = part.strip().partition("-")
        if not (low.isdecimal() and (high or low).isdecimal()):
            raise OptionError(f"{option} is {text!r}; give bit-widths with commas between, as 2,4,8, or 2-8")
        found.extend(range(int(low), int(high or low) + 1))
    return tuple(found)


def read_numbers(text: str, option: str) -> tuple[float, ...]:
    """Numbers with commas between.

    Raises:
        OptionError: no such list.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError(f"{option} is {text!r}; give numbers with commas between, as 0.5,0.25") from error


def read_pins(texts: list[str] | None) -> dict[str, int]:
    """Bit-widths settled beforehand, by glob pattern.

    Raises:
        OptionError: an entry is not ``pattern=bits``.
    """
    pins = {}
    for text in texts or ():
        pattern, _, bits = text.rpartition("=")
        if not pattern or not bits.isdecimal():
            raise OptionError(f"--pin is {text!r}; give a glob on module paths and a bit-width, as 'layer1.*=8'")
        pins[pattern] = int(bits)
    return pins

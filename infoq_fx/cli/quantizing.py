"""The commands ``infoq-fx quantize``, ``export`` and ``verify``, from a model to a verified file."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infoq_fx.allocation.allocation_file import describe_allocation, load_allocation
from infoq_fx.allocation.cost import limits_bitops
from infoq_fx.cli.application import ExitCode, Result, check_output, command, say
from infoq_fx.cli.inputs import check_same_sites, make_workers, prepare_model, read_samples, take_bits, take_levels
from infoq_fx.cli.options import (
    ActivationBits,
    ActivationBytesLimit,
    Alpha,
    BitopsLimit,
    Bits,
    CacheDir,
    CompressionLimit,
    Config,
    CriterionName,
    Data,
    Debug,
    Device,
    DynamicAxes,
    Ignore,
    ImageSize,
    Json,
    Labels,
    LevelsOption,
    MaxDrop,
    MaxNats,
    Mean,
    MemoryLimit,
    Minimize,
    MinSqnr,
    Model,
    Outputs,
    Pin,
    Progress,
    Recovery,
    Resize,
    Samples,
    Seed,
    SizeBytesLimit,
    Std,
    Tie,
    ValidationData,
    WeightBitsLimit,
    Weights,
    Workers,
    read_limits,
    read_tolerance,
)
from infoq_fx.errors import OptionError
from infoq_fx.table import SensitivityTable
from infoq_fx.tolerance import Tolerance
from infoq_fx.types import Budget

if TYPE_CHECKING:
    from torch import Tensor

    from infoq_fx.conversion.quantized import QuantizedModule
    from infoq_fx.core.data import CalibrationData
    from infoq_fx.quantization.prepared import PreparedModel
    from infoq_fx.recovery.step import RecoveryStep

Container = Annotated[
    str | None,
    typer.Option(
        help="exact (weights take the bits that they have) or int8 (for runtimes that fold no constants).",
        rich_help_panel="File",
    ),
]
Target = Annotated[str, typer.Option(help="The runtime that the file is for.", rich_help_panel="File")]

_HELD_BACK = "every second sample is held back"  # a setting of scores that were made for a tolerance


@command
def quantize(
    ctx: typer.Context,
    model: Model,
    data: Data,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="model.onnx, or model.pt2 to export and finetune later.")
    ],
    budget: WeightBitsLimit = None,
    compression: CompressionLimit = None,
    size_bytes: SizeBytesLimit = None,
    bitops: BitopsLimit = None,
    activation_bytes: ActivationBytesLimit = None,
    max_drop: MaxDrop = None,
    max_nats: MaxNats = None,
    min_sqnr: MinSqnr = None,
    minimize: Minimize = "size_bytes",
    validation_data: ValidationData = None,
    scores: Annotated[
        Path | None, typer.Option(help="Scores from infoq-fx score or an earlier run, to use instead of scoring.")
    ] = None,
    allocation: Annotated[
        Path | None, typer.Option(help="An allocation from infoq-fx allocate, whose bit-widths are used.")
    ] = None,
    weights: Weights = None,
    samples: Samples = 1024,
    image_size: ImageSize = 224,
    resize: Resize = None,
    mean: Mean = "0.485,0.456,0.406",
    std: Std = "0.229,0.224,0.225",
    labels: Labels = True,
    bits: Bits = None,
    activation_bits: ActivationBits = None,
    criterion: CriterionName = "infoq",
    alpha: Alpha = 1.0,
    refine: Annotated[
        bool, typer.Option(help="Run a few allocations and choose the best.", rich_help_panel="Search")
    ] = True,
    search_passes: Annotated[
        int,
        typer.Option(
            help="Improve the best by measured changes, in at most so many passes over 512 samples; about 150 are "
            "enough for 20 layers. 0 for none.",
            min=0,
            rich_help_panel="Search",
        ),
    ] = 0,
    recovery: Recovery = "fast",
    ignore: Ignore = None,
    pin: Pin = None,
    tie: Tie = None,
    levels: LevelsOption = "auto",
    outputs: Outputs = None,
    dynamic: DynamicAxes = None,
    container: Container = None,
    target: Target = "onnxruntime",
    report: Annotated[
        Path | None,
        typer.Option(help="Also write a page with a slider over budgets to this path.", rich_help_panel="File"),
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    cache_dir: CacheDir = None,
    memory_limit: MemoryLimit = None,
    workers: Workers = 0,
    config: Config = None,
    progress: Progress = True,
    json_output: Json = False,
    debug: Debug = False,
) -> Result:
    """Quantize a trained model under a budget or a tolerance, write it as ONNX, and verify the file.

    With --max-drop, --max-nats or --min-sqnr it is the smallest model that loses no more on validation samples; budget
    options are then limits that hold besides.

    The scores are written next to the file. For another budget, repeat the command with --scores
    model.onnx.scores.json.
    """
    from infoq_fx import allocation_of, api, measure_file, summarize
    from infoq_fx.recovery.ladder import find_steps
    from infoq_fx.scoring.criteria import find_criterion

    options = ctx.params
    check_output(output)
    if report is not None:
        check_output(report, "--report")
    find_criterion(criterion, seed)
    if search_passes and not refine:
        raise OptionError("--search-passes improves what --refine finds; leave --no-refine out")
    steps = find_steps(recovery.split(",") if "," in recovery else recovery, seed)
    if allocation is not None and scores is not None:
        raise OptionError("--allocation and --scores are both given; give one, as an allocation needs no scores")
    fixed = None if allocation is None else load_allocation(allocation)
    given = (budget, compression, size_bytes, bitops, activation_bytes)
    has_limits, has_tolerance = (any(x is not None for x in y) for y in (given, (max_drop, max_nats, min_sqnr)))
    if fixed is not None and (has_limits or has_tolerance):
        raise OptionError("--allocation already fixes the bit-widths; leave the budget out, or allocate again with it")
    limits = read_limits(*given) if fixed is None and (has_limits or not has_tolerance) else None
    tolerance = read_tolerance(options, limits)
    if report is not None and allocation is not None:
        raise OptionError("--report shows scores, which --allocation does not have; leave one of them out")
    table = None if scores is None else SensitivityTable.load(scores)
    if table is not None:
        take_bits(options, table.inventory)
        take_levels(options, table.inventory)
    elif fixed is not None and levels == "auto" and limits_bitops(fixed.budget):
        options["levels"] = "uniform" if target == "qonnx" else "mirrored"
    read = read_samples(options)
    data, judged = _divide(options, read, tolerance)
    if table is not None and tolerance is not None and validation_data is None and not table.settings.get(_HELD_BACK):
        warnings.warn(
            f"the samples that are held back to validate may be among those that {str(scores)!r} was measured on, and "
            "lose less than others; give --validation-data, or the scores of a run with a tolerance",
            UserWarning,
            stacklevel=2,
        )
    prepared = prepare_model(options, data, limits)
    if table is not None and scores is not None:
        check_same_sites(prepared, table.inventory, scores)
        table = dataclasses.replace(table, inventory=prepared.inventory)
    kept = output.with_name(output.name + ".scores.json") if fixed is None and table is None else None
    if fixed is not None:
        better = api.recover(prepared, fixed, read, steps, cache_dir=cache_dir, progress=progress)
        quantized = api.convert(better, fixed)
    else:
        sought = tolerance or limits
        assert sought is not None
        quantized = _search(options, prepared, (data, judged), sought, steps, table, kept)
    text, document, code = _write(options, quantized, read)
    size = measure_file(output) if output.suffix != ".pt2" else None
    text = f"{summarize(quantized, file=size)}\n{text}"
    if kept is not None:
        text += f"\nwrote the scores to {kept}; for another budget, repeat the command with --scores {kept}"
    if report is not None:
        from infoq_fx.report.page import write_report

        write_report(quantized, report)
        text += f"\nwrote {report}"
    document["scores"] = None if kept is None else str(kept)
    document["allocation"] = describe_allocation(allocation_of(quantized))
    return Result(text=text, document=document, output=output, exit_code=code)


@command
def export(
    ctx: typer.Context,
    quantized: Annotated[
        Path, typer.Argument(metavar="QUANTIZED", help="A .pt2 file from infoq-fx quantize or save_quantized.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")],
    container: Container = None,
    target: Target = "onnxruntime",
    config: Config = None,
    json_output: Json = False,
    debug: Debug = False,
) -> Result:
    """Write a quantized module as ONNX, for a container and a runtime.

    Next:  infoq-fx verify model.onnx model.pt2 DATA
    """
    from infoq_fx.export.qdq_onnx.exporter import export_onnx
    from infoq_fx.export.quantized_files import load_quantized

    check_output(output)
    export_onnx(load_quantized(quantized), output, container=container, target=target)
    size = output.stat().st_size
    text = f"wrote {output} ({size:,} bytes); next: infoq-fx verify {output} {quantized} DATA"
    return Result(text=text, document={"file_bytes": size}, output=output)


@command
def verify(
    ctx: typer.Context,
    onnx_file: Annotated[Path, typer.Argument(metavar="ONNX", help="The file to verify.")],
    quantized: Annotated[Path, typer.Argument(metavar="QUANTIZED", help="The .pt2 file that it was exported from.")],
    data: Data,
    samples: Samples = 1024,
    image_size: ImageSize = 224,
    resize: Resize = None,
    mean: Mean = "0.485,0.456,0.406",
    std: Std = "0.229,0.224,0.225",
    labels: Labels = True,
    target: Target = "onnxruntime",
    config: Config = None,
    json_output: Json = False,
    debug: Debug = False,
) -> Result:
    """Run an ONNX file on samples, compare it with the quantized module, and report whether it is sound.

    The exit code is 3 if it is not.
    """
    from infoq_fx.export.quantized_files import load_quantized
    from infoq_fx.export.verification import verify_onnx

    if not onnx_file.is_file():
        raise OptionError(f"no file {str(onnx_file)!r}; write one with infoq-fx export or infoq-fx quantize")
    found = verify_onnx(onnx_file, load_quantized(quantized), read_samples(ctx.params), target=target)
    code = ExitCode.DONE if found.is_sound else ExitCode.UNSOUND
    return Result(text=str(found), document=dataclasses.asdict(found), exit_code=code)


def _divide(
    options: dict[str, Any], read: tuple[Tensor, Tensor | None], tolerance: Tolerance | None
) -> tuple[Any, CalibrationData | None]:
    """Samples to calibrate with and, for a tolerance, samples to validate with."""
    if tolerance is None:
        return read, None
    from infoq_fx.tolerance.search import divide_samples

    path = options["validation_data"]
    validation = None if path is None else read_samples(options, path)
    return divide_samples(read, validation, tolerance, None, None)


def _search(
    options: dict[str, Any],
    prepared: PreparedModel,
    samples: tuple[Any, CalibrationData | None],
    sought: Budget | Tolerance,
    steps: Sequence[RecoveryStep],
    table: SensitivityTable | None,
    kept: Path | None,
) -> QuantizedModule:
    """Do the steps of :func:`infoq_fx.quantize` after calibration; new scores are written as soon as they are known."""
    from infoq_fx import pipeline
    from infoq_fx.core.data import ForwardArguments, read_data
    from infoq_fx.graph.model_inputs import fit_data
    from infoq_fx.scoring.criteria import make_criterion
    from infoq_fx.scoring.sensitivity import Resources
    from infoq_fx.tolerance.search import quantize_within

    def keep(found: SensitivityTable) -> None:
        if kept is not None:
            is_apart = isinstance(sought, Tolerance) and options["validation_data"] is None
            found = dataclasses.replace(found, settings={**found.settings, _HELD_BACK: True}) if is_apart else found
            found.save(kept)
        if isinstance(sought, Tolerance):
            say(f"seeking {sought}", progress=options["progress"])
        elif options["search_passes"]:
            say("running a few allocations, and improving the best", progress=options["progress"])
        elif options["refine"]:
            say("running a few allocations to choose the best", progress=options["progress"])

    data = fit_data(prepared, read_data(samples[0], ForwardArguments.exactly(prepared.input_names)))
    scores = table or make_criterion(options["criterion"], seed=options["seed"])
    with make_workers(options["workers"]) as executor:
        resources = Resources(
            executor=executor,
            cache_dir=options["cache_dir"],
            memory_limit=options["memory_limit"],
            progress=options["progress"],
        )
        chosen: Any = {name: options[name] for name in ("alpha", "refine", "search_passes")} | {"keep_scores": keep}
        if isinstance(sought, Tolerance):
            return quantize_within(prepared, sought, (None, samples[1], data), scores, steps, resources, **chosen)
        return pipeline.quantize_prepared(prepared, sought, data, scores, steps, resources, **chosen)


def _write(
    options: dict[str, Any], quantized: QuantizedModule, read: tuple[Tensor, Tensor | None]
) -> tuple[str, dict[str, Any], int]:
    """Write the module in the format of the path's suffix, and return text, document and exit code."""
    output: Path = options["output"]
    if output.suffix == ".pt2":
        from infoq_fx.export.quantized_files import save_quantized

        save_quantized(quantized, output)
        size = output.stat().st_size
        text = f"wrote {output} ({size:,} bytes); next: infoq-fx export {output} -o {output.with_suffix('.onnx')}"
        return text, {"file_bytes": size}, ExitCode.DONE
    from infoq_fx.export.qdq_onnx.exporter import export_onnx
    from infoq_fx.export.verification import verify_onnx

    export_onnx(quantized, output, container=options["container"], target=options["target"])
    size = output.stat().st_size
    say("verifying the file", progress=options["progress"])
    found = verify_onnx(output, quantized, read, target=options["target"])
    text = f"{found}\nwrote {output} ({size:,} bytes)"
    code = ExitCode.DONE if found.is_sound else ExitCode.UNSOUND
    return text, {"file_bytes": size, "verification": dataclasses.asdict(found)}, code

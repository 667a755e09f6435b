"""The commands ``infoq-fx audit``, which compares criteria, and ``infoq-fx report``, which writes a page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infoq_fx.cli.application import Result, check_output, command
from infoq_fx.cli.inputs import DEFAULT_ACTIVATION_BITS, DEFAULT_BITS, make_workers, read_samples, require_bits
from infoq_fx.cli.options import (
    ActivationBits,
    Alpha,
    Bits,
    CacheDir,
    Config,
    Data,
    Debug,
    Device,
    Ignore,
    ImageSize,
    Json,
    Labels,
    LevelsOption,
    Mean,
    MemoryLimit,
    Model,
    Outputs,
    Pin,
    Progress,
    Resize,
    Samples,
    Std,
    Tie,
    Weights,
    Workers,
    read_bits,
    read_numbers,
    read_outputs,
    read_pins,
    read_ties,
)
from infoq_fx.core.atomic_files import write_atomically

if TYPE_CHECKING:
    from infoq_fx.auditing.result import Audit


@command
def audit(
    ctx: typer.Context,
    model: Model,
    data: Data,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The comparison to write, JSON.")] = None,
    criteria: Annotated[
        str, typer.Option(help="Names, separated by commas.", rich_help_panel="Search")
    ] = "infoq,hawq_v2,mpqco,eagl,weight_mse",
    budgets: Annotated[
        str, typer.Option(help="Mean weight bit-widths, separated by commas.", rich_help_panel="Search")
    ] = "5,4,3",
    references: Annotated[
        str,
        typer.Option(
            help="Searches to compare with, separated by commas: evolutionary, differentiable.",
            rich_help_panel="Search",
        ),
    ] = "",
    evaluation_data: Annotated[
        Path | None,
        typer.Option(
            help="Data to measure accuracy on; by default every second sample of DATA.", rich_help_panel="Data"
        ),
    ] = None,
    correlate: Annotated[
        bool, typer.Option(help="Measure every layer's accuracy drop and correlate with it.", rich_help_panel="Search")
    ] = True,
    recovery: Annotated[
        str, typer.Option(help="Recovery before accuracy is measured; quantize uses fast.", rich_help_panel="Search")
    ] = "none",
    weights: Weights = None,
    samples: Samples = 1024,
    image_size: ImageSize = 224,
    resize: Resize = None,
    mean: Mean = "0.485,0.456,0.406",
    std: Std = "0.229,0.224,0.225",
    labels: Labels = True,
    bits: Bits = DEFAULT_BITS,
    activation_bits: ActivationBits = DEFAULT_ACTIVATION_BITS,
    ignore: Ignore = None,
    outputs: Outputs = None,
    pin: Pin = None,
    tie: Tie = None,
    levels: LevelsOption = "auto",
    device: Device = "cpu",
    cache_dir: CacheDir = None,
    memory_limit: MemoryLimit = None,
    workers: Workers = 0,
    config: Config = None,
    progress: Progress = True,
    json_output: Json = False,
    debug: Debug = False,
) -> Result:
    """Compare criteria on a model by the accuracy of their allocations on held-out samples."""
    import infoq_fx.auditing.comparison
    from infoq_fx.cli.model_files import load_model

    if output is not None:
        check_output(output)
    limits = read_numbers(budgets, "--budgets")
    read = read_samples(ctx.params)
    with make_workers(workers) as executor:
        found = infoq_fx.auditing.comparison.audit(
            load_model(model, weights=weights),
            read,
            criteria.split(","),
            budgets=limits,
            references=[name.strip() for name in references.split(",") if name.strip()],
            evaluation_data=None if evaluation_data is None else read_samples(ctx.params, evaluation_data),
            correlate=correlate,
            bits=require_bits(bits or DEFAULT_BITS),
            activation_bits=read_bits(activation_bits or DEFAULT_ACTIVATION_BITS, "--activation-bits"),
            ignore=ignore or (),
            pin=read_pins(pin),
            tie=read_ties(tie),
            levels=levels,  # type: ignore[arg-type]
            outputs=read_outputs(outputs),
            recovery=recovery.split(",") if "," in recovery else recovery,
            device=device,
            executor=executor,
            cache_dir=cache_dir,
            memory_limit=memory_limit,
            progress=progress,
        )
    document = _describe_audit(found)
    text = str(found)
    if output is not None:
        write_atomically(output, json.dumps(document, indent=1) + "\n")
        text += f"\nwrote {output}"
    return Result(text=text, document=document, output=output)


@command
def report(
    ctx: typer.Context,
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="A table of scores from score or quantize.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write, HTML.")],
    allocation: Annotated[
        Path | None, typer.Option(help="An allocation from infoq-fx allocate, to show with the curve.")
    ] = None,
    alpha: Alpha = 1.0,
    pin: Pin = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Bit-widths by information flow",
    config: Config = None,
    json_output: Json = False,
    debug: Debug = False,
) -> Result:
    """Write an HTML page about a table of scores: layers, bit-widths, and a slider over budgets."""
    from infoq_fx.allocation.allocation_file import load_allocation
    from infoq_fx.report.page import write_report
    from infoq_fx.table import SensitivityTable

    write_report(
        SensitivityTable.load(scores),
        check_output(output),
        allocation=None if allocation is None else load_allocation(allocation),
        alpha=alpha,
        pin=read_pins(pin),
        title=title,
    )
    size = output.stat().st_size
    return Result(text=f"wrote {output} ({size:,} bytes)", document={"file_bytes": size}, output=output)


def _describe_audit(found: Audit) -> dict[str, Any]:
    """The comparison as values that JSON can store."""
    rows = []
    for row in found.rows:
        top1 = {budget: row.top1(budget) for budget in found.budgets}
        lost = {budget: row.lost_nats(budget) for budget in found.budgets}
        rows.append(
            {
                "name": row.name,
                "top1": {b: None if s is None else s.value for b, s in top1.items()},
                "standard_error": {b: None if s is None else s.standard_error for b, s in top1.items()},
                "lost_nats": {b: None if s is None else s.value for b, s in lost.items()},
                "lost_nats_error": {b: None if s is None else s.standard_error for b, s in lost.items()},
                "sqnr_db": {budget: dict(by_output) for budget, by_output in row.sqnr_db.items()},
                "correlation": row.correlation,
                "correlation_error": row.correlation_error,
                "rank_correlation": row.rank_correlation,
                "cpu_seconds": row.cpu_seconds,
                "images": row.images,
                "bits": {budget: dict(allocation.bits) for budget, allocation in row.allocations.items()},
            }
        )
    return {
        "float_top1": None if math.isnan(found.float_top1) else found.float_top1,
        "evaluation_samples": found.evaluation_samples,
        "leader": found.leader.name,
        "recommended": found.recommended.name,
        "indistinguishable": found.indistinguishable(),
        "rows": rows,
    }

"""The commands ``infoq-fx score``, the slow step, and ``infoq-fx allocate``, which needs only its scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infoq_fx.cli.application import Result, check_output, command
from infoq_fx.cli.inputs import make_workers, prepare_model, read_samples
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
    Recovery,
    Resize,
    Samples,
    Seed,
    SizeBytesLimit,
    Std,
    Tie,
    WeightBitsLimit,
    Weights,
    Workers,
    read_limits,
    read_pins,
)


@command
def score(
    ctx: typer.Context,
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="The table of scores to write, JSON.")],
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
    recovery: Recovery = "fast",
    ignore: Ignore = None,
    outputs: Outputs = None,
    pin: Pin = None,
    tie: Tie = None,
    levels: LevelsOption = "auto",
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
    """Score every layer at every bit-width. This is the slow step; its table can be used with any budget.

    Next:  infoq-fx allocate scores.json --budget 4 -o allocation.json
    """
    from infoq_fx import api
    from infoq_fx.recovery.ladder import find_steps
    from infoq_fx.scoring.criteria import find_criterion

    check_output(output)
    find_criterion(criterion, seed)
    steps = find_steps(recovery.split(",") if "," in recovery else recovery, seed)
    read = read_samples(ctx.params)
    prepared = prepare_model(ctx.params, read)
    with make_workers(workers) as executor:
        table = api.score(
            prepared,
            read,
            criterion=criterion,
            recovery=steps,
            seed=seed,
            executor=executor,
            cache_dir=cache_dir,
            memory_limit=memory_limit,
            progress=progress,
        )
    table.save(output)
    values = {name: {str(b): s.value for b, s in by_bits.items()} for name, by_bits in table.scores.items()}
    advice = f"wrote {output}; next: infoq-fx allocate {output} --budget 4 -o allocation.json"
    return Result(text=f"{table}\n{advice}", document={"criterion": table.criterion, "scores": values}, output=output)


@command
def allocate(
    ctx: typer.Context,
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="A table of scores from infoq-fx score.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The allocation to write, JSON; by default it is printed.")
    ] = None,
    budget: WeightBitsLimit = None,
    compression: CompressionLimit = None,
    size_bytes: SizeBytesLimit = None,
    bitops: BitopsLimit = None,
    activation_bytes: ActivationBytesLimit = None,
    alpha: Alpha = 1.0,
    pin: Pin = None,
    config: Config = None,
    json_output: Json = False,
    debug: Debug = False,
) -> Result:
    """Find the bit-width of every layer under a budget. This takes milliseconds and needs no model.

    Next:  infoq-fx quantize MODEL DATA --allocation allocation.json -o model.onnx
    """
    import infoq_fx.allocation.solver
    from infoq_fx.allocation.allocation_file import describe_allocation, save_allocation
    from infoq_fx.allocation.summary import summarize_allocation
    from infoq_fx.table import SensitivityTable

    limits = read_limits(budget, compression, size_bytes, bitops, activation_bytes)
    table = SensitivityTable.load(scores)
    found = infoq_fx.allocation.solver.allocate(table, limits, alpha=alpha, pin=read_pins(pin))
    text = str(summarize_allocation(found, table.inventory))
    if output is not None:
        save_allocation(found, check_output(output))
        text += f"\nwrote {output}"
    return Result(text=text, document=describe_allocation(found), output=output)

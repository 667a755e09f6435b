"""The command line: ``infoq-fx demo`` and ``infoq-fx quantize``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from infoq_fx.errors import InfoqError, OptionError

__all__ = ["app", "main"]

app = typer.Typer(
    name="infoq-fx",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Bit-widths by information flow: quantize a trained network and write a QDQ ONNX file.",
)


@app.command()
def demo(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Keep the ONNX file here.")] = None,
    budget: Annotated[float, typer.Option(help="Mean weight bit-width.")] = 3.0,
) -> None:
    """Train a small network on handwritten digits, quantize it, export it and run it. Nothing is downloaded."""
    from infoq_fx.demo import run_demo
    from infoq_fx.quantized import summarize

    with tempfile.TemporaryDirectory() as folder:
        result = run_demo(output or Path(folder) / "digits.onnx", budget=budget)
    typer.echo(summarize(result.allocation, result.prepared.inventory))
    typer.echo("\n                              top-1 of unseen digits, %   file bytes")
    for name, top1, size in (
        ("float32", result.float_top1, result.float_bytes),
        (f"uniform {int(budget)} bits", result.uniform_top1, result.uniform_bytes),
        (f"InfoQ, a mean of {budget:g} bits", result.quantized_top1, result.onnx_bytes),
        ("the same in onnxruntime", result.onnx_top1, result.onnx_bytes),
    ):
        typer.echo(f"{name:<28}  {top1:25.1f}  {size:11,}")
    if output is not None:
        typer.echo(f"wrote {output}")


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="An exported .pt2 file, or package.module:callable.")],
    data: Annotated[Path, typer.Argument(help="An .npz file (x, and y if there are labels) or an image folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")],
    budget: Annotated[float | None, typer.Option(help="Mean weight bit-width.")] = None,
    compression: Annotated[float | None, typer.Option(help="Against float32 weights, at least.")] = None,
    size_bytes: Annotated[float | None, typer.Option(help="Bytes of all parameters, at most.")] = None,
    bitops: Annotated[float | None, typer.Option(help="BitOps of one sample, at most.")] = None,
    activation_bytes: Annotated[float | None, typer.Option(help="Bytes of activations, at most.")] = None,
    bits: Annotated[str, typer.Option(help="Candidate bit-widths of weights.")] = "2,3,4,5,6,7,8",
    activation_bits: Annotated[str, typer.Option(help="Bit-widths of activations; several are searched.")] = "8",
    recovery: Annotated[str, typer.Option(help="none, fast or best; or names of steps, with commas.")] = "fast",
    report: Annotated[
        Path | None, typer.Option(help="Write a page here, with a slider over budgets; needs infoq-fx[report].")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples, at most.")] = 1024,
    image_size: Annotated[int, typer.Option(help="Side of the square the images are cropped to.")] = 224,
    ignore: Annotated[list[str] | None, typer.Option(help="Glob on module paths to leave in float.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Keep every finished score here; the next run goes on.")
    ] = None,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Quantize a trained model under a budget and write it as ONNX."""
    from infoq_fx import api
    from infoq_fx.model_files import load_model, load_samples
    from infoq_fx.onnx_export import export_onnx
    from infoq_fx.quantized import summarize
    from infoq_fx.recovery import find_steps
    from infoq_fx.report import write_report
    from infoq_fx.spec import Budget

    limits = Budget(
        weight_bits=budget,
        compression=compression,
        size_bytes=size_bytes,
        bitops=bitops,
        activation_bytes=activation_bytes,
    )
    find_steps(recovery.split(","))
    loaded = load_model(model)
    calibration = load_samples(data, limit=samples, image_size=image_size)
    prepared = api.prepare(
        loaded,
        calibration,
        bits=_bit_list(bits, "--bits"),
        activation_bits=_bit_list(activation_bits, "--activation-bits"),
        ignore=ignore or (),
        device=device,
        budget=limits,
    )
    try:
        table = api.score(prepared, calibration, seed=seed, cache_dir=cache_dir, progress=progress)
    except KeyboardInterrupt as interrupt:
        message = str(interrupt).replace("the same call with cache_dir=", "the same command with --cache-dir ")
        typer.echo(f"interrupted: {message}", err=True)
        raise typer.Exit(130) from None
    allocation = api.refine(prepared, table, limits, calibration)
    better = api.recover(prepared, allocation, calibration, recovery.split(","), cache_dir=cache_dir, progress=progress)
    export_onnx(api.convert(better, allocation), output)
    typer.echo(summarize(allocation, prepared.inventory))
    typer.echo(f"wrote {output} ({output.stat().st_size:,} bytes)")
    if report is not None:
        write_report(table, report, allocation=allocation)
        typer.echo(f"wrote {report} ({report.stat().st_size:,} bytes)")


def main() -> None:
    """Run the command line; an error of this package is one paragraph and exit code 1."""
    try:
        app()
    except InfoqError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


def _bit_list(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError(f"{option} is {text!r}; give bit-widths with commas between, as 2,4,8") from error

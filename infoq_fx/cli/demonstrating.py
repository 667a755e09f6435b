"""``infoq-fx demo``: the whole route on data that the package brings along."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from infoq_fx.cli.application import Result, check_output, command
from infoq_fx.cli.options import Config, Debug, Json, Progress


@command
def demo(
    ctx: typer.Context,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Keep the ONNX file here.")] = None,
    budget: Annotated[float, typer.Option(help="Mean weight bit-width.")] = 3.0,
    config: Config = None,
    progress: Progress = True,
    json_output: Json = False,
    debug: Debug = False,
) -> Result:
    """Train a small network on handwritten digits, quantize it, export it and run it. Nothing is downloaded."""
    from infoq_fx.allocation.summary import summarize_allocation
    from infoq_fx.demo import run_demo

    if output is not None:
        check_output(output)
    with tempfile.TemporaryDirectory() as folder:
        result = run_demo(output or Path(folder) / "digits.onnx", budget=budget, progress=progress)
    lines = [
        str(summarize_allocation(result.allocation, result.prepared.inventory)),
        "\n                              top-1 of unseen digits, %   file bytes",
    ]
    rows = (
        ("float32", result.float_top1, result.float_bytes),
        (f"uniform {int(budget)} bits", result.uniform_top1, result.uniform_bytes),
        (f"InfoQ, a mean of {budget:g} bits", result.quantized_top1, result.onnx_bytes),
        ("the same in onnxruntime", result.onnx_top1, result.onnx_bytes),
    )
    lines += [f"{name:<28}  {top1:25.1f}  {size:11,}" for name, top1, size in rows]
    if output is not None:
        lines.append(f"wrote {output}")
    document = {"bits": dict(result.allocation.bits), "rows": [dict(zip(_KEYS, row, strict=True)) for row in rows]}
    return Result(text="\n".join(lines), document=document, output=output)


_KEYS = ("name", "top1", "file_bytes")

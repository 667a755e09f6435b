"""The command ``infoq-fx demo``, which runs the whole pipeline on scikit-learn's digits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infoq_fx.cli.application import Result, check_output_folder, command
from infoq_fx.cli.options import Config, Debug, Json, Progress
from infoq_fx.errors import MissingExtraError

_KEYS = ("name", "top1", "file_bytes")


@command
def demo(
    ctx: typer.Context,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the results; files of an earlier demo are overwritten.")
    ] = Path("infoq-demo"),
    budget: Annotated[float, typer.Option(help="Mean weight bit-width.")] = 3.0,
    config: Config = None,
    progress: Progress = True,
    json_output: Json = False,
    debug: Debug = False,
) -> Result:
    """Train a small network on handwritten digits, quantize it, export it and run it, without any download.

    The ONNX file, the table of scores, a page with a slider over budgets and the options are written to a folder.
    """
    from infoq_fx import allocation_of, summarize
    from infoq_fx.demo import run_demo
    from infoq_fx.report.page import write_report

    folder = check_output_folder(output)
    result = run_demo(folder, budget=budget, progress=progress)
    rows = (
        ("float32", result.float_top1, result.float_bytes),
        (f"uniform {int(budget)} bits", result.uniform_top1, result.uniform_bytes),
        (f"InfoQ, a mean of {budget:g} bits", result.quantized_top1, result.onnx_bytes),
        ("the same in onnxruntime", result.onnx_top1, result.onnx_bytes),
    )
    lines = [str(summarize(result.quantized)), "\n                                top-1 on test digits, %   file bytes"]
    lines += [f"{name:<28}  {top1:25.1f}  {size:11,}" for name, top1, size in rows]
    lines += [
        "",
        f"Results in {folder}/:",
        "  digits.onnx    the quantized network",
        "  scores.json    the table of scores",
    ]
    try:
        write_report(result.quantized, folder / "report.html")
        lines.append("  report.html    a page with a slider over budgets, to open in a browser")
    except MissingExtraError as error:
        lines.append(f"  no report.html: {error}")
    lines += [
        "  settings.toml  the options of this run",
        f"Next: infoq-fx allocate {folder / 'scores.json'} --budget 2.5",
    ]
    bits = dict(allocation_of(result.quantized).bits)
    document = {"bits": bits, "rows": [dict(zip(_KEYS, row, strict=True)) for row in rows]}
    return Result(text="\n".join(lines), document=document, output=folder, settings=folder / "settings.toml")

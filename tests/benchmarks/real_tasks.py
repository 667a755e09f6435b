"""Mixed precision on four real tasks beside uniform bits: detection, super-resolution, keywords, a language model.

    python tests/benchmarks/real_tasks.py [fastestdet imdn kws stories] [--bits 4 3] [--data FOLDER]
        [--epochs 0] [--learning-rate 0.01] [--feature-weight 0] [--augment]

Weights at the mean given, activations at 8 bits, the default options of ``quantize()``; calibrated on one split,
measured on another. Each line: the field's metric in float, at uniform bits with the same recovery, and with
infoq_fx, with the paired difference between the latter two and its standard error over samples where the metric has
one; CPU seconds of ``quantize()`` on one thread. With ``--epochs``, what finetuning for so many epochs on the same
samples, without labels, then makes of it, with the paired difference to before. The models and data are in a folder
that is not part of the project.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import infoq_fx

DATA = Path(__file__).parents[3] / "shared" / "data"


@dataclass(frozen=True)
class Task:
    """A model with its data; ``measure`` gives the metric and, where there is one, its value for each sample."""

    model: nn.Module
    calibration: Any
    measure: Callable[[nn.Module], tuple[float, Tensor | None]]


def load_task(rt: Any, name: str) -> Task:
    """The task of a name, by the module ``real_tasks``."""
    if name == "fastestdet":
        images, boxes = rt.coco128("val")
        return Task(
            rt.fastestdet(),
            rt.coco128("train")[0],
            lambda m: (rt.average_precision_50(rt.decode(rt.batched(m, images)), boxes), None),
        )
    if name in ("imdn", "imdn_bsd68"):
        pairs = rt.set5() if name == "imdn" else [(a[None], b[None]) for a, b in zip(*rt.bsd68("test"), strict=True)]

        def psnr(model: nn.Module) -> tuple[float, Tensor]:
            with torch.no_grad():
                each = torch.tensor([rt.psnr_y(model(low), high) for low, high in pairs])
            return float(each.mean()), each

        return Task(rt.imdn_x4(), rt.bsd68("calibration")[0], psnr)
    if name == "kws":
        features, labels = rt.kws01("test")

        def top1(model: nn.Module) -> tuple[float, Tensor]:
            hits = 100 * (rt.batched(model, features).argmax(1) == labels).double()
            return float(hits.mean()), hits

        return Task(rt.kws_ds_cnn(), rt.kws01("calibration")[0], top1)
    tokens = rt.tinystories("test")
    return Task(rt.stories260k(), rt.tinystories("train"), lambda m: (float(rt.loss_per_token(m, tokens)), None))


def run(name: str, task: Task, bits: float, finetuning: dict[str, Any]) -> None:
    """Quantize at a mean bit-width and uniformly, and print a line; another one of finetuning."""
    start = time.process_time()
    quantized = infoq_fx.quantize(task.model, bits, calibration_data=task.calibration, progress=False)
    seconds = time.process_time() - start
    uniform = infoq_fx.quantize(task.model, bits, calibration_data=task.calibration, bits=int(bits), progress=False)
    (in_float, _), (even, each_even), (mixed, each_mixed) = (task.measure(m) for m in (task.model, uniform, quantized))
    paired = describe_difference(each_mixed, each_even)
    found = infoq_fx.allocation_of(quantized)
    mean = found.cost.weight_bits if found.cost is not None else float("nan")
    print(
        f"{name} {bits:g} bits ({mean:.2f}): float {in_float:.3f}, uniform {even:.3f}, infoq_fx {mixed:.3f}{paired}, "
        f"{seconds:.0f} s",
        flush=True,
    )
    if not finetuning["epochs"]:
        return
    start = time.process_time()
    tuned = infoq_fx.finetune(quantized, task.calibration, progress=False, **finetuning)
    seconds = time.process_time() - start
    metric, each = task.measure(tuned)
    shown = ", ".join(f"{option} {value}" for option, value in finetuning.items())
    print(f"  finetuned ({shown}) {metric:.3f}{describe_difference(each, each_mixed)}, {seconds:.0f} s", flush=True)


def describe_difference(each: Tensor | None, before: Tensor | None) -> str:
    """The mean difference of a metric over samples, and its standard error."""
    if each is None or before is None:
        return ""
    difference = each - before
    error = float(difference.std()) / len(difference) ** 0.5
    return f", paired {float(difference.mean()):+.3f} +- {error:.3f}"


def main() -> None:
    """Run the tasks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=["fastestdet", "imdn", "kws", "stories"])
    parser.add_argument("--bits", nargs="+", type=float, default=[4.0, 3.0])
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--feature-weight", type=float, default=0.0)
    parser.add_argument("--augment", action="store_true")
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    if not (options.data / "real_tasks.py").is_file():
        raise SystemExit(f"no real_tasks.py in {options.data}; give the folder of models and data by --data")
    sys.path.insert(0, str(options.data))
    torch.set_num_threads(1)
    rt = importlib.import_module("real_tasks")
    finetuning = {name: getattr(options, name) for name in ("epochs", "learning_rate", "feature_weight")}
    finetuning |= {"augment": "images"} if options.augment else {}
    for name in options.tasks:
        task = load_task(rt, name)
        for bits in options.bits:
            run(name, task, bits, finetuning)


if __name__ == "__main__":
    main()

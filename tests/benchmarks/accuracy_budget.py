"""The smallest model that loses no more than a tolerance, on five networks, and what it loses on samples it never saw.

    python tests/benchmarks/accuracy_budget.py [resnet20] [mobilenet_v2] [fastestdet] [imdn] [stories]
                                               [--data FOLDER] [--cache-dir FOLDER]

Each line: the tolerance; bytes reached, and in percent of 8 bits; what is lost on the validation samples and on
unseen ones, each with its paired standard error; steps; CPU seconds of the call with its scores in the cache, and their
ratio to those of one ``quantize()`` at a mean of 4 bits on the samples that are left to calibrate with, which scores
too, and of another one that finds its scores in the cache. One thread. ResNet-20 and MobileNetV2 have 500 images to
calibrate and validate with and 500 unseen ones; the other tasks have the samples of their files. The models and data
are in a folder that is not part of the project.
"""

from __future__ import annotations

import argparse
import importlib
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import infoq_fx
from infoq_fx.allocation.cost import measure_cost
from infoq_fx.conversion.quantized import provenance_of
from infoq_fx.core.data import read_data
from infoq_fx.tolerance.measurement import jackknife_error

DATA = Path(__file__).parents[3] / "shared" / "data"
GROUPS = 20


@dataclass(frozen=True)
class Task:
    """A model and its samples: ``measure(model, rows)`` is a metric over some of the unseen ones, larger is better."""

    model: nn.Module
    samples: Any
    tolerances: tuple[infoq_fx.Tolerance, ...]
    unseen: int
    measure: Callable[[nn.Module], Callable[[Tensor], float]]
    metric: Callable[[Any, Tensor | None], float] | None = None
    validation: Any = None
    bits: dict[str, Any] = field(default_factory=dict)  # candidates, if not the default ones


def load_resnet20() -> Task:
    """ResNet-20 on CIFAR-10."""
    real = importlib.import_module("real_models")
    images, labels = real.cifar10("train")
    test = real.cifar10("test")
    rows, other = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:500], slice(0, 500)
    return _classification(real.cifar_resnet20(), (images[rows], labels[rows]), (test[0][other], test[1][other]), 0.5)


def load_mobilenet_v2() -> Task:
    """MobileNetV2 on ImageNet."""
    real = importlib.import_module("real_models")
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).tolist()
    parts = real.imagenet_sample(order[:500]), real.imagenet_sample(order[500:])
    return _classification(real.imagenet_mobilenet_v2(), *parts, 1.0)


def _classification(model: nn.Module, seen: Any, unseen: Any, drop: float) -> Task:
    images, labels = unseen

    def measure(module: nn.Module) -> Callable[[Tensor], float]:
        hits = 100 * (run(module, images).argmax(1) == labels).double()
        return lambda rows: float(hits[rows].mean())

    tolerances = tuple(infoq_fx.Tolerance(drop=x) for x in (drop, 2 * drop))
    return Task(model, seen, tolerances, len(labels), measure)


def load_fastestdet() -> Task:
    """FastestDet: AP50 in points; boxes are labels, padded by rows of -1."""
    rt = importlib.import_module("real_tasks")

    def pad(boxes: list[Tensor]) -> Tensor:
        most = max(map(len, boxes))
        return torch.stack([nn.functional.pad(x, (0, 0, 0, most - len(x)), value=-1.0) for x in boxes])

    def ap50(outputs: Any, labels: Tensor | None) -> float:
        assert labels is not None
        boxes = [x[x[:, 0] >= 0] for x in labels]
        return 100 * float(rt.average_precision_50(rt.decode(outputs), boxes))

    images, boxes = rt.coco128("train")
    unseen, truth = rt.coco128("val")
    wanted = pad(truth)

    def measure(module: nn.Module) -> Callable[[Tensor], float]:
        found = run(module, unseen)
        return lambda rows: ap50(tuple(x[rows] for x in found), wanted[rows])

    half = images[::2], pad(boxes[::2])
    return Task(
        rt.fastestdet(),
        [half],
        (infoq_fx.Tolerance(drop=1.0),),
        len(unseen),
        measure,
        ap50,
        [(images[1::2], pad(boxes[1::2]))],
    )


def load_imdn() -> Task:
    """IMDN: PSNR of the luma in dB; half of the photographs with large versions validate, the other half is unseen."""
    rt = importlib.import_module("real_tasks")
    low, high = rt.bsd68("test")

    def psnr(outputs: Any, labels: Tensor | None) -> float:
        return float(rt.psnr_y(outputs, labels))

    def measure(module: nn.Module) -> Callable[[Tensor], float]:
        found = run(module, low[1::2], 1)
        return lambda rows: psnr(found[rows], high[1::2][rows])

    return Task(
        rt.imdn_x4(),
        rt.bsd68("calibration")[0],
        (infoq_fx.Tolerance(drop=0.1),),
        len(low[1::2]),
        measure,
        psnr,
        [(low[::2], high[::2])],
        {"bits": (*range(2, 9), 16), "activation_bits": (8, 16)},  # 8 bits lose 0.12 dB
    )


def load_stories() -> Task:
    """stories260K: nats that are lost in each token's distribution; the loss per token on unseen stories."""
    rt = importlib.import_module("real_tasks")
    tokens = rt.tinystories("test")

    def measure(module: nn.Module) -> Callable[[Tensor], float]:
        each = torch.tensor([rt.loss_per_token(module, row[None]) for row in tokens])
        return lambda rows: -float(each[rows].mean())

    return Task(rt.stories260k(), rt.tinystories("train"), (infoq_fx.Tolerance(nats=0.02),), len(tokens), measure)


TASKS = {
    "resnet20": load_resnet20,
    "mobilenet_v2": load_mobilenet_v2,
    "fastestdet": load_fastestdet,
    "imdn": load_imdn,
    "stories": load_stories,
}


def run(module: nn.Module, inputs: Tensor, size: int = 16) -> Any:
    """All outputs of a module, a tensor or a tuple of them."""
    with torch.no_grad():
        parts = [module(batch) for batch in inputs.split(size)]
    return torch.cat(parts) if isinstance(parts[0], Tensor) else tuple(map(torch.cat, zip(*parts, strict=True)))


def lose(task: Task, quantized: nn.Module) -> tuple[float, float]:
    """The drop on the unseen samples, and its error by leaving out each of 20 groups."""
    before, after = task.measure(task.model), task.measure(quantized)
    every = torch.arange(task.unseen)
    kept = [every[every % GROUPS != group] for group in range(min(GROUPS, task.unseen))]
    error = jackknife_error([before(rows) - after(rows) for rows in kept])
    return before(every) - after(every), math.nan if error is None else error


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a call and its CPU seconds."""
    start = time.process_time()
    return call(), time.process_time() - start


def run_task(name: str, task: Task, folder: Path) -> None:
    """Search for each tolerance and print a line."""
    # One quantize() on the samples that are left to calibrate with, at first without scores, then with them.
    held = read_data(task.samples)
    fitted = held if task.validation is not None else held.hold_back_half()[0]
    shared: dict[str, Any] = {"cache_dir": folder / name, "progress": False, **task.bits}
    first, scoring = timed(lambda: infoq_fx.quantize(task.model, 4.0, calibration_data=fitted, **shared))
    _, cached = timed(lambda: infoq_fx.quantize(task.model, 4.0, calibration_data=fitted, **shared))
    provenance = provenance_of(first)
    assert provenance is not None
    assert provenance.inventory is not None
    even = measure_cost(provenance.inventory, {site.name: 8 for site in provenance.inventory.sites}).size_bytes
    judging = {"metric": task.metric, "validation_data": task.validation}
    for tolerance in task.tolerances:
        steps = folder / name / "tolerance"
        shutil.rmtree(steps, ignore_errors=True)  # another tolerance would share steps
        try:
            quantized, seconds = timed(
                lambda sought=tolerance: infoq_fx.quantize(
                    task.model, sought, calibration_data=task.samples, **judging, **shared
                )
            )
        except infoq_fx.InfeasibleBudgetError as error:
            print(f"{name}: {error}", flush=True)
            continue
        found, taken = infoq_fx.allocation_of(quantized), len(list(steps.glob("*.json")))
        assert found.cost is not None
        dropped, error_of_drop = lose(task, quantized)
        size = found.cost.size_bytes
        print(
            f"{name}, {tolerance.measure} {tolerance.limit:g}: {size:,} bytes ({100 * size / even:.0f} % of 8 bits, "
            f"{found.cost.weight_bits:.2f} bits a weight); {found.loss}; unseen {dropped:.2g} +- {error_of_drop:.1g} "
            f"on {task.unseen}; {taken} steps, {seconds:.0f} s: {seconds / scoring:.1f} times one quantize() "
            f"({scoring:.0f} s), {seconds / cached:.1f} times one with its scores in the cache ({cached:.0f} s)",
            flush=True,
        )


def main() -> None:
    """Run the tasks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cache-dir", type=Path)
    options = parser.parse_args()
    if not (options.data / "real_tasks.py").is_file():
        raise SystemExit(f"no real_tasks.py in {options.data}; give the folder of models and data by --data")
    sys.path.insert(0, str(options.data))
    torch.set_num_threads(1)
    for name in options.tasks:
        with tempfile.TemporaryDirectory() as folder:
            run_task(name, TASKS[name](), options.cache_dir or Path(folder))


if __name__ == "__main__":
    main()

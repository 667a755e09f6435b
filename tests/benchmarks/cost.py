"""What ``quantize()`` costs, in float forward passes of the calibration samples, and the memory that it takes.

    python tests/benchmarks/cost.py [mobilenet_v2 resnet20 vit fastestdet imdn kws stories resnet50 vit_b_16]
        [--bits 4] [--samples N] [--device cuda]

One line for each model: passes in all and for each stage, CPU seconds of one pass (of the module as it is, eager, one
thread), and the peak of resident memory above that with model, libraries and data loaded. On a GPU a pass and the
stages are seconds of wall time. ``resnet50``, ``vit_b_16`` and ``random_mobilenet_v2`` have random weights and random
images; the others need the folder of models and data that is not part of the project. Each model runs in a process of
its own.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision
from real_models import load_case, load_real_models
from real_tasks import DATA, load_task
from torch import Tensor, nn

import infoq_fx
from infoq_fx import api, pipeline

BITS = {"resnet20": 3.0}
RANDOM = ("resnet50", "vit_b_16", "random_mobilenet_v2")
BATCH = 16  # samples of a forward pass; more are slower on a CPU
STAGES = {
    "prepare": "prepare",
    "score": "measure_sensitivity",
    "refine": "choose_allocation",
    "recover": "recover_accuracy",
    "convert": "convert_prepared",
}


def load(name: str, folder: Path) -> tuple[nn.Module, Tensor]:
    """A model, and calibration samples."""
    if name in RANDOM:
        torch.manual_seed(0)
        count = 256 if name == "vit_b_16" else 512
        model: nn.Module = getattr(torchvision.models, name.removeprefix("random_"))(weights=None)
        return model.eval(), torch.randn(count, 3, 224, 224)
    if name in ("mobilenet_v2", "resnet20", "vit"):
        model, (images, _), _ = load_case(load_real_models(folder / "real_models.py"), name, 0)
        return model.eval(), images
    task = load_task(load_real_models(folder / "real_tasks.py"), name)
    return task.model.eval(), task.calibration


def clock(device: str) -> float:
    """CPU seconds of the process; on a GPU, wall time after all work is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure_pass(model: nn.Module, samples: Tensor, device: str) -> float:
    """Seconds of a float forward pass of all samples."""
    batch = BATCH if device == "cpu" else 256
    model = model.to(device)

    def run() -> float:
        start = clock(device)
        with torch.inference_mode():
            for part in samples.split(batch):
                model(part.to(device))
        return clock(device) - start

    if device != "cpu":
        run()
    return run()


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """Watch the resident memory; what is yielded returns its peak above the start, in GiB."""
    status, done = Path("/proc/self/statm"), threading.Event()
    page = 4096 / 2**30

    def read() -> int:  # without what is mapped from files, the data among it
        _, resident, shared, *_ = map(int, status.read_text().split())
        return resident - shared

    start = peak = read()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, read())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: (peak - start) * page
    finally:
        done.set()
        thread.join()


def time_stages(device: str) -> dict[str, float]:
    """Replace the stages of ``quantize()`` by ones that add up their seconds, in the dict that is returned."""
    seconds = dict.fromkeys(STAGES, 0.0)

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            start = clock(device)
            try:
                return function(*args, **options)
            finally:
                seconds[stage] += clock(device) - start

        return run

    for stage, name in STAGES.items():
        room = pipeline if hasattr(pipeline, name) else api
        setattr(room, name, timed(stage, getattr(room, name)))
    return seconds


def run_one(name: str, options: argparse.Namespace) -> None:
    """Measure a model and print its line."""
    model, samples = load(name, options.data)
    samples = samples if options.samples is None else samples[: options.samples]
    bits, device = options.bits or BITS.get(name, 4.0), options.device
    before = measure_pass(model, samples, device)
    model = model.cpu()
    seconds = time_stages(device)
    start = clock(device)
    with peak_memory() as peak:
        infoq_fx.quantize(model, bits, calibration_data=samples, device=device, progress=False)
    total = clock(device) - start
    one = (before + measure_pass(model, samples, device)) / 2  # machines that others use change their speed
    stages = ", ".join(f"{stage} {value / one:.1f}" for stage, value in seconds.items())
    print(
        f"{name} {bits:g} bits, {len(samples)} samples: {total / one:.1f} passes of {one:.2f} s ({stages}), "
        f"peak {peak():.2f} GiB",
        flush=True,
    )


def main() -> None:
    """Run each model that the command line names in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["mobilenet_v2", "resnet20"])
    parser.add_argument("--bits", type=float)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    if len(options.models) == 1:
        if options.device == "cpu":
            torch.set_num_threads(1)
        run_one(options.models[0], options)
        return
    for name in options.models:
        given = [argument for argument in sys.argv[1:] if argument not in options.models]
        subprocess.run([sys.executable, __file__, name, *given], check=True)


if __name__ == "__main__":
    main()

"""Nats lost on unseen images for several draws of the calibration images, against another version of the package.

    PYTHONPATH=OLD python tests/benchmarks/draws.py mobilenet_v2 --save before.pt
    python tests/benchmarks/draws.py mobilenet_v2 --against before.pt
        [--seeds 0 1 2] [--budgets 4 3 2.5] [--samples N] [--data FOLDER]

One line for each draw and budget: nats a sample and top-1 of ``quantize()`` with its default recovery and equal steps,
and CPU seconds on one thread; a draw's scores serve all its budgets. With ``--against``, the ratio of the nats and
their paired difference with its standard error, and the geometric mean of all ratios at the end. The models
(``resnet20 mobilenet_v2 vit``) and images are in a folder that is not part of the project.
"""

from __future__ import annotations

import argparse
import inspect
import math
import tempfile
import time
from pathlib import Path

import torch
from real_models import load_case, load_real_models
from real_tasks import DATA
from torch import Tensor, nn

import infoq_fx

_MOST_UNSEEN = 2000


def log_probabilities(module: nn.Module, images: Tensor) -> Tensor:
    """Of the classes, float64 ``[samples, classes]``."""
    with torch.no_grad():
        return torch.cat([module(part) for part in images.split(32)]).log_softmax(-1).double()


def measure(options: argparse.Namespace) -> dict[tuple[int, float], Tensor]:
    """Nats of every unseen image, by seed and budget."""
    has_levels = "levels" in inspect.signature(infoq_fx.quantize).parameters
    steps = {"levels": "uniform"} if has_levels else {}  # earlier versions have no others
    before = {} if options.against is None else torch.load(options.against)
    found = {}
    for seed in options.seeds:
        real = load_real_models(options.data / "real_models.py")
        model, (images, _), (unseen, labels) = load_case(real, options.model, seed)
        model, images = model.eval(), images[: options.samples]
        unseen, labels = unseen[:_MOST_UNSEEN], labels[:_MOST_UNSEEN]
        expected = log_probabilities(model, unseen)
        with tempfile.TemporaryDirectory() as folder:
            for budget in options.budgets:
                start = time.process_time()
                quantized = infoq_fx.quantize(
                    model, budget, calibration_data=images, cache_dir=folder, progress=False, **steps
                )
                seconds = time.process_time() - start
                log_q = log_probabilities(quantized, unseen)
                nats = found[seed, budget] = (expected.exp() * (expected - log_q)).sum(1)
                top1 = 100 * float((log_q.argmax(1) == labels).double().mean())
                line = f"{options.model} seed {seed}, {budget:g} bits: {float(nats.mean()):.4f} nats, top-1 {top1:.1f}"
                print(line + compare(nats, before.get((seed, budget))) + f", {seconds:.0f} s", flush=True)
    ratios = [math.log(float(x.mean() / before[key].mean())) for key, x in found.items() if key in before]
    if len(ratios) > 1:
        spread = float(torch.tensor(ratios).std()) / math.sqrt(len(ratios))
        print(f"{options.model}: {math.exp(sum(ratios) / len(ratios)):.3f} times, standard error {spread:.3f}")
    return found


def compare(nats: Tensor, before: Tensor | None) -> str:
    """The ratio to what was lost before, and the paired difference."""
    if before is None:
        return ""
    difference = nats - before
    error = float(difference.std()) / math.sqrt(len(difference))
    return f", {float(nats.mean() / before.mean()):.3f} times, paired {float(difference.mean()):+.4f} +- {error:.4f}"


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budgets", nargs="+", type=float, default=[4.0, 3.0, 2.5])
    parser.add_argument("--samples", type=int)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options)
    if options.save is not None:
        torch.save(found, options.save)


if __name__ == "__main__":
    main()

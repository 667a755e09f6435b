"""Compare ``refine="search"`` with plain refinement on pretrained models: nats on unseen images, and CPU time.

    python tests/benchmarks/search.py [resnet20] [vit] [mobilenet_v2] [--budgets 3 2.5] [--passes 150] [--seeds 2]
                                      [--cache-dir FOLDER]

Needs the models and images next to the project (``../shared/data/real_models.py``). Weights have 2 to 8 bits, with the
default recovery. The seed selects the calibration images. Differences are paired over the evaluation images.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch

import infoq_fx

sys.path.insert(0, str(Path(__file__).parent))
from real_models import load_case, load_real_models


def log_probabilities(module, images):
    with torch.no_grad():
        return torch.cat([module(batch) for batch in images.split(50)]).double().log_softmax(1)


def run_case(name, seed, arguments, case):
    model, calibration, (images, labels) = case
    reference, start = log_probabilities(model, images), time.process_time()
    prepared = infoq_fx.prepare(model, calibration)
    table = infoq_fx.score(prepared, calibration, cache_dir=arguments.cache_dir, progress=False)
    print(f"{name}, seed {seed}: prepare and score {time.process_time() - start:.0f} s CPU")
    for budget in arguments.budgets:
        cells, losses = [], []
        for passes in (0, arguments.passes):
            begin = time.process_time()
            allocation = infoq_fx.refine(prepared, table, budget, calibration, search_passes=passes)
            refined = time.process_time()
            quantized = infoq_fx.convert(
                infoq_fx.recover(prepared, allocation, calibration, progress=False), allocation
            )
            seconds = refined - begin, time.process_time() - refined
            found = log_probabilities(quantized, images)
            losses.append((reference.exp() * (reference - found)).sum(1))
            top1 = 100 * float((found.argmax(1) == labels).double().mean())
            cells.append(
                f"{losses[-1].mean():.4f} nats, top-1 {top1:.1f}, refine {seconds[0]:.0f} s, recover {seconds[1]:.0f} s"
            )
        change = losses[1] - losses[0]
        error = float(change.std()) / math.sqrt(len(change))
        print(f"{budget:g} bits: {cells[0]}; search: {cells[1]}; {change.mean():+.4f} +- {error:.4f} nats", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["resnet20"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[3.0, 2.5], help="mean weight bits")
    parser.add_argument("--passes", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--cache-dir")
    arguments = parser.parse_args()
    real = load_real_models()
    for name in arguments.models:
        for seed in range(arguments.seeds):
            run_case(name, seed, arguments, load_case(real, name, seed))


if __name__ == "__main__":
    main()

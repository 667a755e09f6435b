"""Measure how much accuracy recovery restores on pretrained models, and its cost.

    python tests/benchmarks/recovery.py [resnet20] [vit] [mobilenet_v2] [--budgets 4 3] [--seeds 1] [--bitops 3]
        [--recovery none fast best finetuned] [--bits 2 3 4 5 6 8] [--epochs 20] [--augment] [--levels uniform]
        [--learning-rate 0.01] [--feature-weight 0]
        [--cache-dir FOLDER]

Needs the models and images next to the project (``../shared/data/real_models.py``). The allocation is that of
``quantize()`` with this recovery; activations are at 8 bits; evaluation images are not used for calibration.
``finetuned`` continues from ``fast`` without labels, with --augment on crops and mixes of the images. --bitops adds
weights and activations of 2 to 8 bits searched together, under the BitOps of these uniform bits. With --cache-dir
scores and learned blocks are kept, of this benchmark and of ``audit.py``.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

import infoq_fx
from infoq_fx.allocation.cost import measure_cost

sys.path.insert(0, str(Path(__file__).parent))
from real_models import load_case, load_real_models, predict, top1

BUDGETS = {"resnet20": (3.0, 2.5, 2.25), "vit": (4.0, 3.0), "mobilenet_v2": (4.0, 3.0)}
RUNGS = ("none", "fast", "best", "finetuned")


def quantize_rung(rung, prepared, allocation, calibration, checkpoint, arguments):
    cache_dir, augment = arguments.cache_dir, "images" if arguments.augment else None
    images = calibration[0]
    start = "fast" if rung == "finetuned" else rung
    recovered = infoq_fx.recover(prepared, allocation, images, start, cache_dir=cache_dir, progress=False)
    quantized = infoq_fx.convert(recovered, allocation)
    if rung == "finetuned":
        options = dict(epochs=arguments.epochs, checkpoint=checkpoint, augment=augment, progress=False)
        rates = dict(learning_rate=arguments.learning_rate, feature_weight=arguments.feature_weight)
        quantized = infoq_fx.finetune(quantized, images, **options, **rates)
    return quantized


def run_case(name, seed, arguments, case):
    model, calibration, (images, labels) = case
    floating = top1(predict(model, images), labels)
    plain = dict(bits=arguments.bits, levels=arguments.levels)
    jobs = [(f"{b:g} bits", plain, b) for b in arguments.budgets or BUDGETS[name]]
    if arguments.bitops:
        both = dict(bits=arguments.bits, activation_bits=arguments.bits, levels="mirrored")
        jobs += [(f"BitOps of {bits} bits", both, bits) for bits in arguments.bitops]
    for label, options, budget in jobs:
        prepared = infoq_fx.prepare(model, calibration, **options)
        limit, allocations = uniform_bitops(prepared, budget) if "BitOps" in label else budget, {}
        for scored_for in {"none" if rung == "none" else "fast" for rung in arguments.recovery}:
            kept = dict(cache_dir=arguments.cache_dir, progress=False)
            table = infoq_fx.score(prepared, calibration, recovery=scored_for, **kept)
            allocations[scored_for] = infoq_fx.refine(prepared, table, limit, calibration, recovery=scored_for)
        folder = arguments.cache_dir and Path(arguments.cache_dir)
        checkpoint = folder and folder / f"{name}-{seed}-{label.replace(' ', '-')}-{arguments.epochs}-epochs.pt"
        cells = []
        for rung in arguments.recovery:
            allocation = allocations["none" if rung == "none" else "fast"]
            begin = time.process_time()
            quantized = quantize_rung(rung, prepared, allocation, calibration, checkpoint, arguments)
            seconds = time.process_time() - begin
            cells.append(f"{rung} {top1(predict(quantized, images), labels):.1f} ({seconds:.0f} s CPU)")
        print(f"{name}, seed {seed}, {label}: float {floating:.1f}, " + ", ".join(cells), flush=True)


def uniform_bitops(prepared, bits):
    uniform = {site.name: bits if site.is_searched else 8 for site in prepared.inventory.sites}
    return infoq_fx.Budget(bitops=measure_cost(prepared.inventory, uniform).bitops)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(BUDGETS))
    parser.add_argument("--budgets", type=float, nargs="+", help="mean weight bits; of all models")
    parser.add_argument("--recovery", nargs="+", default=list(RUNGS), choices=RUNGS)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8], help="candidate bit-widths")
    parser.add_argument("--epochs", type=int, default=20, help="of finetuning")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--bitops", type=int, nargs="+", default=[], help="also those of these uniform bits")
    parser.add_argument("--augment", action="store_true", help="the images of finetuning")
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--feature-weight", type=float, default=0.0)
    parser.add_argument("--levels", default="auto")
    parser.add_argument("--cache-dir")
    arguments = parser.parse_args()
    real = load_real_models()
    torch.manual_seed(0)
    for name in arguments.models:
        for seed in range(arguments.seeds):
            run_case(name, seed, arguments, load_case(real, name, seed))


if __name__ == "__main__":
    main()

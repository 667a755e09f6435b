"""Compare the kinds of levels on pretrained models: squared errors of weights, and nats and top-1 lost.

    python tests/benchmarks/codebooks.py [resnet20] [vit] [mobilenet_v2] [--budgets 4 3 2.5]
        [--levels uniform mirrored codebook] [--equal-bits]
    python tests/benchmarks/codebooks.py --errors

Needs the models and images next to the project (``../shared/data/real_models.py``). Default options of ``quantize()``,
one draw of the calibration images, nats on images that were not used for it, with paired differences. With --equal-bits
all weights have the bits of the budget. With --errors: the squared error of weights rounded to nearest, over that of
uniform levels, the geometric mean over layers.
"""

import argparse
import itertools
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn

import infoq_fx
from infoq_fx.quantization.numerics import fake_quantize
from infoq_fx.quantization.quantizers import spec_of
from infoq_fx.quantization.weight_qparams import choose_weight_qparams
from infoq_fx.types import QuantSite

sys.path.insert(0, str(Path(__file__).parent))
from real_models import load_case, load_real_models

MODELS = ("resnet20", "mobilenet_v2", "vit")


def compare_errors(model, bits, levels):
    ratios = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight, errors = module.weight.detach(), []
            for kind in (levels, "uniform"):
                site = QuantSite("weight", "weight", tuple(weight.shape), (bits,), 0, levels=kind)
                spec = spec_of(site, bits)
                found = fake_quantize(weight, choose_weight_qparams(weight, spec, 5))
                errors.append(float((found - weight).double().square().sum()))
            ratios.append(errors[0] / errors[1])
    return float(torch.tensor(ratios).log().mean().exp())


def run(module, images):
    with torch.no_grad():
        return torch.cat([module(batch) for batch in images.split(50)])


def lose(quantized, reference, images, labels):
    """Nats of every image, and top-1 in percent."""
    outputs, wanted = run(quantized, images).log_softmax(1), reference.log_softmax(1)
    nats = (wanted.exp() * (wanted - outputs)).sum(1)
    return nats, 100 * float((outputs.argmax(1) == labels).double().mean())


def choose(prepared, table, budget, calibration):
    """The allocation of the default options, or without scores the one that gives all weights the same bits."""
    if table is not None:
        return infoq_fx.refine(prepared, table, budget, calibration)
    sites = prepared.inventory.sites
    return infoq_fx.Allocation(bits={site.name: int(budget) if site.kind == "weight" else 8 for site in sites})


def run_case(name, arguments, case):
    model, calibration, (images, labels) = case
    reference = run(model, images)
    print(f"{name}, float {100 * float((reference.argmax(1) == labels).double().mean()):.1f}")
    found = {}
    for levels in arguments.levels:
        prepared = infoq_fx.prepare(model, calibration, levels=levels)
        table = None if arguments.equal_bits else infoq_fx.score(prepared, calibration, progress=False)
        for budget in arguments.budgets:
            start = time.process_time()
            allocation = choose(prepared, table, budget, calibration)
            recovered = infoq_fx.recover(prepared, allocation, calibration, progress=False)
            nats, top1 = lose(infoq_fx.convert(recovered, allocation), reference, images, labels)
            found[levels, budget] = nats
            error, seconds = float(nats.std() / len(nats) ** 0.5), time.process_time() - start
            print(f"  {levels} {budget:g} bits: {nats.mean():.4f} ± {error:.4f} nats, {top1:.1f} ({seconds:.0f} s CPU)")
    base, *others = arguments.levels
    for levels, budget in itertools.product(others, arguments.budgets):
        first, second = found[base, budget], found[levels, budget]
        change, error = second - first, float((second - first).std() / len(first) ** 0.5)
        times = float(second.mean() / first.mean())
        print(f"  {levels} {budget:g} bits: {times:.2f} times, {change.mean():+.4f} ± {error:.4f} nats")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--budgets", type=float, nargs="+", default=[4.0, 3.0, 2.5], help="mean weight bits")
    parser.add_argument("--levels", nargs="+", default=["uniform", "mirrored", "codebook"])
    parser.add_argument("--equal-bits", action="store_true", help="of all weights, without scores")
    parser.add_argument("--errors", action="store_true", help="of weights alone")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    real = load_real_models()
    for name in arguments.models:
        case = load_case(real, name, 0)
        if arguments.errors:
            for levels in ("mirrored", "codebook"):
                found = [f"{bits} bits {compare_errors(case[0], bits, levels):.2f}" for bits in range(2, 7)]
                print(f"{name}, {levels}: {', '.join(found)}")
        else:
            run_case(name, arguments, case)


if __name__ == "__main__":
    main()

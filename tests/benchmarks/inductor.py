"""Measure a quantized module compiled by Inductor: CPU time against the compiled float model, difference to eager.

    python tests/benchmarks/inductor.py [resnet20] [mobilenet_v2] [--batches 1 16] [--bits 4] [--seconds 4]

One thread. Runs of both models alternate, so that a busy machine slows both; times are medians. Differences to eager
are in steps of the output: the scale of the last layer's bias, which is the unit of its accumulator, and the scale of
8 bits over the outputs' range. Needs the models next to the project, see ``real_models.py``.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

import infoq_fx

sys.path.insert(0, str(Path(__file__).parent))
from real_models import load_real_models


def load_case(real, name):
    if name == "resnet20":
        return real.cifar_resnet20(), real.cifar10("train")[0][:128]
    return real.imagenet_mobilenet_v2(), real.imagenet_sample(range(64))[0]


def measure_milliseconds(calls, seconds):
    """Return the median CPU time of each call, alternating for ``seconds`` in total."""
    found = [[] for _ in calls]
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(found[0]) < 5:
        for times, call in zip(found, calls, strict=True):
            start = time.process_time()
            call()
            times.append(1000 * (time.process_time() - start))
    return [sorted(times)[len(times) // 2] for times in found]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["resnet20", "mobilenet_v2"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    real = load_real_models()
    print("model         batch  float ms  quantized ms  ratio  eager ms  8-bit output steps", flush=True)
    for name in options.models:
        model, images = load_case(real, name)
        prepared = infoq_fx.prepare(model, images, bits=options.bits)
        allocation = infoq_fx.Allocation(bits={s.name: s.bits[0] for s in prepared.inventory.sites})
        quantized = infoq_fx.convert(prepared, allocation)
        for batch in options.batches:
            torch._dynamo.reset()
            x = images[:batch].contiguous()
            with torch.no_grad():
                expected = quantized(x)
                compiled = [torch.compile(m, fullgraph=True, dynamic=False) for m in (model, quantized)]
                compiled[0](x)
                steps = float((compiled[1](x) - expected).abs().max()) / (float(expected.max() - expected.min()) / 255)
                calls = [lambda m=m, x=x: m(x) for m in (*compiled, quantized)]
                base, ours, eager = measure_milliseconds(calls, options.seconds)
            row = f"{name:<12}  {batch:5}  {base:8.2f}  {ours:12.2f}  {ours / base:5.2f}  {eager:8.2f}  {steps:19.3f}"
            print(row, flush=True)


if __name__ == "__main__":
    main()

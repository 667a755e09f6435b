"""Quantize pretrained models and print a table of accuracy and size.

    python tests/benchmarks/real_models.py [resnet20] [vit] [mobilenet_v2] [--bits 2 3 4 5 6 8] [--cache-dir FOLDER]

Needs the models and images next to the project (``../shared/data/real_models.py``). Weights are rounded to nearest
without recovery; activations are at 8 bits; evaluation images are not used for calibration. With the --cache-dir of
the benchmark ``audit.py``, nothing is scored again.
"""

import argparse
import importlib.util
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch

import infoq_fx

DATA = Path(__file__).parents[3] / "shared" / "data" / "real_models.py"
BUDGETS = (5.0, 4.0, 3.5, 3.0)
LEVELS = onnxruntime.GraphOptimizationLevel


def load_real_models(path=DATA):
    """Load the module that loads models and images; exit if it does not exist."""
    if not path.exists():
        sys.exit(f"the pretrained models are missing: no {path}")
    spec = importlib.util.spec_from_file_location("shared_real_models", path)
    real = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(real)
    return real


def load_case(real, name, seed):
    """Load a model, calibration samples selected by the seed, and evaluation samples."""
    generator = torch.Generator().manual_seed(seed)
    if name == "mobilenet_v2":
        order = torch.randperm(1000, generator=generator).tolist()
        return real.imagenet_mobilenet_v2(), real.imagenet_sample(order[:500]), real.imagenet_sample(order[500:])
    norms = () if name == "resnet20" else (real.CIFAR_MEAN, real.CIFAR_STD)
    (images, labels), test = real.cifar10("train", *norms), real.cifar10("test", *norms)
    rows = torch.randperm(len(images), generator=generator)[:1024]
    return (real.cifar_resnet20() if name == "resnet20" else real.cifar_vit()), (images[rows], labels[rows]), test


def top1(predictions, labels):
    return 100 * float((predictions == labels).double().mean())


def predict(module, images):
    with torch.no_grad():
        return torch.cat([module(batch).argmax(1) for batch in images.split(50)])


def predict_onnx(path, images, level):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    logits = [session.run(None, {name: batch.numpy()})[0] for batch in images.split(50)]
    return torch.from_numpy(np.concatenate(logits)).argmax(1)


def run_case(name, case, bits, cache_dir):
    model, calibration, evaluation = case
    prepared = infoq_fx.prepare(model, calibration, bits=bits)
    start = time.process_time()
    table = infoq_fx.score(prepared, calibration, recovery="none", cache_dir=cache_dir, progress=False)
    print(f"\n{name}: score {time.process_time() - start:.0f} s CPU")
    images, labels = evaluation
    print(f"  float top-1 {top1(predict(model, images), labels):.1f} on {len(labels)} images")
    print("  mean bits | InfoQ | uniform | onnxruntime, off | agrees | onnxruntime, default | agrees | file bytes")
    with tempfile.TemporaryDirectory() as folder:
        for budget in BUDGETS:
            allocation = infoq_fx.refine(prepared, table, budget, calibration, recovery="none")
            run_budget(prepared, allocation, budget, evaluation, Path(folder) / "model.onnx")


def run_budget(prepared, allocation, budget, evaluation, path):
    images, labels = evaluation
    quantized = infoq_fx.convert(prepared, allocation)
    ours = predict(quantized, images)
    uniform = ""
    known = {bits for site in prepared.inventory.sites if site.kind == "weight" for bits in (*site.bits, 8)}
    if budget in known:
        bits = {s.name: int(budget) if s.kind == "weight" else 8 for s in prepared.inventory.sites}
        uniform = f"{top1(predict(infoq_fx.convert(prepared, infoq_fx.Allocation(bits=bits)), images), labels):.1f}"
    infoq_fx.export_onnx(quantized, path)
    found = [predict_onnx(path, images, level) for level in (LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_ALL)]
    cells = [f"{budget:9g}", f"{top1(ours, labels):5.1f}", f"{uniform:>7}"]
    for column, predictions in zip((16, 20), found, strict=True):
        cells += [f"{top1(predictions, labels):{column}.1f}", f"{top1(predictions, ours):6.1f}"]
    print("  " + " | ".join([*cells, f"{path.stat().st_size:,}"]), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["resnet20", "vit", "mobilenet_v2"])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 7, 8], help="candidate bit-widths")
    parser.add_argument("--cache-dir")
    arguments = parser.parse_args()
    real = load_real_models()
    torch.manual_seed(0)
    for name in arguments.models:
        run_case(name, load_case(real, name, 0), arguments.bits, arguments.cache_dir)


if __name__ == "__main__":
    main()

"""Quantize a trained model to a mixed-precision ONNX file, in one call and then in stages.

Run it:  python examples/quickstart.py

The network and its data are small and come with the package, so that this takes seconds. Use your own model and loader
instead.
"""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch.utils.data import DataLoader, TensorDataset

import infoq_fx
from infoq_fx.demo import digits, train_digits_net

# A trained model and a loader of (inputs, labels). About 1,000 samples are enough; labels are optional.
(images, labels), (test_images, test_labels) = digits()
model = train_digits_net(images, labels, epochs=10)
loader = DataLoader(TensorDataset(images[:512], labels[:512]), batch_size=64)


def top1(logits):
    return 100 * (torch.as_tensor(logits).argmax(1) == test_labels).double().mean().item()


with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    # 1. One call: a mean of 3 bits per weight, activations at 8 bits.
    quantized = infoq_fx.quantize(model, 3.0, calibration_data=loader, progress=False)
    path = infoq_fx.export_onnx(quantized, Path(folder) / "digits.onnx")
    session = onnxruntime.InferenceSession(path)
    print(f"float {top1(model(test_images)):.1f} %, quantized {top1(quantized(test_images)):.1f} %,", end=" ")
    print(f"in onnxruntime {top1(session.run(None, {'x': test_images.numpy()})[0]):.1f} %")

    # 2. The same in stages. Scoring is the slow step; its table is saved and works with any budget.
    prepared = infoq_fx.prepare(model, loader)
    table = infoq_fx.score(prepared, loader, progress=False)
    table.save(Path(folder) / "scores.json")
    table = infoq_fx.SensitivityTable.load(Path(folder) / "scores.json")
    for bits in (5.0, 4.0, 3.0, 2.5):
        allocation = infoq_fx.allocate(table, bits)
        recovered = infoq_fx.recover(prepared, allocation, loader, progress=False)
        accuracy = top1(infoq_fx.convert(recovered, allocation)(test_images))
        print(f"{bits} bits: {allocation.cost.size_bytes:,} bytes, {accuracy:.1f} %")

    # 3. Several limits at once, here size and BitOps, and a summary of the allocation.
    budget = infoq_fx.Budget(compression=9.0, bitops=3 * 8 * sum(op.macs for op in table.inventory.operations))
    print(infoq_fx.summarize(infoq_fx.allocate(table, budget), table.inventory))

"""Quantize a torchvision model with a folder of images to an ONNX file, like ``infoq-fx quantize`` but in Python.

Run it:  python examples/image_folder.py

The same on the command line:

    infoq-fx quantize 'torchvision.models:squeezenet1_1(num_classes=4)' images/ --weights model.pth \
        --image-size 64 --budget 4 -o model.onnx

Here the images are generated and the model is trained on them for a few seconds; use your own folder and model instead.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torchvision
from PIL import Image
from torch.nn import functional
from torchvision import transforms
from torchvision.models import squeezenet1_1

import infoq_fx


def draw_images(folder: Path, count: int) -> None:
    """Draw noisy stripes of four directions, with a subfolder for each as torchvision's ImageFolder expects."""
    rows, columns = np.mgrid[0:72, 0:72] / 4
    waves = {"across": rows, "down": columns, "falling": rows + columns, "rising": rows - columns}
    random = np.random.default_rng(0)
    for name, wave in waves.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            grey = 128 + 60 * np.sin(wave + random.uniform(0, 6)) + random.normal(0, 40, wave.shape)
            pixels = np.repeat(grey.clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
            Image.fromarray(pixels).save(folder / name / f"{index:03}.png")


def train(model: torch.nn.Module, loader: torch.utils.data.DataLoader, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()


torch.manual_seed(0)
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    draw_images(folder / "images", count=40)

    # 1. Use the loader that the model was trained with: the same preprocessing, without augmentation.
    preprocess = transforms.Compose(
        [
            transforms.Resize(72),
            transforms.CenterCrop(64),
            transforms.ToTensor(),
            transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ]
    )
    images = torchvision.datasets.ImageFolder(folder / "images", preprocess)
    loader = torch.utils.data.DataLoader(images, batch_size=32, shuffle=True)
    model = squeezenet1_1(num_classes=4)
    train(model, loader, epochs=5)

    # 2. Quantize and export. A pattern on module paths keeps the first layer at 8 bits.
    quantized = infoq_fx.quantize(
        model.eval(), 4.0, calibration_data=loader, bits=(2, 4, 8), pin={"features.0": 8}, progress=False
    )
    path = infoq_fx.export_onnx(quantized, folder / "model.onnx")

    # 3. Run the file.
    session = onnxruntime.InferenceSession(path)
    hits = {"float": 0, "quantized": 0, "onnxruntime": 0}
    for batch, labels in loader:
        in_runtime = torch.from_numpy(session.run(None, {"x": batch.numpy()})[0])
        with torch.no_grad():
            for name, logits in zip(hits, (model(batch), quantized(batch), in_runtime), strict=True):
                hits[name] += int((logits.argmax(1) == labels).sum())
    print(", ".join(f"{name} {100 * count / len(images):.1f} %" for name, count in hits.items()))
    print(f"{path.stat().st_size:,} bytes, {infoq_fx.allocation_of(quantized).cost.weight_bits:.2f} bits per weight")

"""The demo: trains, quantizes and exports a small residual network on scikit-learn's handwritten digits."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from infoq_fx.api import convert, prepare
from infoq_fx.conversion.quantized import QuantizedModule
from infoq_fx.core.data import read_data
from infoq_fx.export.qdq_onnx.exporter import export_onnx
from infoq_fx.graph.model_inputs import fit_data
from infoq_fx.pipeline import quantize_prepared
from infoq_fx.recovery.ladder import find_steps
from infoq_fx.scoring.criteria import make_criterion
from infoq_fx.scoring.sensitivity import Resources
from infoq_fx.types import Allocation

__all__ = ["DemoResult", "DigitsNet", "digits", "run_demo", "train_digits_net"]

_TRAINING_SAMPLES = 1200
_CALIBRATION_SAMPLES = 512


class _Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(out + self.shortcut(x))


class DigitsNet(nn.Module):
    """Residual network of 11 layers for images ``[samples, 1, 8, 8]``, with logits ``[samples, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.blocks = nn.Sequential(_Block(12, 12, 1), _Block(12, 24, 2), _Block(24, 24, 1), _Block(24, 32, 2))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of a batch of images."""
        x = self.blocks(functional.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class DemoResult:
    """Result of the demo: the quantized module, top-1 in percent on test digits, and file sizes in bytes.

    The float file is a checkpoint of the parameters; the others are ONNX files, graph included.
    """

    quantized: QuantizedModule
    float_top1: float
    uniform_top1: float
    quantized_top1: float
    onnx_top1: float
    float_bytes: int
    uniform_bytes: int
    onnx_bytes: int


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Load training and test digits: images float32 ``[samples, 1, 8, 8]`` of zero mean, labels int64 ``[samples]``.

    The data comes with scikit-learn: 1,797 digits written by 43 people (UCI, Alpaydin and Kaynak 1998).
    """
    loaded = load_digits()
    images = (torch.from_numpy(loaded.images).float().unsqueeze(1) - 4.88) / 6.0
    labels = torch.from_numpy(loaded.target).long()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    train, test = order[:_TRAINING_SAMPLES], order[_TRAINING_SAMPLES:]
    return (images[train], labels[train]), (images[test], labels[test])


def train_digits_net(images: Tensor, labels: Tensor, *, epochs: int = 30, seed: int = 0) -> DigitsNet:
    """Train the network in about ten seconds, without changing the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsNet().train()
        steps = epochs * -(-len(images) // 64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                functional.cross_entropy(model(images[rows]), labels[rows]).backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def run_demo(folder: Path, *, budget: float = 3.0, progress: bool = True) -> DemoResult:
    """Train the network, quantize it at a mean weight bit-width, export it and run it in onnxruntime.

    Args:
        folder: existing folder for ``digits.onnx`` and ``scores.json``, the table of scores.
        budget: mean weight bit-width.
        progress: show progress bars.
    """
    (images, labels), (test_images, test_labels) = digits()
    model = train_digits_net(images, labels)
    data = read_data((images[:_CALIBRATION_SAMPLES], labels[:_CALIBRATION_SAMPLES]))
    prepared = prepare(model, data, budget=budget)
    quantized = quantize_prepared(
        prepared,
        budget,
        fit_data(prepared, data),
        make_criterion("infoq"),
        find_steps("fast"),
        Resources(progress=progress),
        keep_scores=lambda table: table.save(folder / "scores.json"),
    )
    uniform_bits = {site.name: int(budget) if site.kind == "weight" else 8 for site in prepared.inventory.sites}
    uniform = convert(prepared, Allocation(bits=uniform_bits))
    path = folder / "digits.onnx"
    export_onnx(uniform, path)
    uniform_bytes = path.stat().st_size
    export_onnx(quantized, path)
    checkpoint = io.BytesIO()
    torch.save(model.state_dict(), checkpoint)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    in_runtime = torch.from_numpy(session.run(None, {name: test_images.numpy()})[0])
    with torch.no_grad():
        return DemoResult(
            quantized=quantized,
            float_top1=_top1(model(test_images), test_labels),
            uniform_top1=_top1(uniform(test_images), test_labels),
            quantized_top1=_top1(quantized(test_images), test_labels),
            onnx_top1=_top1(in_runtime, test_labels),
            float_bytes=checkpoint.tell(),
            uniform_bytes=uniform_bytes,
            onnx_bytes=path.stat().st_size,
        )


def _top1(logits: Tensor, labels: Tensor) -> float:
    return 100.0 * float((logits.argmax(1) == labels).double().mean())

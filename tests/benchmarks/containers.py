"""Write files of both containers and two kinds of levels, and run them with the onnxruntime of another environment.

python tests/benchmarks/containers.py FOLDER             writes <levels>-<container>.onnx, x.npy and <levels>.npy
other/bin/python tests/benchmarks/containers.py FOLDER --run    runs them; needs onnxruntime and numpy only
"""

import argparse
import itertools
from pathlib import Path

import numpy as np

CONTAINERS = ("int8", "exact")
LEVELS = ("codebook", "mirrored")


def write(folder):
    import torch
    from torch import nn

    import infoq_fx

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU6(), nn.Flatten(),
        nn.Linear(16 * 36, 10),
    )  # fmt: skip
    x = torch.randn(64, 1, 8, 8)
    np.save(folder / "x.npy", x.numpy())
    for levels in LEVELS:
        quantized = infoq_fx.quantize(model.eval(), 4.0, calibration_data=x, levels=levels, progress=False)
        np.save(folder / f"{levels}.npy", quantized(x).detach().numpy())
        for container in CONTAINERS:
            infoq_fx.export_onnx(quantized, folder / f"{levels}-{container}.onnx", container=container)


def run(folder):
    import onnxruntime

    x = np.load(folder / "x.npy")
    for levels, container in itertools.product(LEVELS, CONTAINERS):
        y = np.load(folder / f"{levels}.npy")
        step = (y.max() - y.min()) / 255
        path = str(folder / f"{levels}-{container}.onnx")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: x})
        steps = float(np.abs(found - y).max() / step)
        print(f"onnxruntime {onnxruntime.__version__}, {levels} {container}: largest error {steps:.2f} output steps")
        assert steps < 3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", action="store_true")
    arguments = parser.parse_args()
    (run if arguments.run else write)(arguments.folder)


if __name__ == "__main__":
    main()

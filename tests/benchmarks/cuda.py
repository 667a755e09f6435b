"""The tests for GPUs, and what ``quantize()`` costs on a GPU beside the CPU, in passes and seconds.

    python tests/benchmarks/cuda.py [--models random_mobilenet_v2 resnet50 vit_b_16] [--samples 64] [--minutes 8]

Models have random weights and random images of 224 x 224. The GPU comes first, then the CPU; what does not end within
the minutes is told and left out. ``cost.py`` says what is measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent


def main() -> None:
    """Run the tests, then each model on the GPU and on the CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["random_mobilenet_v2", "resnet50", "vit_b_16"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=8.0)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU: torch.cuda.is_available() is False")
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    end = time.monotonic() + 60 * options.minutes
    commands = [["-m", "pytest", "-q", "-n", "0", str(HERE.parent / "test_cuda.py")]]
    for device in ("cuda", "cpu"):
        for name in options.models:
            given = [name, "--samples", str(options.samples), "--device", device]
            commands.append([str(HERE / "cost.py"), *given])
    for command in commands:
        print(*command, flush=True)
        try:
            subprocess.run([sys.executable, *command], check=False, timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            print("did not end in time", flush=True)


if __name__ == "__main__":
    main()

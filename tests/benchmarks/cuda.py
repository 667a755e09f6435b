"""The tests for GPUs, and what ``quantize()`` costs on a GPU beside the CPU, in passes and seconds.

    python tests/benchmarks/cuda.py [--models random_mobilenet_v2 resnet50 vit_b_16] [--samples 64] [--without-cpu]

Models have random weights and random images of 224 x 224. Takes at most 8 minutes; ``cost.py`` says what is measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent


def main() -> None:
    """Run the tests, then each model on the GPU and on the CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["random_mobilenet_v2", "resnet50", "vit_b_16"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--without-cpu", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU: torch.cuda.is_available() is False")
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "0", str(HERE.parent / "test_cuda.py")], check=False)
    for name in options.models:
        for device in ("cuda",) if options.without_cpu else ("cuda", "cpu"):
            print(device, end=" ", flush=True)
            given = [name, "--samples", str(options.samples), "--device", device]
            subprocess.run([sys.executable, str(HERE / "cost.py"), *given], check=False)


if __name__ == "__main__":
    main()

"""Run Sony's Model Compression Toolkit with the same models, images, bit-widths and mean bits as this package's tables.

    pip install model-compression-toolkit            (in an environment of its own: it pins an old setuptools)
    python tests/benchmarks/other_tools.py [resnet20] [mobilenet_v2] [--budgets 4 3 2.5] [--images 512]

Needs the models and images next to the project (``../shared/data/real_models.py``). Uses the toolkit's mixed-precision
search with weights of 2 to 8 bits, activations at 8 bits, no training; the size limit is that of a mean over the
weights of convolutions and linear layers. Calibration images are those that ``recovery.py`` draws with seed 0.
"""

import argparse
import time

import model_compression_toolkit as mct
import torch
from model_compression_toolkit.target_platform_capabilities.constants import KERNEL_ATTR, WEIGHTS_N_BITS
from model_compression_toolkit.target_platform_capabilities.tpc_models.imx500_tpc.v1_0 import tpc as imx500
from real_models import load_case, load_real_models, predict, top1
from torch import nn


def build_platform(bits):
    """Return the toolkit's default platform with other weight bit-widths."""
    base, _, default = imx500.get_op_quantization_configs()
    options = [base.clone_and_edit(attr_to_edit={KERNEL_ATTR: {WEIGHTS_N_BITS: b}}) for b in sorted(bits, reverse=True)]
    return imx500.generate_tpc(
        default_config=default, base_config=base, mixed_precision_cfg_list=options, name="mixed_precision"
    )


def quantize(model, images, budget, bits):
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))

    def batches():
        for batch in images.split(32):
            yield [batch.numpy()]

    quantized, _ = mct.ptq.pytorch_post_training_quantization(
        model,
        batches,
        target_resource_utilization=mct.core.ResourceUtilization(weights_memory=weights * budget / 8),
        core_config=mct.core.CoreConfig(
            mixed_precision_config=mct.core.MixedPrecisionQuantizationConfig(num_of_images=32)
        ),
        target_platform_capabilities=build_platform(bits),
    )
    return quantized.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["resnet20"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[4.0, 3.0, 2.5])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 7, 8])
    parser.add_argument("--images", type=int, default=512)
    arguments = parser.parse_args()
    real = load_real_models()
    for name in arguments.models:
        model, (images, _), (test, labels) = load_case(real, name, 0)
        for budget in arguments.budgets:
            torch.manual_seed(0)
            start = time.process_time()
            quantized = quantize(model, images[: arguments.images], budget, arguments.bits)
            seconds = time.process_time() - start
            found = top1(predict(quantized, test), labels)
            print(f"{name}, {budget:g} bits: {found:.1f} ({seconds:.0f} s CPU, MCT {mct.__version__})", flush=True)


if __name__ == "__main__":
    main()

"""Bit-widths that become logic: a digits classifier as QONNX, checked by qonnx, and compiled by hls4ml.

pip install "infoq-fx[qonnx]"; hls4ml needs a C++ compiler.
"""

import importlib.util
import shutil
import tempfile

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import infoq_fx


def train(images, labels):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


def move_scales_behind_products(model):
    """hls4ml takes one scale for the weight of a dense layer: the scales per output follow as a multiplication."""
    from onnx import helper
    from qonnx.util.cleanup import cleanup_model

    for node in [node for node in model.graph.node if node.op_type == "MatMul"]:
        quant, output, place = model.find_producer(node.input[1]), node.output[0], list(model.graph.node).index(node)
        scales = model.get_initializer(quant.input[1])
        model.set_initializer(quant.input[0], model.get_initializer(quant.input[0]) / scales)
        model.set_initializer(f"{output}_one", np.float32(1))
        model.set_initializer(f"{output}_scales", scales.reshape(-1))
        quant.input[1], node.output[0] = f"{output}_one", f"{output}_sum"
        scaled = helper.make_node("Mul", [f"{output}_sum", f"{output}_scales"], [output], name=f"{node.name}_scale")
        model.graph.node.insert(place + 1, scaled)
    return cleanup_model(model)


def emulate(path, folder):
    """Compile the file's C++ model with hls4ml; a compiler is needed, no FPGA tools."""
    import hls4ml
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.gemm_to_matmul import GemmToMatMul
    from qonnx.util.cleanup import cleanup_model

    model = cleanup_model(cleanup_model(ModelWrapper(str(path))).transform(GemmToMatMul()))
    model = move_scales_behind_products(model)
    config = hls4ml.utils.config_from_onnx_model(
        model, granularity="name", backend="Vitis", default_precision="fixed<56,20>"
    )
    emulated = hls4ml.converters.convert_from_onnx_model(
        model, output_dir=str(folder), io_type="io_parallel", backend="Vitis", hls_config=config
    )
    emulated.compile()
    return emulated


def main():
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    model = train(images[:1200], labels[:1200])
    quantized = infoq_fx.quantize(
        model,
        infoq_fx.Budget(weight_bits=3.5),
        calibration_data=(images[:1000], labels[:1000]),
        bits=(2, 3, 4, 5, 6),
        activation_bits=6,
        levels="uniform",  # circuits multiply integers of few bits, not levels of a codebook
        progress=False,
    )
    print(infoq_fx.summarize(quantized))
    test = images[1200:], labels[1200:]
    with tempfile.TemporaryDirectory() as folder:
        path = infoq_fx.export_onnx(quantized, f"{folder}/digits.onnx", target="qonnx")
        if importlib.util.find_spec("qonnx") is None:
            print("qonnx is not installed: the file is not run")
            return
        print(infoq_fx.verify_onnx(path, quantized, test, target="qonnx"))
        if importlib.util.find_spec("hls4ml") is None or shutil.which("g++") is None:
            print("hls4ml or a C++ compiler is not installed: the file is not compiled")
            return
        found, ours = emulate(path, f"{folder}/hls").predict(test[0].numpy()), quantized(test[0]).detach().numpy()
        print(f"hls4ml's emulation equals the module on {100 * (found == ours).all(1).mean():.1f} % of the digits")


if __name__ == "__main__":
    main()

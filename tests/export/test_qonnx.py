"""QONNX files say every bit-width, and the qonnx package computes from them what the module computes."""

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from networks import ResidualNet, randomise_norms
from torch import nn

import infoq_fx
from infoq_fx.errors import ExportError, OptionError
from infoq_fx.types import Allocation

EXAMPLES = Path(__file__).parents[2] / "examples"
needs_qonnx = pytest.mark.skipif(importlib.util.find_spec("qonnx") is None, reason="qonnx is an extra")
needs_hls4ml = pytest.mark.skipif(
    importlib.util.find_spec("hls4ml") is None or shutil.which("g++") is None, reason="hls4ml needs a C++ compiler"
)
pytestmark = pytest.mark.filterwarnings("ignore")  # of qonnx and hls4ml


def quantize(model, data, widths, activation_bits):
    prepared = infoq_fx.prepare(
        model.eval(), data, bits=sorted({*widths}), activation_bits=activation_bits, levels="uniform"
    )
    names = [site.name for site in prepared.inventory.sites if site.kind == "weight"]
    bits = {site.name: site.bits[0] for site in prepared.inventory.sites}
    return infoq_fx.convert(
        prepared, Allocation(bits={**bits, **{n: widths[i % len(widths)] for i, n in enumerate(names)}})
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.manual_seed(0)
    data = torch.randn(32, 1, 8, 8)
    quantized = quantize(randomise_norms(ResidualNet()), data, (3, 5, 2, 7, 4, 6, 8), 5)
    path = infoq_fx.export_onnx(quantized, tmp_path_factory.mktemp("qonnx") / "m.onnx", target="qonnx")
    return quantized, path, data


def widths_of(path):
    model = onnx.load(path)
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    quants = [node for node in model.graph.node if node.op_type == "Quant"]
    assert all(node.domain == "qonnx.custom_op.general" and held[node.input[2]] == 0 for node in quants)
    return {node.name.removesuffix("/Quant"): int(held[node.input[3]]) for node in quants}


def test_every_site_has_its_bit_width(made):
    quantized, path, _ = made
    bits, found = infoq_fx.allocation_of(quantized).bits, widths_of(path)
    assert {n: b for n, b in found.items() if n.endswith("weight")} == {
        n: b for n, b in bits.items() if n.endswith("weight")
    }
    clipped = {n.name.removesuffix("/Clip") for n in onnx.load(path).graph.node if n.op_type == "Clip"}
    activations = {name: width for name, width in found.items() if not name.endswith("weight")}
    assert activations
    assert all(
        width == bits[name] if name not in clipped else width <= bits[name] + 1 for name, width in activations.items()
    )
    shape = onnx.load(path).graph.input[0].type.tensor_type.shape
    assert [dim.dim_value for dim in shape.dim] == [1, 1, 8, 8]


@needs_qonnx
def test_qonnx_computes_what_the_module_computes(made):
    quantized, path, data = made
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    model = ModelWrapper(str(path))
    for image in data[:6].split(1):
        found = execute_onnx(model, {model.graph.input[0].name: image.numpy()})[model.graph.output[0].name]
        np.testing.assert_array_equal(found, quantized(image).detach().numpy())
    result = infoq_fx.verify_onnx(path, quantized, data[:6], target="qonnx")
    assert result.is_sound
    assert result.levels[0].largest_error_steps == 0


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_the_target_of_a_qonnx_file_is_named(target, made):
    """Before the runtime is asked, which may not be installed."""
    quantized, path, images = made
    with pytest.raises(OptionError, match=rf"is a QONNX file, which {target} does not run; give target='qonnx'"):
        infoq_fx.verify_onnx(path, quantized, images, target=target)


def test_a_wrong_file_is_not_kept(made, tmp_path, monkeypatch):
    from infoq_fx.export.qdq_onnx import quant_nodes

    quantized, _, _ = made
    right = quant_nodes._quant
    monkeypatch.setattr(quant_nodes, "_quant", lambda *args, is_signed: right(*args, is_signed=False))
    with pytest.raises(ExportError, match="disagrees with the module"):
        infoq_fx.export_onnx(quantized, tmp_path / "m.onnx", target="qonnx")


def test_qonnx_has_no_containers(made, tmp_path):
    quantized, _, _ = made
    with pytest.raises(
        OptionError, match=r"container='int8' is given for target 'qonnx', .*; leave .* or give target 'onnx"
    ):
        infoq_fx.export_onnx(quantized, tmp_path / "m.onnx", target="qonnx", container="int8")


@pytest.mark.slow
@needs_qonnx
@needs_hls4ml
def test_hls4ml_emulates_a_network_of_mixed_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    import fpga

    torch.manual_seed(0)
    data = torch.randint(0, 17, (256, 16)) / 16
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    quantized = quantize(model, data, (4, 3, 5), 6)
    path = infoq_fx.export_onnx(quantized, tmp_path / "m.onnx", target="qonnx")
    emulated = fpga.emulate(path, tmp_path / "hls")
    np.testing.assert_array_equal(emulated.predict(data.numpy()), quantized(data).detach().numpy())

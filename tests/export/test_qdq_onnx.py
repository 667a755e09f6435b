"""Exported files are run in onnxruntime and compared with the quantized module."""

import functools
import itertools
import json
import os

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import ResidualNet, randomise_norms
from torch import nn

import infoq_fx
from infoq_fx.errors import ExportError, OptionError
from infoq_fx.export.qdq_onnx.finishing import METADATA_KEY
from infoq_fx.types import Allocation

LEVELS = onnxruntime.GraphOptimizationLevel


def quantize_by_hand(model, data, bits=4, activation_bits=8):
    prepared = infoq_fx.prepare(model.eval(), data, bits=(bits,), activation_bits=activation_bits)
    return infoq_fx.convert(prepared, Allocation(bits={s.name: s.bits[0] for s in prepared.inventory.sites}))


def run(path, feeds, level=LEVELS.ORT_DISABLE_ALL):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds), session


class Mixed(nn.Module):
    """A 3-D linear layer, attention written out and fused, a layer norm, a transposed and a 1-D convolution."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.norm = nn.Conv1d(3, 8, 3, padding=1), nn.Linear(8, 24), nn.LayerNorm(8)
        self.up, self.head = nn.ConvTranspose1d(8, 4, 2, stride=2), nn.Linear(4, 3)

    def forward(self, x):
        x = self.embed(x).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + (q @ k.transpose(1, 2) / 3).softmax(-1) @ v
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(nn.functional.gelu(self.up(x.transpose(1, 2))).mean(2))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, first, second):
        return {
            "logits": self.head(self.layer(first) + self.layer(second).relu()),
            "hidden": self.layer(first),
        }


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 3, groups=4, padding="same"), nn.ConvTranspose2d(8, 4, 3, groups=2)
        self.c, self.d = nn.Conv2d(4, 4, 3, stride=2, bias=False), nn.Conv3d(1, 2, 2)

    def forward(self, x):
        x = torch.cat([self.c(self.b(self.a(x).relu())), self.c(self.b(self.a(-x)))], 1)
        return self.d(nn.functional.max_pool2d(x, 2)[:, None]).flatten(1)


def residual_net():
    return randomise_norms(ResidualNet())


MODELS = {
    "residual": (residual_net, [torch.randn(32, 1, 8, 8)]),
    "mixed": (Mixed, [torch.randn(32, 3, 10)]),
    "shared": (Shared, [torch.randn(32, 6), torch.randn(32, 6)]),
    "grouped": (Grouped, [torch.randn(32, 4, 9, 9)]),
}


def all_of(quick, *ranges):
    """Every combination, all but the quick ones slow."""
    return [
        pytest.param(*values, marks=[] if values in quick else pytest.mark.slow)
        for values in itertools.product(*ranges)
    ]


ROUTES = {("residual", 5, 8)}


@pytest.mark.parametrize(("name", "bits", "activation_bits"), all_of(ROUTES, MODELS, (2, 5, 8), (4, 8)))
def test_onnxruntime_computes_what_the_module_computes(name, bits, activation_bits, tmp_path):
    build, inputs = MODELS[name]
    quantized = quantize_by_hand(build(), [(tuple(inputs), None)], bits, activation_bits)
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    names = [value.name for value in onnx.load(path).graph.input]
    for samples in (1, 5, 32):
        batch = [x[:samples] for x in inputs]
        expected = quantized(*batch)
        expected = list(expected.values()) if isinstance(expected, dict) else [expected]
        found, _ = run(path, dict(zip(names, (x.numpy() for x in batch), strict=True)))
        for ours, theirs in zip(expected, found, strict=True):
            # Convolutions and linear layers are exact in any order; normalisation, softmax and gelu are not, and
            # may move a value by one step now and then.
            tolerance = 1e-5 if name in ("residual", "shared", "grouped") else 0.1
            assert np.linalg.norm(ours.numpy() - theirs) <= tolerance * np.linalg.norm(ours.numpy())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(1)
    images = torch.randn(64, 1, 8, 8)
    quantized = infoq_fx.quantize(residual_net().eval(), 3.5, calibration_data=images, progress=False)
    path = infoq_fx.export_onnx(quantized, tmp_path_factory.mktemp("onnx") / "model.onnx", container="int8")
    return quantized, path, images


@pytest.mark.slow
def test_the_container_is_the_one_that_was_promised(exported):
    quantized, path, _images = exported
    model = onnx.load(path)
    assert model.ir_version == 8
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert [value.name for value in model.graph.input] == ["x"]
    assert [value.name for value in model.graph.output] == ["output"]
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    bits = infoq_fx.allocation_of(quantized).bits
    for name, b in bits.items():
        if name.endswith("weight"):
            stored = held.get(name, held.get(f"{name}_transposed"))
            assert stored.dtype == np.int8
            assert len(np.unique(stored)) <= 1 << b
    biases = [array for name, array in held.items() if name.endswith(".bias")]
    assert len(biases) == 6
    assert all(array.dtype == np.int32 for array in biases)
    # No float copy of anything: what is left in float32 are scales.
    assert all("scale" in name for name, array in held.items() if array.dtype == np.float32 and array.size > 1)
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    assert b".py" not in path.read_bytes()


def test_the_allocation_reads_back_from_a_session(exported):
    quantized, path, images = exported
    _, session = run(path, {"x": images.numpy()})
    stored = json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
    allocation = infoq_fx.allocation_of(quantized)
    assert {site: stored["bits"].get(site, stored["others"]) for site in allocation.bits} == dict(allocation.bits)
    assert stored["criterion"] == "infoq"
    assert stored["budget"]["weight_bits"] == 3.5


def test_convolutions_and_residual_additions_become_integer_kernels(exported, tmp_path):
    _, path, _images = exported
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert kinds.count("QLinearConv") == 5
    assert kinds.count("QLinearAdd") == 2
    assert "Conv" not in kinds


@pytest.mark.slow
def test_one_seed_gives_one_file(tmp_path):
    images = torch.randn(48, 1, 8, 8)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    files = []
    for name in ("a", "b"):
        quantized = infoq_fx.quantize(model, 4, calibration_data=images, progress=False)
        files.append(infoq_fx.export_onnx(quantized, tmp_path / name).read_bytes())
    assert files[0] == files[1]


@pytest.mark.slow
def test_float_activations_and_ignored_layers_are_exported_too(tmp_path):
    images = torch.randn(32, 1, 8, 8)
    model = residual_net().eval()
    prepared = infoq_fx.prepare(model, example_inputs=(images[:2],), bits=(4,), activation_bits=None, ignore=["head"])
    quantized = infoq_fx.convert(prepared, Allocation(bits={s.name: 4 for s in prepared.inventory.sites}))
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    found, _ = run(path, {"x": images.numpy()})
    np.testing.assert_allclose(found[0], quantized(images).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_only_quantized_modules_are_exported(tmp_path):
    with pytest.raises(OptionError, match="is not a quantized module"):
        infoq_fx.export_onnx(nn.Linear(2, 2), tmp_path / "model.onnx")


def test_a_path_that_cannot_be_written(exported, tmp_path):
    quantized, _, _ = exported
    with pytest.raises(ExportError, match="folder that exists, is writable"):
        infoq_fx.export_onnx(quantized, tmp_path / "missing" / "model.onnx")
    with pytest.raises(ExportError, match="it is a folder"):
        infoq_fx.export_onnx(quantized, tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_failed_check_leaves_no_file_and_keeps_the_old_one(exported, tmp_path, monkeypatch):
    quantized, _, _ = exported
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old file")

    def refuse(*_, **__):
        raise onnx.checker.ValidationError("made to fail")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(ExportError, match="fails the ONNX checker: made to fail"):
        infoq_fx.export_onnx(quantized, path)
    assert path.read_bytes() == b"the old file"
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_a_file_that_computes_something_else_is_not_kept(exported, tmp_path, monkeypatch):
    quantized, _, _ = exported
    from infoq_fx.export.qdq_onnx import lowering

    lower = lowering._lower_dequantize

    def spoil(model, *rest):
        for node in lowering.find_placeholders(model, "Dequantize"):
            if node.attributes["site"].as_string() == "head.weight":
                tensor = node.inputs[0].const_value
                node.inputs[0].const_value = lowering.ir.Tensor(-tensor.numpy(), name=tensor.name)
        lower(model, *rest)

    monkeypatch.setattr(lowering, "_lower_dequantize", spoil)
    with pytest.raises(ExportError, match="onnxruntime disagrees with the module at output 'output'"):
        infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == []


def held_tensors(path):
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


@functools.cache
def mixed_of(bits):
    torch.manual_seed(bits)
    images = torch.randn(24, 3, 9)
    return quantize_by_hand(Mixed(), images, bits), images


@pytest.mark.slow
def test_the_container_is_in_the_metadata_and_must_be_known(exported, tmp_path):
    quantized, _, _ = exported
    for container, asked in (("exact", None), ("int8", "int8")):
        path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx", container=asked)
        stored = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
        assert stored["infoq.container"] == container
        assert stored["infoq.version"] == infoq_fx.__version__
    with pytest.raises(OptionError, match="unknown container 'int4'"):
        infoq_fx.export_onnx(quantized, tmp_path / "model.onnx", container="int4")


@pytest.mark.slow
def test_processors_that_saturate_get_weights_of_8_bits_around_128(tmp_path):
    images = torch.randn(16, 3, 9)
    model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(56, 4))
    quantized, kinds = quantize_by_hand(model, images, 8), {}
    for target in ("onnxruntime", "onnxruntime-avx2", "openvino"):
        path = infoq_fx.export_onnx(quantized, tmp_path / target, target=target, container="int8")
        held = held_tensors(path)
        kinds[target] = {t.data_type for name, t in held.items() if name.startswith("0.weight") and t.dims[2:]}
        found, _ = run(path, {"input": images.numpy()})
        np.testing.assert_allclose(found[0], quantized(images).detach().numpy(), rtol=1e-4, atol=1e-5)
    signed, shifted = {onnx.TensorProto.INT8}, {onnx.TensorProto.UINT8}
    assert kinds == {"onnxruntime": signed, "onnxruntime-avx2": shifted, "openvino": signed}


class Patches(nn.Module):
    """Patches of an image behind a class token, as in a vision transformer."""

    def __init__(self):
        super().__init__()
        self.patch, self.token, self.head = nn.Conv2d(1, 8, 2, 2), nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 4)
        nn.init.normal_(self.patch.bias, std=2.0)

    def forward(self, x):
        patches = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(torch.cat([self.token.expand(len(x), -1, -1), patches], 1).relu())


@pytest.mark.slow
def test_openvino_gets_floats_where_patches_join_a_class_token(tmp_path):
    pytest.importorskip("openvino", reason="OpenVINO is an extra")
    torch.manual_seed(0)
    images = torch.randn(64, 1, 8, 8)
    quantized = quantize_by_hand(Patches(), images, 8)
    sites = {}
    for target in ("onnxruntime", "openvino"):
        path = infoq_fx.export_onnx(quantized, tmp_path / target, target=target, container="int8")
        sites[target] = {node.name for node in onnx.load(path).graph.node if node.op_type == "QuantizeLinear"}
    assert sites["onnxruntime"] - sites["openvino"] == {"patch.output/Q"}
    found = infoq_fx.verify_onnx(tmp_path / "openvino", quantized, images, target="openvino")
    assert found.is_sound, found
    assert found.levels[0].mean_error_steps < 1


def test_layers_are_named_by_module_paths_and_nothing_inside_carries_shapes(exported):
    _, path, _ = exported
    graph = onnx.load(path).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    convolutions = {node.name for node in graph.node if node.op_type == "Conv"}
    assert convolutions == {n.removesuffix(".weight") for n in held_tensors(path) if n.endswith(".weight")} - {"head"}
    assert not graph.value_info
    assert not any(value.metadata_props for value in [*graph.input, *graph.output, *graph.initializer])


@pytest.mark.slow
def test_an_exact_file_leaves_out_what_runtimes_know(exported, tmp_path):
    quantized, path, images = exported
    exact = infoq_fx.export_onnx(quantized, tmp_path / "exact.onnx")
    graph, held = onnx.load(exact).graph, held_tensors(exact)
    kinds = [node.op_type for node in graph.node]
    assert "Relu" in {node.op_type for node in onnx.load(path).graph.node}
    assert "Relu" not in kinds  # every one stands in front of a quantizer with zero point 0
    layers = {name.removesuffix(".weight") for name in held_tensors(path) if name.endswith(".weight")}
    assert layers <= {node.name for node in graph.node} <= {"", "head", *layers}
    assert all(name == f"{onnx.numpy_helper.to_array(held[name])}" for name in held if name.isdigit())
    assert sum(map(len, held)) < 0.8 * sum(map(len, held_tensors(path)))
    found, expected = (run(file, {"x": images.numpy()})[0][0] for file in (exact, path))
    np.testing.assert_array_equal(found, expected)


def test_a_relu_that_something_else_reads_stays_in_an_exact_file(tmp_path):
    data = torch.randn(64, 6)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    in_float = infoq_fx.quantize(model, 4, calibration_data=data, activation_bits=None, progress=False)
    path = infoq_fx.export_onnx(in_float, tmp_path / "exact.onnx")
    assert "Relu" in {node.op_type for node in onnx.load(path).graph.node}
    np.testing.assert_allclose(run(path, {"input": data.numpy()})[0][0], in_float(data).detach().numpy(), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("container", ["exact", pytest.param("int8", marks=pytest.mark.slow)])
def test_large_models_go_out_with_external_data(container, tmp_path, monkeypatch):
    from infoq_fx.export.qdq_onnx import writing

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 4))
    data = torch.randn(32, 64)
    quantized = quantize_by_hand(model, data)
    whole = infoq_fx.export_onnx(quantized, tmp_path / "whole.onnx", container=container)
    monkeypatch.setattr(writing, "_MOST_BYTES", 2000)
    for name, asked in (("by_size.onnx", False), ("asked.onnx", True)):
        path = infoq_fx.export_onnx(quantized, tmp_path / name, container=container, external_data=asked)
        assert (tmp_path / f"{name}.data").stat().st_size >= 64 * 96 * (8 if container == "int8" else 4) // 8
        assert path.stat().st_size < whole.stat().st_size - 2000
        np.testing.assert_array_equal(run(path, {"input": data.numpy()})[0], run(whole, {"input": data.numpy()})[0])
    assert not (tmp_path / "whole.onnx.data").exists()

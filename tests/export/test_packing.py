"""Packed weights are unpacked by runtimes to what was packed, at every level, and integer kernels stay."""

import collections
import functools
import zlib

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import infoq_fx
from infoq_fx.export.qdq_onnx import packing, parameters
from infoq_fx.types import Allocation

LEVELS = onnxruntime.GraphOptimizationLevel
ALL_LEVELS = (LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_BASIC, LEVELS.ORT_ENABLE_EXTENDED, LEVELS.ORT_ENABLE_ALL)


@st.composite
def integer_weights(draw):
    """An int8 array whose values need a bit-width, with its edges and any shape, or has that many levels."""
    width = draw(st.integers(2, 8))
    low, high = -(1 << (width - 1)), (1 << (width - 1)) - 1
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=4)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        return rng.choice(rng.choice(np.arange(-128, 128), 1 << width, replace=False), shape).astype(np.int8)
    values = rng.integers(low, high, shape, endpoint=True) if draw(st.booleans()) else rng.choice([low, high], shape)
    return np.asarray(values, np.int8)


def model_of(weights):
    """A graph that dequantizes each weight with scale 1."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 18}, name="weights")
    scale = ir.Value(name="scale", const_value=ir.tensor(np.float32(1)), type=ir.TensorType(ir.DataType.FLOAT))
    graph.initializers["scale"] = scale
    for index, weight in enumerate(weights):
        tensor = ir.tensor(weight, name=f"w{index}")
        stored = ir.Value(name=f"w{index}", const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
        graph.initializers[f"w{index}"] = stored
        node = ir.Node("", "DequantizeLinear", [stored, scale], num_outputs=1)
        node.outputs[0].name, node.outputs[0].type = f"y{index}", ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = tensor.shape
        graph.append(node)
        graph.outputs.append(node.outputs[0])
    return ir.Model(graph, ir_version=8)


def open_session(content, level):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 4
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


@settings(deadline=None, max_examples=60)
@given(st.lists(integer_weights(), min_size=1, max_size=6))
def test_unpacked_weights_are_those_that_were_packed(weights):
    model = model_of(weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "CHAIN_BYTES", -1000)  # every bit-width that occurs gets operators of its own
        patch.setattr(packing, "LEVELS_BYTES", -1000)  # and every weight with few levels a codebook
        packing.pack_weights(model)
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    for level in ALL_LEVELS:
        for found, weight in zip(open_session(proto.SerializeToString(), level).run(None, {}), weights, strict=True):
            np.testing.assert_array_equal(found, weight.astype(np.float32))


@pytest.mark.parametrize("width", range(2, 8))
def test_a_weight_takes_its_bits(width):
    rng = np.random.default_rng(width)
    weights = [rng.integers(-(1 << (width - 1)), 1 << (width - 1), (64, count)).astype(np.int8) for count in (33, 90)]
    model = model_of(weights)
    packing.pack_weights(model)
    stored = [t.const_value for t in model.graph.initializers.values() if t.dtype == ir.DataType.UINT8]
    assert sum(tensor.nbytes for tensor in stored) == 64 * 123 * width // 8
    kept = {t.const_value.nbytes for t in model.graph.initializers.values() if t.dtype == ir.DataType.INT8}
    assert kept == {1 << width}  # the levels


@pytest.mark.parametrize("width", range(2, 7))
def test_a_weight_with_a_codebook_takes_the_bits_of_its_levels(width):
    rng = np.random.default_rng(width)
    levels = [np.sort(rng.choice(np.arange(-63, 64), 1 << width, replace=False)).astype(np.int8) for _ in range(2)]
    weights = [rng.choice(own, (64, count)) for own, count in zip(levels, (33, 90), strict=True)]
    model = model_of(weights)
    packing.pack_weights(model)
    stored = [t.const_value for t in model.graph.initializers.values() if t.dtype == ir.DataType.UINT8]
    assert sum(tensor.nbytes for tensor in stored) == 64 * 123 * width // 8
    kept = [t.const_value.numpy() for t in model.graph.initializers.values() if t.dtype == ir.DataType.INT8]
    assert all(any(np.array_equal(own, found) for found in kept) for own in levels)
    for level in ALL_LEVELS:
        session = open_session(ir.serde.serialize_model(model).SerializeToString(), level)
        for found, weight in zip(session.run(None, {}), weights, strict=True):
            np.testing.assert_array_equal(found, weight.astype(np.float32))


def test_a_few_values_of_a_width_join_the_next_one():
    rng = np.random.default_rng(0)
    weights = [rng.integers(-4, 4, 40).astype(np.int8), rng.integers(-8, 8, 4000).astype(np.int8)]
    model = model_of(weights)
    packing.pack_weights(model)
    assert {name for name in model.graph.initializers if name.startswith("int")} >= {"int4", "int4_4"}
    assert "int3" not in model.graph.initializers
    for level in ALL_LEVELS:
        session = open_session(ir.serde.serialize_model(model).SerializeToString(), level)
        for found, weight in zip(session.run(None, {}), weights, strict=True):
            np.testing.assert_array_equal(found, weight.astype(np.float32))


class Kinds(nn.Module):
    """Every kind of layer with a weight, one weight read by two layers, and a table that is also a linear layer."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(40, 16), nn.Conv1d(16, 16, 3, padding=1, groups=4)
        self.up, self.twice = nn.ConvTranspose1d(16, 16, 2, stride=2), nn.Linear(16, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        x = self.up(self.mix(self.table(tokens).transpose(1, 2)).relu()).transpose(1, 2)
        return self.head(self.twice(self.twice(x).relu()))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 24, 3), nn.Conv2d(24, 24, 3, groups=6), nn.Conv2d(24, 24, 3, padding=1)
        self.gate, self.head = nn.Conv2d(24, 1, 1), nn.Linear(24, 5)

    def forward(self, x):
        x = self.b(self.a(x).relu()).relu()
        return self.head(((x + self.c(x)).relu() * self.gate(x)).mean((2, 3)))


def quantize(model, data, widths):
    prepared = infoq_fx.prepare(model.eval(), data, bits=sorted({*widths}))
    names = [site.name for site in prepared.inventory.sites if site.kind == "weight"]
    bits = {name: widths[index % len(widths)] for index, name in enumerate(names)}
    others = {site.name: 8 for site in prepared.inventory.sites if site.kind != "weight"}
    return infoq_fx.convert(prepared, Allocation(bits={**others, **bits}))


@functools.cache
def quantized_kinds(name):
    torch.manual_seed(0)
    if name == "kinds":
        data = torch.randint(0, 40, (32, 6))
        return quantize(Kinds(), data, (3, 5, 8)), data
    data = torch.randn(32, 1, 8, 8)
    return quantize(Convolutions(), data, (6, 3, 2, 7)), data


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A function from a model's name and a target to its exact and its int8 file."""
    folder = tmp_path_factory.mktemp("files")

    @functools.cache
    def export(name, target="onnxruntime"):
        quantized, _ = quantized_kinds(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packing, "CHAIN_BYTES", -1000)
            patch.setattr(parameters, "_NODES_BYTES", -1000)
            return [
                infoq_fx.export_onnx(quantized, folder / f"{name}_{container}.onnx", container=container, target=target)
                for container in ("exact", "int8")
            ]

    return export


def kinds_of_operators(path, optimised):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 4, str(optimised)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(optimised).graph.node)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime-avx2"])
@pytest.mark.parametrize("name", ["convolutions", "kinds"])
def test_a_file_runs_as_the_int8_file_does(name, target, files, tmp_path):
    exact, int8 = files(name, target)
    _, data = quantized_kinds(name)
    for level in ALL_LEVELS:
        sessions = [open_session(str(path), level) for path in (exact, int8)]
        feeds = {sessions[0].get_inputs()[0].name: data.numpy()}
        np.testing.assert_array_equal(*(session.run(None, feeds)[0] for session in sessions))
    kinds = [kinds_of_operators(path, tmp_path / "optimised.onnx") for path in (exact, int8)]
    assert kinds[0] == kinds[1]
    assert kinds[0]["QLinearConv"] >= 1
    assert sum(kinds[0].values()) < len(onnx.load(exact).graph.node) / 2


@pytest.mark.slow
def test_openvino_runs_what_it_runs_for_int8(files):
    openvino = pytest.importorskip("openvino", reason="OpenVINO is an extra")
    _, data = quantized_kinds("convolutions")
    found = []
    for path in files("convolutions"):
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(str(path)), "CPU")
        info = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
        kinds = [(str(one["layerType"].value), str(one["runtimePrecision"].value)) for one in info]
        found.append((sorted(kinds), zlib.crc32(compiled(data.numpy())[0].tobytes())))
    assert found[0] == found[1]
    assert {precision for kind, precision in found[0][0] if kind == "Convolution"} <= {"u8", "i8"}


class Slices(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.transpose(1, 2)).softmax(-1) @ v


@pytest.mark.slow
def test_nodes_have_names_where_one_value_is_sliced_several_times(tmp_path):
    torch.manual_seed(0)
    quantized = quantize(Slices(), torch.randn(32, 5, 8), (3,))
    graph = onnx.load(infoq_fx.export_onnx(quantized, tmp_path / "m.onnx")).graph
    sliced = {node.input[0] for node in graph.node if node.op_type == "Slice"}
    # onnxruntime 1.20 names the Split that replaces the slices after their source, and refuses the empty name twice.
    assert all(node.name for node in graph.node if sliced.intersection(node.output))


@pytest.mark.slow
def test_verification_tells_what_is_folded(files):
    quantized, data = quantized_kinds("convolutions")
    exact, int8 = files("convolutions")
    loading = infoq_fx.verify_onnx(exact, quantized, data).loading
    assert loading.operators > 20
    assert loading.operators_left == 0
    assert 0 < loading.unpacked_seconds < 10
    assert f"all {loading.operators} operators on constants are folded" in str(loading)
    left = infoq_fx.Loading(9, 4, 0.1, 0.05)
    assert str(left).startswith("4 of 9 operators on constants are left to every run; export in container 'int8'")
    assert infoq_fx.verify_onnx(int8, quantized, data).loading is None


@pytest.mark.parametrize("external_data", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_file_is_measured(tmp_path, external_data):
    torch.manual_seed(0)
    quantized = quantize(nn.Linear(64, 200), torch.randn(32, 64), (3,))
    path = infoq_fx.export_onnx(quantized, tmp_path / "m.onnx", external_data=external_data)
    size = infoq_fx.measure_file(path)
    assert size.total_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert 64 * 200 * 3 / 8 < size.tensor_bytes < 64 * 200 * 3 / 8 + 200 * 8
    assert size.graph_bytes < 3000
    with pytest.raises(infoq_fx.OptionError, match=r"cannot read .*give a file that export_onnx wrote"):
        infoq_fx.measure_file(tmp_path / "missing.onnx")

"""Recurrent layers in files: onnxruntime's own operators, with integer weights stored once, compute what torch does."""

import copy
import pickle

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import infoq_fx
from infoq_fx.types import Allocation

LEVELS = onnxruntime.GraphOptimizationLevel


class Net(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.front = nn.Linear(6, 10)
        self.layer = kind(10, 16, **options)
        directions = 2 if self.layer.bidirectional else 1
        self.head = nn.Linear(directions * (options.get("proj_size") or 16), 3)

    def forward(self, x):
        x = self.front(x).relu()
        y, last = self.layer(x if self.layer.batch_first else x.transpose(0, 1))
        hidden = last[0] if isinstance(last, tuple) else last
        return self.head(y if self.layer.batch_first else y.transpose(0, 1)), hidden.transpose(0, 1)


class Cells(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        state = x.new_zeros(x.shape[0], 16)
        state = (state, state) if isinstance(self.cell, nn.LSTMCell) else state
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class GivenState(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(6, 16, num_layers=2, batch_first=True)

    def forward(self, x, state):
        y, last = self.layer(x, state.transpose(0, 1).contiguous())
        return y, last.transpose(0, 1)


MODELS = {
    "gru": (lambda: Net(nn.GRU, batch_first=True), "GRU", 1),
    "gru, two levels, both directions": (lambda: Net(nn.GRU, num_layers=2, bidirectional=True), "GRU", 2),
    "lstm": (lambda: Net(nn.LSTM, bias=False, batch_first=True), "LSTM", 1),
    "lstm, both directions": (lambda: Net(nn.LSTM, bidirectional=True, batch_first=True), "LSTM", 1),
    "lstm with a projection": (lambda: Net(nn.LSTM, proj_size=8, num_layers=2, bidirectional=True), "LSTM", 2),
    "rnn": (lambda: Net(nn.RNN, nonlinearity="relu", bidirectional=True, batch_first=True), "RNN", 1),
    "gru cell": (lambda: Cells(nn.GRUCell), "GRU", 5),
    "lstm cell": (lambda: Cells(nn.LSTMCell), "LSTM", 5),
    "gru with a state": (GivenState, "GRU", 2),
}


def quantize(model, data, levels="auto"):
    prepared = infoq_fx.prepare(model, data, levels=levels)
    widths = {"weight": 4, "activation": 8}
    bits = {site.name: widths[site.kind] for site in prepared.inventory.sites}
    return infoq_fx.convert(prepared, Allocation(bits=bits))


def make_data(name):
    state = {"state": torch.randn(12, 2, 16)} if name == "gru with a state" else {}
    return {"x": torch.randn(12, 5, 6), **state}


def flat(values):
    return values if isinstance(values, tuple) else (values,)


def run(path, level, feeds):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 4
    return onnxruntime.InferenceSession(str(path), options).run(None, feeds)


def some_slow(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", some_slow(MODELS, ["gru with a state"]))
def test_files_compute_what_the_module_computes(name, tmp_path):
    torch.manual_seed(0)
    make, op_type, count = MODELS[name]
    data = make_data(name)
    model = make().eval()
    quantized = quantize(model, data)
    fresh = {key: torch.randn(7, *x.shape[1:]) for key, x in data.items()}  # another batch
    with torch.no_grad():
        wanted = flat(quantized(*fresh.values()))
    feeds = {key: x.numpy() for key, x in fresh.items()}
    for container in ("exact", "int8"):
        path = infoq_fx.export_onnx(quantized, tmp_path / f"{container}.onnx", container=container)
        for level in (LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_ALL):
            for found, ours in zip(run(path, level, feeds), wanted, strict=True):
                np.testing.assert_allclose(found, ours.numpy(), atol=1e-5)
        graph = onnx.load(path).graph
        assert [node.op_type for node in graph.node].count(op_type) == count
    integers = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and not t.name.startswith("z")]
    matrices = sum(x.numel() for _, x in model.named_parameters() if x.ndim == 2)
    assert sum(int(np.prod(t.dims)) for t in integers) == matrices
    assert "sound" in infoq_fx.verify_onnx(path, quantized, data).verdict


@pytest.mark.parametrize("name", some_slow(MODELS, []))
def test_openvino_computes_the_same(name, tmp_path):
    openvino = pytest.importorskip("openvino")
    torch.manual_seed(0)
    data = make_data(name)
    quantized = quantize(MODELS[name][0]().eval(), data)
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled({key: x.numpy() for key, x in data.items()})
    with torch.no_grad():
        for index, ours in enumerate(flat(quantized(*data.values()))):
            assert np.linalg.norm(found[index] - ours.numpy()) <= 0.02 * np.linalg.norm(ours.numpy())


@pytest.mark.slow
def test_saved_modules_are_the_same(tmp_path):
    x = torch.randn(12, 5, 6)
    quantized = quantize(Net(nn.LSTM, num_layers=2, bidirectional=True, batch_first=True).eval(), x)
    loaded = infoq_fx.load_quantized(infoq_fx.save_quantized(quantized, tmp_path / "model.pt2"))
    with torch.no_grad():
        for copied in (loaded, pickle.loads(pickle.dumps(quantized)), copy.deepcopy(quantized)):
            for found, wanted in zip(flat(copied(x)), flat(quantized(x)), strict=True):
                assert torch.equal(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["infoq_paper", "ompq"])
def test_criteria_read_cells_by_sample(criterion):
    torch.manual_seed(1)
    data = torch.randn(32, 5, 6)
    prepared = infoq_fx.prepare(Cells(nn.GRUCell).eval(), data, bits=(2, 8), outputs=infoq_fx.Categorical())
    names = prepared.observer_nodes()
    assert {"cell", "cell.input"} <= names.keys()
    assert all(names[name].meta["val"].shape[0] != 1 for name in names)
    table = infoq_fx.score(prepared, data, criterion=criterion, progress=False)
    assert all(np.isfinite(score.value) for found in table.scores.values() for score in found.values())


@pytest.mark.slow
def test_qonnx_files_have_quant_nodes(tmp_path):
    quantized = quantize(Net(nn.GRU, batch_first=True).eval(), torch.randn(12, 5, 6), levels="uniform")
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx", target="qonnx")
    assert sum(node.op_type == "Quant" for node in onnx.load(path).graph.node) == 4 + 2


@pytest.mark.slow
def test_sums_of_embeddings_are_right_in_openvino(tmp_path):
    """It takes the scales of another axis where a reduction removes one."""
    openvino = pytest.importorskip("openvino")

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(40, 24, mode="max"), nn.Linear(24, 3)

        def forward(self, x):
            return self.head(self.bag(x))

    torch.manual_seed(0)
    ids = torch.randint(0, 40, (12, 6))
    quantized = quantize(Bag().eval(), ids)
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(compiled({"x": ids.numpy()})[0], quantized(ids).detach().numpy(), atol=1e-4)

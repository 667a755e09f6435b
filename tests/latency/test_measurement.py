"""From profiles to latencies of layers: by hand with given times, and on files that onnxruntime runs."""

import itertools
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import ResidualNet, randomise_norms
from torch import nn

import infoq_fx
from infoq_fx.errors import OptionError
from infoq_fx.latency.layer_nodes import (
    drop_quantization,
    find_optimized_owners,
    find_owners,
    find_shared,
    tag_nodes,
)
from infoq_fx.latency.measurement import Timing, add_up, split_layers
from infoq_fx.latency.sessions import open_session, optimized_path, read_profile, take_turns
from infoq_fx.types import Inventory, Operation

TWO = Inventory((), (Operation("a", 1, None, None), Operation("b", 1, None, None)), 0)


class Attention(nn.Module):
    """Layers with weights, matrix products without, and an addition, a softmax and views around them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.head = (nn.Linear(8, n) for n in (8, 8, 8, 3))

    def forward(self, x):
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        return self.head((scores.softmax(-1) @ self.v(x) + x).mean(1))


class Recurrent(nn.Module):
    """Recurrent layers of all kinds of weights: two directions, a projection, a cell that runs twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(8, 8), nn.Linear(6, 3)
        self.lstm = nn.LSTM(8, 6, proj_size=3, bidirectional=True, batch_first=True)
        self.cell = nn.GRUCell(6, 6)

    def forward(self, x):
        steps, _ = self.lstm(self.first(x))
        return self.head(self.cell(steps[:, 1], self.cell(steps[:, 0])))


def conv_net():
    torch.manual_seed(0)
    model = ResidualNet().eval()
    randomise_norms(model)
    return model, torch.randn(32, 1, 8, 8)


def attention():
    return Attention().eval(), torch.randn(32, 5, 8, generator=torch.Generator().manual_seed(1))


class Exported:
    """A prepared model, its file and the operation of each node; every use takes a copy of the file."""

    def __init__(self, made, folder):
        model, data = made
        self.prepared = infoq_fx.prepare(model, data, bits=8)
        bits = {site.name: 8 for site in self.prepared.inventory.sites}
        quantized = infoq_fx.convert(self.prepared, infoq_fx.Allocation(bits=bits))
        self.file = onnx.load(infoq_fx.export_onnx(quantized, folder / "model.onnx", container="int8"))
        self.owners = find_owners(self.file.graph, self.prepared.inventory)
        self.layers = [operation.name for operation in self.prepared.inventory.operations]

    def copy(self):
        file = onnx.ModelProto()
        file.CopyFrom(self.file)
        tag_nodes(file.graph)
        return file


@pytest.fixture(scope="module")
def convolutions(tmp_path_factory):
    return Exported(conv_net(), tmp_path_factory.mktemp("convolutions"))


@pytest.fixture(scope="module", params=["convolutions", pytest.param("attention", marks=pytest.mark.slow)])
def exported(request, tmp_path_factory):
    if request.param == "convolutions":
        return request.getfixturevalue("convolutions")
    return Exported(attention(), tmp_path_factory.mktemp("attention"))


def run(model, x):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy()})[0]


def optimized(model, owners, folder):
    onnx.save(model, folder / "tagged.onnx")
    open_session(folder / "tagged.onnx", 1, is_profiled=True).end_profiling()
    graph = onnx.load(optimized_path(folder / "tagged.onnx")).graph
    found = find_optimized_owners(graph, owners)
    return graph, found


def test_a_layer_gets_its_nodes_without_what_the_profiler_adds():
    """Four nodes of 2 us each too much: 0.008 ms of 0.1, and 0.01 of an empty graph."""
    owners = {"n1": "a", "n2": "a", "n3": "b", "n4": None}
    integers = Timing(0.1, {"n1": 0.022, "n2": 0.032, "n3": 0.042, "n4": 0.002}, owners)
    floats = Timing(0.2, {"n1": 0.1, "n3": 0.09}, owners)  # nothing added
    dequantized = Timing(0.4, {"n1": 0.2, "n3": 0.18}, owners)  # 5 us a node are not in the profile
    found = add_up(TWO, 0.01, integers, dequantized, floats)
    assert found.integer_ms == {"a": 0.05, "b": 0.04}
    assert found.rest_ms == 0.01
    assert found.float_ms == {"a": 0.1, "b": 0.09}
    assert found.weight_only_ms == {"a": 0.205, "b": 0.185}


def test_a_node_takes_no_time_below_nothing():
    """Half of 0.021 ms too much is more than one of two nodes takes: the other one has all of it."""
    timing = Timing(0.03, {"n1": 0.04, "n2": 0.001}, {"n1": "a", "n2": "b"})
    found = add_up(TWO, 0.01, timing, timing, timing)
    assert found.integer_ms == {"a": 0.02, "b": 0.0}
    assert found.rest_ms == 0.01


def test_operations_of_one_node_share_its_time_by_their_macs():
    inventory = replace(TWO, operations=(Operation("a", 30, None, None), Operation("b", 10, None, None)))
    timing = Timing(0.09, {"n1": 0.08}, {"n1": "a"}, {"a": ("a", "b")})
    found = add_up(inventory, 0.01, timing, timing, timing)
    assert found.integer_ms == {"a": 0.06, "b": 0.02}


@given(
    nodes=st.lists(st.floats(0, 100), min_size=1, max_size=30),
    idle=st.floats(0, 5),
    whole=st.floats(0, 500),
)
def test_layers_and_rest_add_up_to_the_whole(nodes, idle, whole):
    owners = {f"n{i}": "ab"[i % 2] for i in range(len(nodes))}
    timing = Timing(whole + idle, {f"n{i}": value for i, value in enumerate(nodes)}, owners)
    found = add_up(TWO, idle, timing, timing, timing)
    assert sum(found.integer_ms.values()) + found.rest_ms == pytest.approx(whole + idle, abs=1e-3)
    assert found.rest_ms == pytest.approx(idle, abs=1e-3)


def test_calls_take_turns_and_warm_up_and_the_median_counts():
    clock, order = itertools.count(), []
    times = take_turns(
        {"a": lambda: order.append("a"), "b": lambda: [next(clock), order.append("b")]}, 10, lambda: next(clock)
    )
    assert "".join(order) == (5 * "a" + 5 * "b") * 5
    assert times == {"a": 1e3, "b": 2e3}


def test_a_profile_gives_the_median_of_a_node_in_one_run():
    def node(name, dur, cat="Node"):
        return {"cat": cat, "name": name, "dur": dur}

    runs = [{"cat": "Session", "name": "model_run", "dur": 100}] * 3
    events = [*runs, *(node("n1_kernel_time", dur) for dur in (10, 90, 20)), node("n1_fence_before", 5)]
    events += [node("n2_kernel_time", 4) for _ in range(6)]  # in a loop, twice a run
    assert read_profile(events) == {"n1": 0.02, "n2": 0.008}


def test_every_second_quarter_of_the_layers():
    names = [f"op{i}" for i in range(8)]
    inventory = Inventory((), tuple(Operation(name, 1, None, None) for name in names), 0)
    assert split_layers(inventory, {}) == {"op2", "op3", "op6", "op7"}
    assert split_layers(inventory, {"op3": ("op3", "op4"), "op5": ("op5", "op6")}) == {"op2", "op3", "op4", "op7"}


def test_every_layer_is_found_in_the_file(exported):
    owners = dict(zip((node.name for node in exported.copy().graph.node), exported.owners, strict=True))
    kinds = {node.name: node.op_type for node in exported.copy().graph.node}
    assert [owners[name] for name in kinds if kinds[name] in ("Conv", "Gemm", "MatMul")] == exported.layers
    assert None not in owners.values()
    assert {owners[name] for name in kinds if kinds[name] == "Softmax"} <= {"matmul"}
    if "blocks.0.conv2" in exported.layers:  # an addition belongs to the later of two layers
        added = [owners[name] for name in kinds if kinds[name] == "Add"]
        assert added == ["blocks.0.conv2", "blocks.1.conv2"]


@pytest.mark.slow
def test_every_weight_of_a_recurrent_layer_has_its_share_of_a_node(tmp_path):
    """All weights of one node, projections too, and nothing of it belongs to the layers around it."""
    recurrent = Exported((Recurrent().eval(), torch.randn(32, 5, 8)), tmp_path)
    shared = find_shared(recurrent.file.graph, recurrent.prepared.inventory)
    assert [len(names) for names in shared.values()] == [6, 2, 2]
    assert {*recurrent.owners, *itertools.chain(*shared.values())} >= {*recurrent.layers}
    made = {node.op_type: owner for node, owner in zip(recurrent.file.graph.node, recurrent.owners, strict=True)}
    assert (made["LSTM"], made["GRU"], made["Gemm"]) == ("lstm.weight_ih_l0", "cell.weight_ih_1", "head")
    drop_quantization(recurrent.file, recurrent.owners, {None, *recurrent.owners}, keep_weights=False)
    assert "DequantizeLinear" not in {node.op_type for node in recurrent.file.graph.node if "bias" not in node.name}


@pytest.mark.parametrize("in_float", [False, True], ids=["integers", "float"])
def test_every_layer_is_found_in_what_the_runtime_makes_of_the_file(exported, in_float, tmp_path):
    file = exported.copy()
    if in_float:
        drop_quantization(file, exported.owners, set(exported.owners), keep_weights=False)
    graph, found = optimized(file, exported.owners, tmp_path)
    layers = [found[node.name] for node in graph.node if any(kind in node.op_type for kind in ("Conv", "Gemm", "Mat"))]
    assert sorted(layers) == sorted(exported.layers)
    assert None not in found.values()


def test_the_float_file_computes_with_the_dequantized_weights(exported):
    x = next(iter(exported.prepared.example_inputs.values()))
    outputs = {}
    for keep_weights in (True, False):
        changed = exported.copy()
        drop_quantization(changed, exported.owners, set(exported.owners), keep_weights=keep_weights)
        kinds = {node.op_type for node in changed.graph.node}
        assert "QuantizeLinear" not in kinds
        assert ("DequantizeLinear" in kinds) == keep_weights
        outputs[keep_weights] = run(changed, x)
    np.testing.assert_allclose(outputs[True], outputs[False], rtol=1e-5, atol=1e-6)
    error = np.linalg.norm(outputs[True] - run(exported.copy(), x)) / np.linalg.norm(outputs[True])
    assert 0 < error < 0.1


def test_only_the_chosen_layers_run_in_float(convolutions, tmp_path):
    file = convolutions.copy()
    drop_quantization(file, convolutions.owners, set(convolutions.layers[1:3]), keep_weights=False)
    graph, found = optimized(file, convolutions.owners, tmp_path)
    kinds = {found[node.name]: node.op_type for node in graph.node if "Conv" in node.op_type}
    # The layer before them gives floats, which no integer convolution does.
    assert [kind == "QLinearConv" for kind in kinds.values()] == [False, False, False, True, True]


@pytest.mark.slow
def test_a_measured_table_limits_a_budget(tmp_path, monkeypatch):
    model, data = conv_net()
    prepared = infoq_fx.prepare(model, data, bits=(4, 8))
    cost = infoq_fx.measure_latency(prepared, runs=5)
    names = [operation.name for operation in prepared.inventory.operations]
    for table in (cost.integer_ms, cost.weight_only_ms, cost.float_ms):
        assert list(table) == names
        assert all(value >= 0 for value in table.values())
        assert sum(table.values()) > 0
    assert [file.name for file in cost.files] == [
        "integers", "weights in integers, activations in float", "float", "every second quarter in float",
    ]  # fmt: skip
    assert all(file.whole_ms > 0 and file.sum_ms > 0 for file in cost.files)
    assert (cost.target, cost.threads) == ("onnxruntime", 1)
    assert cost.runtime == f"onnxruntime {onnxruntime.__version__}"
    cost.save(tmp_path / "latency.json")
    assert infoq_fx.load_latency(tmp_path / "latency.json") == cost
    monkeypatch.setitem(infoq_fx.COSTS, "latency_ms", cost)
    whole = sum(cost.integer_ms.values()) + cost.rest_ms
    budget = infoq_fx.Budget(weight_bits=5, costs={"latency_ms": 1.01 * whole})
    table = infoq_fx.score(prepared, criterion="weight_mse", progress=False)
    assert infoq_fx.allocate(table, budget).cost.costs["latency_ms"] == pytest.approx(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "openvino"}, "target 'openvino' has no runtime that layers are timed in; give one of"),
        ({"target": "qonnx"}, "target 'qonnx' has no runtime"),
        ({"target": "onnxrt"}, "unknown target 'onnxrt'.*'onnxruntime'"),
        ({"threads": 0}, "threads=0; give an integer of at least 1"),
        ({"runs": 0}, "runs=0; give"),
    ],
    ids=["openvino", "qonnx", "unknown", "threads", "runs"],
)
def test_what_cannot_be_timed_is_refused(options, message):
    prepared = infoq_fx.prepare(nn.Linear(4, 2), torch.randn(8, 4))
    with pytest.raises(OptionError, match=message):
        infoq_fx.measure_latency(prepared, **options)


def test_a_model_is_refused():
    with pytest.raises(OptionError, match=r"measure_latency\(\) got a Linear"):
        infoq_fx.measure_latency(nn.Linear(4, 2))

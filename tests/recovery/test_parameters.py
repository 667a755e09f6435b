"""Weights of a copy that recovery may change, in memory and on disk."""

import copy

import pytest
import torch
from torch import nn

import infoq_fx
from infoq_fx.graph.layers import read_tensor
from infoq_fx.graph.program import weight_storage
from infoq_fx.graph.program.weight_storage import move_to_disk
from infoq_fx.recovery import parameters
from infoq_fx.recovery.parameters import fork, set_parameter


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 4)).eval()


@pytest.mark.parametrize("least_bytes", [4, 1 << 20])
def test_a_fork_may_be_changed_in_any_way(monkeypatch, least_bytes):
    monkeypatch.setattr(weight_storage, "_LARGE_BYTES", least_bytes)
    monkeypatch.setattr(weight_storage, "_WORTH_A_FILE_BYTES", least_bytes)
    model = nn.Sequential(nn.Linear(8, 30), nn.LayerNorm(30), nn.Linear(30, 4)).eval()
    prepared = infoq_fx.prepare(model, torch.randn(50, 8))
    before = {name: x.clone() for name, x in prepared.graph_module.state_dict().items()}
    changed = fork(prepared)
    assert [type(x) for x in changed.graph_module.parameters()] == [type(x) for x in prepared.graph_module.parameters()]
    with torch.no_grad():
        for x in changed.graph_module.state_dict().values():
            x.zero_()
    changed.graph_module.double()
    set_parameter(changed, "0.weight", before["0.weight"] + 1)
    for name, x in prepared.graph_module.state_dict().items():
        assert x.dtype == before[name].dtype
        assert torch.equal(x, before[name])
    assert torch.equal(read_tensor(changed.graph_module, "0.weight"), before["0.weight"] + 1)


def test_large_weights_on_disk_are_those_in_memory(monkeypatch):
    model, x = two_layers(), torch.randn(50, 8)
    expected = infoq_fx.quantize(model, 4.0, calibration_data=x, progress=False)
    moved = []
    for module in (weight_storage, parameters):
        copy_to_disk = module.copy_to_disk
        monkeypatch.setattr(module, "copy_to_disk", lambda x, copies=copy_to_disk: moved.append(len(x)) or copies(x))
    monkeypatch.setattr(weight_storage, "_LARGE_BYTES", 4)
    monkeypatch.setattr(weight_storage, "_WORTH_A_FILE_BYTES", 4)
    monkeypatch.setattr(parameters, "_ON_DISK_BYTES", 4)
    found = infoq_fx.quantize(model, 4.0, calibration_data=x, progress=False)
    assert max(moved) >= 4
    assert len(moved) > 4
    assert torch.equal(found(x), expected(x))
    assert torch.equal(copy.deepcopy(found)(x), expected(x))


def test_small_models_stay_in_memory():
    graph_module = infoq_fx.prepare(two_layers(), torch.randn(50, 8)).graph_module
    place = read_tensor(graph_module, "0.weight").data_ptr()
    move_to_disk(graph_module)
    assert read_tensor(graph_module, "0.weight").data_ptr() == place

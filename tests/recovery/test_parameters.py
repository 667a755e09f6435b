"""Weights of a copy that recovery may change, in memory and on disk."""

import copy

import torch
from torch import nn

import infoq_fx
from infoq_fx.graph import layers
from infoq_fx.graph.layers import move_to_disk, read_tensor
from infoq_fx.recovery import parameters
from infoq_fx.recovery.parameters import fork, set_parameter


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 4)).eval()


def test_a_fork_shares_weights_until_one_is_replaced():
    prepared = infoq_fx.prepare(two_layers(), torch.randn(50, 8))
    before = read_tensor(prepared.graph_module, "0.weight").clone()
    changed = fork(prepared)
    shared = [read_tensor(x.graph_module, "0.weight").data_ptr() for x in (changed, prepared)]
    assert shared[0] == shared[1]
    set_parameter(changed, "0.weight", before + 1)
    assert torch.equal(read_tensor(prepared.graph_module, "0.weight"), before)
    assert torch.equal(read_tensor(changed.graph_module, "0.weight"), before + 1)
    quantizers = [dict(x.quantizer_nodes()).values() for x in (prepared, changed)]
    for own, copied in zip(*quantizers, strict=True):
        assert own is not copied
        assert not {x.data_ptr() for x in own.buffers()} & {x.data_ptr() for x in copied.buffers()}


def test_large_weights_on_disk_are_those_in_memory(monkeypatch):
    model, x = two_layers(), torch.randn(50, 8)
    expected = infoq_fx.quantize(model, 4.0, calibration_data=x, progress=False)
    moved = []
    for module in (layers, parameters):
        copy_to_disk = module.copy_to_disk
        monkeypatch.setattr(module, "copy_to_disk", lambda x, copies=copy_to_disk: moved.append(len(x)) or copies(x))
    monkeypatch.setattr(layers, "_LARGE_BYTES", 4)
    monkeypatch.setattr(layers, "_WORTH_A_FILE_BYTES", 4)
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

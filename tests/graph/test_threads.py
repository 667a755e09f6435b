"""Models captured by several threads at once."""

import threading
import warnings

import pytest
import torch
from torch import nn

import infoq_fx


class Encoder(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.e, self.h = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.h(self.e(x).mean(1))


def quantize(model, x):
    return infoq_fx.quantize(model, 4.0, calibration_data=x, bits=(2, 4, 8), progress=False)


@pytest.mark.slow
def test_two_threads_find_what_one_finds(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(16, 5, 16)
    models = [Encoder(seed) for seed in (1, 2)]
    alone = [quantize(model, x) for model in models]
    found, flags = {}, []
    fast_path, filters = torch.backends.mha.get_fastpath_enabled(), list(warnings.filters)

    def work(index):
        found[index] = quantized = quantize(models[index], x)
        infoq_fx.export_onnx(quantized, tmp_path / f"{index}.onnx")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        flags.append(torch.backends.mha.get_fastpath_enabled())
        threads[0].join(0.01)
        threads[1].join(0.01)
    assert len(found) == 2
    for index, quantized in found.items():
        assert infoq_fx.allocation_of(quantized).bits == infoq_fx.allocation_of(alone[index]).bits
        assert torch.equal(quantized(x), alone[index](x))
    assert set(flags) == {fast_path}
    assert list(warnings.filters) == filters
    assert all(model.training for model in models)


@pytest.mark.slow
def test_one_model_may_be_captured_by_several_threads_and_keeps_its_mode():
    torch.manual_seed(0)
    model, x, found = Encoder(1).train(), torch.randn(16, 5, 16), []

    def work():
        prepared = infoq_fx.prepare(model, x)
        found.append(prepared.graph_module(x))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert all(torch.equal(one, found[0]) for one in found)  # without dropout
    assert all(module.training for module in model.modules())

import copy
from types import SimpleNamespace

import pytest
import torch
from logits import compute_float_logits, compute_logits
from networks import ResidualNet, randomise_norms

import infoq_fx
from infoq_fx.core.data import read_data
from infoq_fx.quantization.quantizers import Quantizer
from infoq_fx.runtime import forward
from infoq_fx.runtime.forward import RunOptions, choose_batch_size


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(1)
    return randomise_norms(ResidualNet()).eval()


@pytest.fixture(scope="module")
def prepared_and_data(net):
    images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    prepared = infoq_fx.prepare(net, images, bits=(2, 4, 8), activation_bits=(4, 8))
    return prepared, read_data(images).named(prepared.input_names)


@pytest.mark.parametrize("threads", [1, 3])
def test_logits_at_any_bits_are_those_of_the_prepared_module(threads, prepared_and_data):
    prepared, data = prepared_and_data
    searched = [site for site in prepared.inventory.sites if len(site.bits) > 1]
    bits = {site.name: site.bits[index % len(site.bits)] for index, site in enumerate(searched)}
    found = compute_logits(prepared, data, bits, batch_size=24, run_options=RunOptions(threads=threads))
    module = copy.deepcopy(prepared.graph_module)
    for quantizer in module.modules():
        if isinstance(quantizer, Quantizer):
            quantizer.bits = bits.get(quantizer.site.name, 8)
    with torch.no_grad():
        torch.testing.assert_close(found, module(data.inputs["x"]), rtol=1e-5, atol=1e-5)


def test_unnamed_sites_are_at_8_bits(prepared_and_data):
    prepared, data = prepared_and_data
    all_named = {site.name: 8 for site in prepared.inventory.sites}
    assert torch.equal(compute_logits(prepared, data), compute_logits(prepared, data, all_named))


@pytest.mark.parametrize("threads", [1, 2])
def test_float_logits_are_the_models_own(threads, prepared_and_data, net):
    prepared, data = prepared_and_data
    found = compute_float_logits(prepared, data, batch_size=20, run_options=RunOptions(threads=threads))
    with torch.no_grad():
        torch.testing.assert_close(found, net(data.inputs["x"]), rtol=1e-4, atol=1e-5)


def test_the_batch_suits_the_model(prepared_and_data):
    assert choose_batch_size(prepared_and_data[0]) == 64


@pytest.mark.parametrize(("value_bytes", "expected"), [(1 << 20, 1024), (1 << 26, 160)])
def test_batches_fill_a_gpu(monkeypatch, value_bytes, expected):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 << 30))
    monkeypatch.setattr(forward, "measure_peak_and_largest_bytes", lambda prepared: (value_bytes, value_bytes))
    prepared = SimpleNamespace(device=torch.device("cuda"), batch_size=None)
    assert choose_batch_size(prepared) == expected
    assert choose_batch_size(prepared, 1 << 30) == min(expected, (1 << 28) // value_bytes)

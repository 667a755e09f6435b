"""What is alive at once in a run that frees values as it goes."""

import pytest
import torch
from torch import nn

import infoq_fx
from infoq_fx.runtime.forward import bytes_per_sample, choose_batch_size, choose_perturbed_batch_size
from infoq_fx.runtime.value_sizes import measure_peak_and_largest_bytes, measure_peak_bytes, measure_sizes


@pytest.mark.slow
def test_a_chain_holds_two_values_at_once():
    layers = [nn.Linear(8, 100), nn.ReLU(), nn.Linear(100, 60), nn.ReLU(), *[nn.Linear(60, 60) for _ in range(20)]]
    prepared = infoq_fx.prepare(nn.Sequential(*layers).eval(), torch.randn(20, 8), activation_bits=None)
    assert measure_peak_bytes(prepared) == 4 * (100 + 100)
    sizes = measure_sizes(prepared)
    assert sum(sizes.values()) > 4 * (8 + 2 * 100 + 21 * 60)
    assert not any(node.op == "get_attr" for node in sizes)


def test_a_skipped_value_stays_alive():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 50), nn.Linear(8, 50)

        def forward(self, x):
            return (self.first(x).relu().cumsum(1) + self.second(x)).sum(1, keepdim=True)

    prepared = infoq_fx.prepare(Skip().eval(), torch.randn(20, 8), activation_bits=None)
    assert measure_peak_bytes(prepared) == 4 * (50 + 50 + 50)


@pytest.mark.slow
def test_whole_runs_take_larger_batches_than_runs_that_hold_all_sites():
    layers = [m for _ in range(30) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())]
    prepared = infoq_fx.prepare(nn.Sequential(*layers).eval(), torch.randn(2, 4, 24, 24))
    assert measure_peak_bytes(prepared) == 2 * 4 * 4 * 24 * 24
    assert bytes_per_sample(prepared) == 30 * 4 * 4 * 24 * 24
    limit = 4 * 12 * measure_peak_bytes(prepared)
    assert choose_batch_size(prepared, limit) == 12
    assert choose_perturbed_batch_size(prepared, limit) == 2


def test_no_value_of_a_batch_is_larger_than_24_mib():
    model = nn.Sequential(nn.Conv2d(1, 64, 1), nn.Conv2d(64, 1, 1)).eval()
    prepared = infoq_fx.prepare(model, torch.randn(2, 1, 128, 128))
    assert measure_peak_and_largest_bytes(prepared)[1] == 4 << 20
    assert choose_batch_size(prepared) == choose_perturbed_batch_size(prepared) == 6

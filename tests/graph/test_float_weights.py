"""Weights that stay in float: said once, by name, and counted by every cost."""

import warnings

import pytest
import torch
from torch import nn

import infoq_fx


class Positions(nn.Module):
    """A position embedding and a table that is both multiplied and added, between two linear layers."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)
        self.positions = nn.Parameter(torch.randn(1, 80, 16))
        self.both = nn.Parameter(torch.randn(80, 80))

    def forward(self, x):
        y = self.first(x) + self.positions
        mixed = y.transpose(1, 2) @ self.both
        return self.last(mixed.transpose(1, 2) + self.both.sum(0)[:, None] + y)[:, 0]


DATA = torch.randn(6, 80, 8)


def test_large_float_weights_are_named_in_one_warning_and_counted():
    model = Positions().eval()
    with pytest.warns(UserWarning, match="stay in float") as seen:
        prepared = infoq_fx.prepare(model, DATA, bits=8)
    (message,) = [str(one.message) for one in seen]
    assert "'positions' (1,280 elements)" in message
    assert "'both' (6,400 elements)" in message
    inventory = prepared.inventory
    assert inventory.ignored_weights == 1280 + 6400
    biases = 16 + 3
    assert inventory.float_bytes == 4 * (1280 + 6400 + biases)


def test_ignored_float_weights_are_counted_without_a_warning():
    model = Positions().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = infoq_fx.prepare(model, DATA, bits=8, ignore=["positions", "both"])
    assert prepared.inventory.ignored_weights >= 1280


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_all_weights_of_recurrent_layers_are_sites(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = kind(8, 16, num_layers=2, bidirectional=True, batch_first=True)

        def forward(self, x):
            return self.layer(x)[0]

    model = Net().eval()
    prepared = infoq_fx.prepare(model, DATA[:, :5], bits=8)
    weights = {name: x.numel() for name, x in model.named_parameters() if x.ndim == 2}
    sites = {site.name: site.numel for site in prepared.inventory.sites if site.kind == "weight"}
    assert sites == weights
    assert prepared.inventory.ignored_weights == 0
    assert prepared.inventory.float_bytes == 4 * sum(x.numel() for x in model.parameters() if x.ndim == 1)
    assert {op.name: op.macs for op in prepared.inventory.operations} == {n: 5 * count for n, count in weights.items()}
    ignored = infoq_fx.prepare(model, DATA[:, :5], bits=8, ignore=["layer.weight_hh*"]).inventory
    assert ignored.ignored_weights == sum(count for name, count in weights.items() if "_hh_" in name)

"""The outputs that are read, and how many positions of a sample they have."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import infoq_fx
from infoq_fx.runtime.outputs import count_positions


class Heads(nn.Module):
    """Classes, a map of them, boxes and a vector, of the same images."""

    def __init__(self, *names):
        super().__init__()
        self.conv, self.linear, self.names = nn.Conv2d(3, 5, 3), nn.Linear(5, 4), names

    def forward(self, x):
        features = self.conv(x)
        found = {
            "map": features,
            "classes": self.linear(features.mean((2, 3))),
            "tokens": self.linear(features.flatten(2).mT),
        }
        return tuple(found[name] for name in self.names)


@pytest.mark.parametrize(
    ("names", "outputs", "expected"),
    [
        (("map",), {"output_0": infoq_fx.Categorical(axis=1)}, 64),
        pytest.param(("map",), "quantity", 64, marks=pytest.mark.slow),
        pytest.param(("tokens",), {"output_0": infoq_fx.Categorical(axis=-1)}, 64, marks=pytest.mark.slow),
        pytest.param(("classes",), "categorical", 1, marks=pytest.mark.slow),
        (("map", "classes"), {"output_0": "quantity", "output_1": "categorical"}, 1),
        (("map", "classes"), {"output_0": "quantity", "output_1": "ignored"}, 64),
    ],
)
def test_positions_are_those_of_the_output_with_the_fewest(names, outputs, expected):
    prepared = infoq_fx.prepare(Heads(*names).eval(), torch.randn(4, 3, 10, 10), outputs=outputs)
    assert count_positions(prepared) == expected


@pytest.mark.parametrize(
    ("name", "bits", "expected"), [("map", (2, 8), 32), ("map", (2, 16), 64), ("classes", (2, 8), 96)]
)
def test_outputs_of_many_positions_are_scored_on_fewer_samples(name, bits, expected):
    model, data = Heads(name).eval(), torch.randn(120, 3, 10, 10)
    prepared = infoq_fx.prepare(model, data, bits=bits, outputs="categorical")
    sites = [site for site in prepared.inventory.sites if site.kind == "weight"]
    assert infoq_fx.InfoQ().choose_samples(prepared, sites, 120) == expected
    assert infoq_fx.InfoQ(samples=50).choose_samples(prepared, sites, 120) == 50


@pytest.mark.parametrize(
    ("output", "bits", "layers", "samples", "expected"),
    [
        ("classes", (2, 3, 8), 53, 500, 75),
        ("classes", (2, 3, 8), 50, 256, 48),
        ("classes", (2, 3, 8), 20, 1024, 96),
        ("classes", (2, 3, 8, 16), 53, 500, 192),
        ("map", (2, 3, 8), 70, 180, 20),
        ("map", (2, 3, 8), 70, 128, 16),
    ],
)
def test_networks_of_many_layers_are_scored_on_samples_for_eight_passes(output, bits, layers, samples, expected):
    prepared = infoq_fx.prepare(Heads(output).eval(), torch.randn(4, 3, 10, 10), bits=bits, outputs="categorical")
    site = next(site for site in prepared.inventory.sites if site.kind == "weight")
    sites = [replace(site, name=f"{index}.weight") for index in range(layers)]
    assert infoq_fx.InfoQ().choose_samples(prepared, sites, samples) == expected

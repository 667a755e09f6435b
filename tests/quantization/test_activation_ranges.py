"""Which activations have outliers, and what they lose at 8 bits."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional

import infoq_fx

SAMPLES = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
DOWN = "down.input"


class FeedForward(nn.Module):
    """The second layer reads GELU; ``gain`` multiplies three of its 64 channels."""

    def __init__(self, gain):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 16), nn.Linear(16, 4)
        self.register_buffer("gain", torch.ones(64).index_fill_(0, torch.tensor([3, 20, 41]), gain))

    def forward(self, x):
        return self.head(self.down(functional.gelu(self.up(x) * self.gain)).relu())


def test_channels_far_above_the_rest_are_found_first(caplog):
    with caplog.at_level(logging.INFO, "infoq_fx"):
        prepared = infoq_fx.prepare(FeedForward(80.0).eval(), SAMPLES, bits=8)
    first, *others = infoq_fx.rank_activations(prepared)
    assert (first.site, first.has_outliers) == (DOWN, True)
    assert not any(activation.has_outliers for activation in others)
    assert f"1 activations have outliers, {DOWN!r} the most" in caplog.text
    text = infoq_fx.summarize(prepared)
    assert text.splitlines()[1].split()[:1] == [DOWN]
    assert "1 of 3 activations have outliers" in text
    assert "activation_bits=(8, 16)" in text
    assert "<table>" in text._repr_html_()


def test_what_is_recorded_is_what_the_values_say():
    prepared = infoq_fx.prepare(FeedForward(1.0).eval(), SAMPLES, bits=8)
    ranges = {activation.site: activation for activation in infoq_fx.rank_activations(prepared)}
    assert [x.error for x in ranges.values()] == sorted((x.error for x in ranges.values()), reverse=True)
    assert not any(activation.has_outliers for activation in ranges.values())
    found, values = ranges["up.input"], SAMPLES.double()
    assert found.peak == pytest.approx(float((values - values.mean()).abs().max() / values.std(correction=0)), rel=1e-3)
    quantizer = next(q for _, q in prepared.quantizer_nodes() if q.site.name == "up.input")
    error = (quantizer.quantize_at(SAMPLES, 8) - SAMPLES).square().mean() / SAMPLES.square().mean()
    assert found.error == pytest.approx(float(error), rel=0.05)
    assert "0 of 3 activations have outliers" in infoq_fx.summarize(prepared).splitlines()[-1]


def test_the_step_that_moves_factors_records_what_is_left():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    with torch.no_grad():
        model[0].weight[[3, 20, 41]] *= 80
    prepared = infoq_fx.prepare(model, SAMPLES, bits=8)
    before = {x.site: x for x in infoq_fx.rank_activations(prepared)}
    allocation = infoq_fx.Allocation(bits=dict.fromkeys((site.name for site in prepared.inventory.sites), 8))
    recovered = infoq_fx.recover(prepared, allocation, SAMPLES, "range_equalization", progress=False)
    assert recovered.recovered_by == ("range_equalization",)
    after = {x.site: x for x in infoq_fx.rank_activations(recovered)}
    assert (before["2.input"].has_outliers, after["2.input"].has_outliers) == (True, False)
    assert after["2.input"].error < 0.9 * before["2.input"].error
    assert infoq_fx.rank_activations(prepared)[0] == before["2.input"]


def test_a_model_without_calibration_data_has_none():
    prepared = infoq_fx.prepare(FeedForward(1.0).eval(), example_inputs=SAMPLES[:2], activation_bits=None)
    assert infoq_fx.rank_activations(prepared) == ()
    with pytest.raises(infoq_fx.OptionError, match="rank_activations"):
        infoq_fx.rank_activations(FeedForward(1.0))

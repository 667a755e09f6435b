"""ALPS against its definition."""

import pytest
import torch
from differentiated import measure, prepare
from torch import nn

import infoq_fx
from infoq_fx.runtime.forward import RunOptions
from infoq_fx.scoring.criteria.literature.alps import ALPS, Finetuning
from infoq_fx.scoring.gradients import read_labelled


def test_alps_without_training_is_the_increase_of_the_loss(small):
    _, _, _, prepared, data = small
    scores = measure(ALPS(steps=0), prepared, data)
    expected = measure(infoq_fx.scoring.criteria.Loss(), prepared, data)
    for site, by_bits in expected.items():
        for bits, score in by_bits.items():
            assert scores[site][bits].value == pytest.approx(score.value, abs=1e-4)
            assert scores[site][bits].standard_error == pytest.approx(score.standard_error, abs=1e-4)


def test_alps_counts_the_accuracy_too(small):
    _, _, _, prepared, data = small
    scores = measure(ALPS(steps=0, by="accuracy"), prepared, data)
    expected = measure(infoq_fx.scoring.criteria.Accuracy(), prepared, data)
    assert {s: {b: v.value for b, v in by.items()} for s, by in scores.items()} == {
        s: {b: pytest.approx(v.value, abs=1e-6) for b, v in by.items()} for s, by in expected.items()
    }
    assert ALPS(by="accuracy").describe(prepared, data) == ALPS().describe(prepared, data)


def test_finetuning_makes_good_what_it_can():
    torch.manual_seed(4)
    model, x = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval(), torch.randn(96, 6)
    prepared, data = prepare(model, x, outputs="categorical")
    chosen = read_labelled("alps", prepared, data, 96, batch_size=32, run_options=RunOptions())
    losses = [
        float(
            Finetuning(steps, 32, 0.02, 0, 32)
            .run(prepared, chosen, {"0.weight": 2}, RunOptions(), lambda share: None)[0]
            .mean()
        )
        for steps in (0, 20)
    ]
    assert losses[1] < 0.9 * losses[0]

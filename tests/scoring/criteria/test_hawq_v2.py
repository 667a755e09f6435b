"""HAWQ-V2 against an independent implementation of its definition."""

import math

import numpy as np
import pytest
import torch
from differentiated import WEIGHTS, measure, weight_error
from torch.nn import functional

import infoq_fx
from infoq_fx.runtime.forward import RunOptions
from infoq_fx.scoring.criteria.literature.hawq_v2 import HAWQv2


def exact_average_trace(model, x, labels, site):
    def loss(weight):
        return functional.cross_entropy(torch.func.functional_call(model, {site: weight}, x), labels)

    weight = model.get_parameter(site).detach()
    hessian = torch.autograd.functional.hessian(loss, weight).reshape(weight.numel(), weight.numel())
    return float(hessian.trace()) / weight.numel()


@pytest.mark.parametrize("batch_size", [24, 12])
def test_hawq_v2_estimates_the_exact_trace(batch_size, small):
    model, x, labels, prepared, data = small
    criterion = HAWQv2(probes=300, samples=24)
    found = criterion.begin(prepared, data, batch_size=batch_size, run_options=RunOptions())
    for site in WEIGHTS:
        error = found.standard_error[site]
        expected = exact_average_trace(model, x, labels, site)
        assert error < 0.07 * expected
        assert found.average_trace[site] == pytest.approx(expected, abs=4 * error)


def test_hawq_v2_is_trace_times_squared_error(small):
    model, _, _, prepared, data = small
    criterion = HAWQv2(samples=24)
    found = criterion.begin(prepared, data, batch_size=8, run_options=RunOptions())
    for site, by_bits in measure(criterion, prepared, data).items():
        for bits, score in by_bits.items():
            power = float(weight_error(model, prepared, site, bits).square().sum())
            assert score.value == pytest.approx(max(0.0, found.average_trace[site]) * power, rel=1e-5)
            assert score.standard_error == pytest.approx(found.standard_error[site] * power, rel=1e-5)


def test_the_standard_error_of_hawq_v2_is_the_spread_over_seeds(small):
    _, _, _, prepared, data = small
    runs = [HAWQv2(seed=s, samples=16).begin(prepared, data, batch_size=4, run_options=RunOptions()) for s in range(40)]
    for site in WEIGHTS:
        spread = np.std([run.average_trace[site] for run in runs], ddof=1)
        claimed = math.sqrt(np.mean([run.standard_error[site] ** 2 for run in runs]))
        assert claimed == pytest.approx(spread, rel=0.35)


def test_a_negative_trace_counts_as_none(small):
    _, _, _, prepared, _ = small
    found = [
        infoq_fx.scoring.criterion.Measurement(
            "0.weight", 2, {"average_trace": -1.0, "average_trace:standard_error": 0.5, "squared_error": 2.0}
        )
    ]
    score = HAWQv2().score(prepared, found)["0.weight"][2]
    assert (score.value, score.standard_error) == (0.0, 1.0)

"""Second moments of what enters a layer."""

import numpy as np
import pytest
import torch
from recovered import CONTEXT
from torch import nn

import infoq_fx
from infoq_fx.core.data import read_data
from infoq_fx.recovery.candidates import Candidates
from infoq_fx.recovery.layerwise_runner import LayerwiseRunner
from infoq_fx.recovery.moments import input_moments
from infoq_fx.recovery.moments.input_moments import (
    InputMoments,
    InputSamples,
    RunningMoments,
    average_moments,
    measure_moments,
)
from infoq_fx.recovery.moments.row_products import dequantize_rows
from infoq_fx.recovery.moments.unfolding import input_rows
from infoq_fx.recovery.parameters import fork
from infoq_fx.runtime.forward import RunOptions


def test_moments_are_those_of_numpy(residual):
    prepared, data, bits = residual
    runner = LayerwiseRunner(fork(prepared), bits, data, CONTEXT)
    runner.advance(runner.segments[0])
    layer = runner.segments[1].layers[1]
    halves = measure_moments(runner, layer, 10**9)
    found = average_moments(halves).centre()
    read = lambda _, p: [dequantize_rows(input_rows(layer, x, 10**6)) for x in (p.reference, p.quantized)]  # noqa: E731
    rows = list(runner.collect(layer.source, read))
    x, y = (torch.cat([pair[i] for pair in rows], 1)[0].double().numpy() for i in range(2))
    joint = np.cov(x, y, rowvar=False, bias=True)
    columns = x.shape[1]
    assert np.allclose(found.second[0], joint[columns:, columns:], atol=1e-6)
    assert np.allclose(found.cross[0], joint[:columns, columns:], atol=1e-6)
    assert np.allclose(found.mean[0], x.mean(0), atol=1e-6)
    assert found.count == len(x)
    half = average_moments([halves[0]])
    assert torch.equal(half.second, halves[0].second)


@pytest.mark.parametrize(
    ("samples", "columns", "kind"),
    [(6, 96, InputSamples), (40, 48, InputMoments), (40, 2200, InputSamples), (200, 2200, InputMoments)],
)
def test_few_rows_of_many_columns_are_kept_as_they_are(samples, columns, kind):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(columns, 5)), torch.randn(samples, columns)
    prepared = infoq_fx.prepare(model.eval(), x)
    data = read_data(x).named(prepared.input_names)
    runner = LayerwiseRunner(fork(prepared), {}, data, CONTEXT)
    (segment,) = [one for one in runner.segments if one.layers]
    halves = measure_moments(runner, segment.layers[0], 10**6)
    assert {type(half) for half in halves} == {kind}
    assert average_moments(halves).count == samples


def test_more_columns_than_moments_can_have(monkeypatch):
    monkeypatch.setattr(input_moments, "MOST_COLUMNS", 47)
    model, x = nn.Sequential(nn.Linear(48, 5)), torch.randn(40, 48)
    prepared = infoq_fx.prepare(model.eval(), x)
    data = read_data(x).named(prepared.input_names)
    runner = LayerwiseRunner(fork(prepared), {}, data, CONTEXT)
    (segment,) = [one for one in runner.segments if one.layers]
    assert measure_moments(runner, segment.layers[0], 10**6) is None
    assert Candidates(prepared, data).round(prepared.inventory.sites, RunOptions()).rounded == {}
    assert infoq_fx.recover(prepared, infoq_fx.allocate(infoq_fx.score(prepared, x, progress=False), 4.0), x)


@pytest.mark.parametrize("columns", [40, 1100])
def test_rows_of_several_batches_are_multiplied_together(columns):
    torch.manual_seed(0)
    batches = [(torch.randn(2, rows, columns), torch.randn(2, rows, columns)) for rows in (700, 7, 500, 3)]
    moments, alone = RunningMoments(), RunningMoments()
    for x, y in batches:
        moments.add(x, y, 10**6)
        alone.add(y, y, 10**6)
    found, same = moments.finish(), alone.finish()
    x, y = (torch.cat([batch[i] for batch in batches], 1).double() for i in range(2))
    for second in (found.second, same.second, same.cross):
        assert torch.allclose(second.double(), y.mT @ y / 1210, atol=1e-4)
        assert torch.equal(second, second.mT)
    assert torch.allclose(found.cross.double(), x.mT @ y / 1210, atol=1e-4)
    assert torch.allclose(found.mean, x.mean(1))
    assert torch.allclose(found.mean_quantized, y.mean(1))

"""Second moments of what enters a layer."""

import numpy as np
import torch
from recovered import CONTEXT

from infoq_fx.recovery.input_moments import average_moments, measure_moments
from infoq_fx.recovery.layerwise_runner import LayerwiseRunner
from infoq_fx.recovery.parameters import fork
from infoq_fx.recovery.unfolding import input_rows


def test_moments_are_those_of_numpy(residual):
    prepared, data, bits = residual
    runner = LayerwiseRunner(fork(prepared), bits, data, CONTEXT)
    runner.advance(runner.segments[0])
    segment, layer = runner.segments[1], runner.segments[1].layers[1]
    halves = measure_moments(runner, segment, layer, 10**9)
    found = average_moments(halves).centre()
    rows = runner.collect(
        segment,
        layer.source,
        lambda _, p: (input_rows(layer, p.reference, 10**6), input_rows(layer, p.quantized, 10**6)),
    )
    x, y = (torch.cat([pair[i] for pair in rows], 1)[0].double().numpy() for i in range(2))
    joint = np.cov(x, y, rowvar=False, bias=True)
    columns = x.shape[1]
    assert np.allclose(found.second[0], joint[columns:, columns:], atol=1e-6)
    assert np.allclose(found.cross[0], joint[:columns, columns:], atol=1e-6)
    assert np.allclose(found.mean[0], x.mean(0), atol=1e-6)
    assert found.count == len(x)
    half = average_moments([halves[0]])
    assert torch.equal(half.second, halves[0].second)

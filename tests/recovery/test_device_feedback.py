"""The loops of a GPU, run on the CPU, against the compiled ones."""

import numpy as np
import pytest
import torch

from infoq_fx.quantization.codebooks import table_of_levels
from infoq_fx.recovery import device_feedback, error_feedback
from infoq_fx.recovery.second_order import factorize, factorize_inputs

NEAREST = table_of_levels(torch.arange(-4, 4))


def problem(seed, *, input_rows, columns=30, rows=9, groups=2):
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(groups, input_rows, columns, generator=draw, dtype=torch.float64)
    weights = torch.randn(groups, rows, columns, generator=draw)
    steps = 0.2 + torch.rand(groups, rows, generator=draw)
    return inputs, weights, steps


@pytest.mark.parametrize("seed", range(3))
def test_loops_over_moments_are_those_of_the_cpu(seed):
    inputs, weights, steps = problem(seed, input_rows=90)
    curvature = factorize(inputs.mT @ inputs / 90)
    q, errors = np.empty(weights.shape, np.float32), np.empty(weights.shape, np.float32)
    error_feedback.pass_errors_on(weights.numpy(), curvature.factor.numpy(), steps.numpy(), NEAREST, q, errors)
    found = device_feedback.pass_errors_on(weights, curvature.factor, steps, torch.from_numpy(NEAREST))
    assert np.array_equal(found[0].numpy(), q)
    assert np.allclose(found[1].numpy(), errors, atol=1e-5)
    start = torch.zeros_like(weights)
    gradient = (start * steps[..., None] - weights) @ curvature.second
    settled = device_feedback.descend(
        start, gradient.clone(), curvature.second, steps, torch.from_numpy(NEAREST), sweeps=5
    )
    expected = start.numpy().copy()
    error_feedback.descend(expected, gradient.numpy(), curvature.second.numpy(), steps.numpy(), NEAREST, 5)
    assert np.array_equal(settled.numpy(), expected)
    assert expected.any()


@pytest.mark.parametrize("seed", range(3))
def test_loops_over_input_rows_are_those_of_the_cpu(seed):
    inputs, weights, steps = problem(seed, input_rows=4)
    ridge = torch.tensor([0.05, 0.2], dtype=torch.float64)
    curvature = factorize_inputs(inputs, ridge)
    columns, nearest = curvature.inputs.mT.contiguous(), torch.from_numpy(NEAREST)
    assert torch.allclose(device_feedback.find_shares(columns, ridge), curvature.shares)
    expected, form = curvature.pass_errors_on(weights, steps, NEAREST)
    found = device_feedback.pass_errors_on_inputs(weights, columns, curvature.shares, ridge, steps, nearest)
    assert torch.equal(found[0], expected)
    assert torch.allclose(found[1], form, atol=1e-5)
    start = torch.zeros_like(weights)
    settled = device_feedback.descend_on_inputs(start, weights, columns, ridge, steps, nearest, sweeps=5)
    assert torch.equal(settled, curvature.descend(start, weights, steps, NEAREST, 5))
    assert bool(settled.any())

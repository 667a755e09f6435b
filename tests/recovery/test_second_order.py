"""Rounding to second order, against brute force and the definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infoq_fx.quantization.codebooks import table_of_levels
from infoq_fx.recovery.moments.input_moments import InputMoments, InputSamples
from infoq_fx.recovery.second_order import factorize, factorize_inputs, round_rows


def random_problem(seed, groups=2, rows=3, columns=5, correlated=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 40, columns, generator=generator, dtype=torch.float64)
    if correlated:
        x = x @ torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64)
    ideal = torch.randn(groups, rows, columns, generator=generator, dtype=torch.float64)
    second = x.mT @ x / 40 + 0.01 * torch.eye(columns, dtype=torch.float64)
    return ideal, second


def within(low, high):
    """All integers of a range, as the levels that are rounded to."""
    return table_of_levels(torch.arange(low, high + 1))


def quadratic_error(difference, second):
    return ((difference @ second) * difference).sum(2)


def brute_force(ideal, second, step, low, high):
    """Least error of every row over all integers."""
    columns = ideal.shape[2]
    grid = torch.cartesian_prod(*[torch.arange(low, high + 1)] * columns).to(ideal)
    difference = grid * step - ideal[:, :, None]
    return torch.einsum("grni,gij,grnj->grn", difference, second, difference).amin(2)


@pytest.mark.parametrize("seed", range(5))
def test_rounding_comes_near_the_best_of_all_integers(seed):
    ideal, second = random_problem(seed)
    scales = torch.full((2, 3, 1), 0.8)
    nearest = torch.round(ideal / 0.8).clamp(-2, 1) * 0.8
    q, step = round_rows(ideal, factorize(second), scales, within(-2, 1), sweeps=8)
    assert set(q.unique().tolist()) <= {-2.0, -1.0, 0.0, 1.0}
    assert torch.equal(step, scales[..., 0])
    found = quadratic_error(q.double() * 0.8 - ideal, second)
    best = brute_force(ideal, second, 0.8, -2, 1)
    plain = quadratic_error(nearest - ideal, second)
    assert bool((found >= best - 1e-6).all())
    assert float(found.sum()) < 0.9 * float(plain.sum())
    assert float(found.sum()) < 1.35 * float(best.sum())


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 200), st.integers(2, 5))
def test_rounding_properties(seed, rows, columns, bits):
    ideal, second = random_problem(seed, 1, rows, columns)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    scales = torch.tensor([0.3, 0.6]).expand(1, rows, 2)
    q, step = round_rows(ideal, factorize(second), scales, within(low, high), sweeps=2)
    assert bool((q == q.round()).all())
    assert low <= float(q.min())
    assert float(q.max()) <= high
    found = quadratic_error(q.double() * step[..., None] - ideal, second)
    for scale in (0.3, 0.6):
        one, _ = round_rows(ideal, factorize(second), torch.full((1, rows, 1), scale), within(low, high), sweeps=0)
        error = quadratic_error(one.double() * scale - ideal, second)
        assert bool((found <= error * (1 + 1e-4) + 1e-6).all())


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_rounding_follows_its_definition(rows):
    """Optimal Brain Surgeon literally: round a column, spread its error over the rest, take the column out."""
    ideal, second = random_problem(7, 2, rows, 9)
    scales = torch.rand(2, rows, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    found, _ = round_rows(ideal, factorize(second), scales, within(-4, 3), sweeps=0)
    step = scales[..., 0].double()
    for group in range(2):
        left, values = second[group].diagonal().argsort(descending=True, stable=True).tolist(), ideal[group].clone()
        while left:
            column, inverse = left[0], torch.linalg.inv(second[group][left][:, left])
            q = torch.round(values[:, column] / step[group]).clamp(-4, 3)
            assert torch.equal(found[group, :, column].double(), q)
            error = (values[:, column] - q * step[group]) / inverse[0, 0]
            values[:, left] -= error[:, None] * inverse[0]
            left = left[1:]


def test_descent_ends_where_no_single_change_helps():
    ideal, second = random_problem(8, 2, 40, 12)
    scales = torch.full((2, 40, 1), 0.7)
    q, step = round_rows(ideal, factorize(second), scales, within(-4, 3), sweeps=50)
    reached = quadratic_error(q.double() * step[..., None] - ideal, second)
    for column in range(12):
        for move in (-1, 1):
            other = q.double().clone()
            other[..., column] = (other[..., column] + move).clamp(-4, 3)
            error = quadratic_error(other * step[..., None] - ideal, second)
            assert bool((error >= reached - 1e-4).all())


@pytest.mark.parametrize("rows_are_few", [False, True])
def test_descent_among_levels_ends_where_no_other_level_helps(rows_are_few):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 6, 12, generator=generator, dtype=torch.float64)
    ridge = torch.full((2,), 0.3, dtype=torch.float64)
    second = x.mT @ x + 0.3 * torch.eye(12, dtype=torch.float64)
    ideal, levels = torch.randn(2, 20, 12, generator=generator, dtype=torch.float64), torch.tensor([-63, -11, 4, 40])
    curvature = factorize_inputs(x, ridge) if rows_are_few else factorize(second)
    scales = torch.full((2, 20, 1), 0.03)
    q, step = round_rows(ideal, curvature, scales, table_of_levels(levels), sweeps=50)
    assert set(q.unique().tolist()) <= set(levels.tolist())
    reached = quadratic_error(q.double() * step[..., None] - ideal, second)
    for column in range(12):
        for level in levels:
            other = q.double().clone()
            other[..., column] = float(level)
            assert bool((quadratic_error(other * step[..., None] - ideal, second) >= reached - 1e-4).all())


def test_independent_columns_are_rounded_to_nearest():
    ideal, _ = random_problem(3)
    second = torch.diag_embed(torch.rand(2, 5, dtype=torch.float64) + 0.1)
    q, _ = round_rows(ideal, factorize(second), torch.full((2, 3, 1), 0.5), within(-4, 3), sweeps=3)
    assert torch.equal(q, torch.round(ideal / 0.5).clamp(-4, 3).float())


def test_the_ideal_is_the_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    arrives = x + 0.3 * torch.randn(50, 4, generator=generator, dtype=torch.float64)
    rows = torch.randn(1, 3, 4, generator=generator, dtype=torch.float64)
    moments = InputMoments(50, x.mean(0)[None], arrives.mean(0)[None], (arrives.mT @ arrives / 50)[None],
                      (x.mT @ arrives / 50)[None])  # fmt: skip
    found, ridge = moments.ideal_rows(rows, moments.products(rows), 0.2)[0], float(moments.ridge(0.2))
    assert ridge == pytest.approx(0.2 * float(arrives.square().mean()))
    # The same as plain least squares with rows added that say V = W.
    design = torch.cat([arrives / math.sqrt(50), math.sqrt(ridge) * torch.eye(4, dtype=torch.float64)])
    target = torch.cat([x @ rows[0].mT / math.sqrt(50), math.sqrt(ridge) * rows[0].mT])
    assert torch.allclose(found.mT, torch.linalg.lstsq(design, target).solution)


def few_rows(seed, groups=2, count=6, columns=20):
    """The inputs of a layer with more columns than input rows, in both forms."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, count, columns, generator=generator, dtype=torch.float64)
    arrives = x + 0.2 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    means = x.mean(1), arrives.mean(1)
    dense = InputMoments(count, *means, arrives.mT @ arrives / count, x.mT @ arrives / count)
    return InputSamples(x, arrives, *means), dense


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_few_input_rows_give_what_their_moments_give(seed, centred):
    few, dense = (x.centre() if centred else x for x in few_rows(seed))
    rows = torch.randn(2, 7, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.allclose(few.ridge(0.1), dense.ridge(0.1))
    ideal = few.ideal_rows(rows, few.products(rows), 0.3)
    assert torch.allclose(ideal, dense.ideal_rows(rows, dense.products(rows), 0.3))
    assert few.output_error(few.products(rows), ideal) == pytest.approx(dense.output_error(dense.products(rows), ideal))
    scales = torch.tensor([0.2, 0.3, 0.5]).expand(2, 7, 3)
    found, expected = (round_rows(ideal, x.factorize(0.1), scales, within(-8, 7), sweeps=20) for x in (few, dense))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_few_input_rows_are_rounded_by_the_definition():
    few, dense = few_rows(5)
    curvature, other = few.factorize(0.05), dense.factorize(0.05)
    assert torch.equal(curvature.order, other.order)
    rows = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0))
    steps = torch.full((2, 3), 0.3)
    (levels, form), (same, expected) = (x.pass_errors_on(rows, steps, within(-4, 3)) for x in (curvature, other))
    assert torch.equal(levels, same)
    torch.testing.assert_close(form.float(), expected, rtol=1e-4, atol=1e-4)
    ridge = few.ridge(0.05)
    for group in range(2):
        for first in (0, 7, 19):
            later = curvature.inputs[group][:, first:]
            inner = later @ later.mT + ridge[group] * torch.eye(6, dtype=torch.float64)
            expected = torch.linalg.solve(inner, curvature.inputs[group][:, first])
            assert torch.allclose(curvature.shares[group, first], expected)


@pytest.mark.parametrize("columns", [5, 128, 300])
def test_what_columns_pass_on_adds_up_to_the_form_of_the_error(columns):
    """Once the later columns have made up for an error, its square over the pivot's is all that is left of it."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(2, 4 * columns, columns, generator=generator, dtype=torch.float64)
    curvature = factorize(x.mT @ x / len(x))
    rows, steps = torch.randn(2, 4, columns, generator=generator), torch.tensor([[0.1, 0.3, 0.7, 2.0]]).repeat(2, 1)
    levels, form = curvature.pass_errors_on(rows, steps, within(-4, 3))
    difference = levels * steps[..., None] - rows
    expected = torch.einsum("gri,gij,grj->gr", difference, curvature.second, difference)
    torch.testing.assert_close(form, expected, rtol=1e-4, atol=1e-4)


def test_a_constant_input_keeps_its_ridge_positive():
    curvature = factorize_inputs(torch.zeros(1, 2, 9, dtype=torch.float64), torch.tensor([1e-6], dtype=torch.float64))
    ideal = torch.linspace(-1, 1, 9, dtype=torch.float64).expand(1, 1, 9)
    q, _ = round_rows(ideal, curvature, torch.full((1, 1, 1), 0.25), within(-4, 3), sweeps=2)
    assert torch.equal(q, torch.round(ideal / 0.25).clamp(-4, 3).float())

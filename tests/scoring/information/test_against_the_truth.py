"""Estimates against mutual information that is known."""

import math

import numpy as np
import pytest
from estimated import correlated_normals, distance_matrix, ksg_by_brute_force, ross_by_brute_force
from scipy.integrate import dblquad, quad
from scipy.special import digamma
from scipy.stats import norm

from infoq_fx.scoring.information.mutual_info import (
    absolute_change,
    estimate_ksg,
    estimate_ross,
    unit_projections,
)

LN2 = math.log(2)


def ksg_with_plain_k(x, y, k):
    """Gao et al. to the letter: copies are counted, but k where several neighbours lie at the k-th distance."""
    dx, dy = distance_matrix(x), distance_matrix(y)
    joint, terms = np.maximum(dx, dy), []
    for i, row in enumerate(joint):
        radius = np.sort(np.delete(row, i))[k - 1]
        inside = np.sum(row == 0) if radius == 0 else k
        x_inside, y_inside = (np.sum(d[i] < radius) if radius else np.sum(d[i] == 0) for d in (dx, dy))
        terms.append(digamma(inside) - digamma(x_inside) - digamma(y_inside))
    return digamma(len(joint)) + np.mean(terms)


def assert_near_truth(per_slice, truth, standard_errors=4.0):
    error = np.std(per_slice, ddof=1) / math.sqrt(len(per_slice))
    assert abs(np.mean(per_slice) - truth) < standard_errors * error, (np.mean(per_slice), truth, error)


@pytest.mark.parametrize("rho", [0.0, 0.3, -0.6, 0.9])
def test_ksg_of_normals_is_the_closed_form(rho):
    x, y = correlated_normals(rho, 48, 1500, seed=2)
    assert_near_truth(estimate_ksg(x, y, k=3), -0.5 * math.log(1 - rho**2))


def test_sliced_estimate_of_normals_is_the_closed_form():
    # Y = X plus noise: projections onto a and b have the correlation <a, b> / sqrt(1 + noise**2).
    dimension, noise = 5, 0.5
    x = np.random.default_rng(5).standard_normal((1500, dimension))
    y = x + noise * np.random.default_rng(6).standard_normal(x.shape)
    a, b = (unit_projections(dimension, 64, seed) for seed in (1, 2))
    rho = (a * b).sum(0) / math.sqrt(1 + noise**2)
    deviations = estimate_ksg((x @ a).T, (y @ b).T) + 0.5 * np.log(1 - rho**2)
    assert_near_truth(deviations, 0.0)


@pytest.mark.parametrize("shift", [0.0, 0.7, 2.0])
def test_ross_of_two_normals_is_the_integral(shift):
    def integrand(v):
        densities = norm.pdf(v, [-shift, shift])
        return sum(0.5 * p * math.log(p / densities.mean()) for p in densities)

    truth = quad(integrand, -9 - shift, 9 + shift, epsabs=1e-10)[0]
    generator = np.random.default_rng(7)
    labels = generator.integers(0, 2, 1000)
    x = generator.standard_normal((48, 1000)) + shift * (2 * labels - 1)
    # All slices share the labels, whose own chance imbalance is far below the error of one slice.
    assert_near_truth(estimate_ross(x, labels), truth)


@pytest.mark.parametrize("size", [2, 3, 10])
def test_ross_is_unbiased_in_small_classes(size):
    labels = np.arange(400) // size
    x = np.random.default_rng(size).standard_normal((64, 400))
    assert_near_truth(estimate_ross(x, labels), 0.0)


def rectified_truth(rho):
    """Information between max(0, g) and max(0, h) of standard normals with correlation rho."""
    spread = math.sqrt(1 - rho**2)

    def one_is_zero(v):
        below = norm.cdf(-rho * v / spread)
        return norm.pdf(v) * below * math.log(2 * below)

    def both_positive(v, w):
        exponent = (v * v - 2 * rho * v * w + w * w) / (2 * spread**2)
        log_ratio = (v * v + w * w) / 2 - exponent - math.log(spread)
        return math.exp(-exponent) / (2 * math.pi * spread) * log_ratio

    both_zero = 0.25 + math.asin(rho) / (2 * math.pi)
    return (
        both_zero * math.log(4 * both_zero)
        + 2 * quad(one_is_zero, 0, 8)[0]
        + dblquad(both_positive, 0, 8, 0, 8, epsabs=1e-7)[0]
    )


def test_rectified_truth_is_right_where_it_is_known():
    assert rectified_truth(0.0) == pytest.approx(0.0, abs=1e-7)
    # Cutting off loses information, but never more than there was.
    assert 0.5 < rectified_truth(0.9) / (-0.5 * math.log(1 - 0.9**2)) < 1


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
def test_ksg_copes_with_rectified_values(rho):
    x, y = np.maximum(correlated_normals(rho, 48, 1000, seed=8), 0)
    truth = rectified_truth(rho)
    assert abs(ksg_by_brute_force(x[0], y[0], 5, handle_ties=False) - truth) > 1
    assert abs(np.mean(estimate_ksg(x, y)) - truth) < 0.02


def test_ties_at_the_kth_distance_are_counted():
    # k neighbours whatever their number at the same distance: near the atom of a rectified value that is wrong.
    x, y = np.maximum(correlated_normals(0.0, 48, 1000, seed=8), 0)
    found = np.mean(estimate_ksg(x, y))
    assert abs(found) < 0.02
    with_k = np.mean([ksg_with_plain_k(a, b, 5) for a, b in zip(x[:6], y[:6], strict=True)])
    assert abs(with_k) > 2 * abs(found)


def test_ksg_of_a_rectified_value_and_its_sign_is_one_bit():
    g = np.random.default_rng(9).standard_normal((16, 1000))
    assert np.mean(estimate_ksg(np.maximum(g, 0), np.sign(g))) == pytest.approx(LN2, abs=0.01)


@pytest.mark.parametrize(("chance", "truth"), [(0.5, 0.0), (0.0, LN2)], ids=["unrelated labels", "the sign as label"])
def test_ross_copes_with_rectified_values(chance, truth):
    generator = np.random.default_rng(10)
    labels = generator.integers(0, 2, 1000)
    g = np.abs(generator.standard_normal((16, 1000))) * (2 * labels - 1)
    g = np.where(generator.random(g.shape) < chance, -g, g)
    x = np.maximum(g, 0)
    assert abs(ross_by_brute_force(x[0], labels, 3, handle_ties=False) - truth) > 0.5
    assert np.mean(estimate_ross(x, labels)) == pytest.approx(truth, abs=0.01)


@pytest.mark.parametrize("samples", [20, 400])
def test_equal_discrete_values_carry_their_entropy(samples):
    x = np.arange(samples) % 2
    expected = digamma(samples) - digamma(samples // 2)
    assert estimate_ksg(x, -x)[0] == pytest.approx(expected, abs=1e-12)
    assert estimate_ross(x, 1 - x)[0] == pytest.approx(expected, abs=1e-12)


def test_shared_projections_cancel_the_common_spread():
    x, y = correlated_normals(0.6, 64, 500)
    before = estimate_ksg(x, y)
    after = estimate_ksg(x + 0.01 * np.random.default_rng(1).standard_normal(x.shape), y)
    _, paired = absolute_change(before, after)
    _, unpaired = absolute_change(before, after[::-1])
    assert paired < 0.5 * unpaired

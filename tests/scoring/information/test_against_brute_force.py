"""Estimators of mutual information against brute force and scikit-learn."""

import numpy as np
import pytest
from estimated import correlated_normals, ksg_by_brute_force, ross_by_brute_force
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_selection import mutual_info_classif, mutual_info_regression

from infoq_fx.scoring.information.mutual_info import (
    estimate_ksg,
    estimate_ross,
)


@pytest.mark.parametrize(("samples", "k"), [(2, 1), (6, 5), (127, 1), (128, 5), (129, 9), (300, 1), (300, 5)])
@pytest.mark.parametrize("draw", ["standard_normal", "standard_cauchy"])
def test_ksg_equals_brute_force(samples, k, draw):
    x, y = getattr(np.random.default_rng(samples), draw)((2, samples))
    y = y + 0.5 * x
    np.testing.assert_allclose(estimate_ksg(x, y, k=k), [ksg_by_brute_force(x, y, k)], rtol=0, atol=1e-12)


@given(data=st.data(), k=st.integers(1, 6), x_levels=st.integers(2, 6), y_levels=st.integers(2, 30))
@settings(max_examples=150, deadline=None)
def test_ksg_equals_brute_force_on_ties(data, k, x_levels, y_levels):
    pairs = data.draw(st.lists(st.tuples(st.integers(0, x_levels), st.integers(0, y_levels)), min_size=7, max_size=60))
    x, y = np.array(pairs).T
    found = estimate_ksg(np.stack([x, y]), np.stack([y, x]), k=k)
    if min(np.ptp(x), np.ptp(y)) == 0:
        assert (found == 0).all()
    else:
        np.testing.assert_allclose(found, ksg_by_brute_force(x, y, k), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 3.0, 0.1], ids=["integers", "thirds", "tenths"])
def test_ksg_equals_brute_force_on_many_ties(scale):
    x = np.random.default_rng(3).integers(0, 12, 400)
    y = np.maximum(x + np.random.default_rng(4).integers(-4, 5, 400) - 6, 0)
    expected = ksg_by_brute_force(x, y, 5)
    np.testing.assert_allclose(estimate_ksg(x * scale, y), [expected], rtol=0, atol=1e-12)


@pytest.mark.parametrize("classes", [2, 7, 60])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_ross_equals_brute_force(classes, k):
    generator = np.random.default_rng(classes)
    labels = generator.integers(0, classes, 150) * 7 - 20
    x = generator.standard_normal(150) + 0.1 * labels
    expected = ross_by_brute_force(x, labels, k)
    np.testing.assert_allclose(estimate_ross(x, labels, k=k), [expected], rtol=0, atol=1e-12)


@given(
    pairs=st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 5)), min_size=7, max_size=60),
    k=st.integers(1, 5),
)
@settings(max_examples=150, deadline=None)
def test_ross_equals_brute_force_on_ties(pairs, k):
    x, labels = np.array(pairs).T
    sizes = np.bincount(labels)
    kept = sizes[labels] > 1
    found = estimate_ross(x, labels, k=k)
    if np.ptp(x[kept]) == 0 or np.sum(sizes > 1) == 1:
        assert found == 0
    else:
        np.testing.assert_allclose(found, [ross_by_brute_force(x, labels, k)], rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_ksg_equals_scikit_learn(k):
    x, y = correlated_normals(0.8, 4, 400)
    expected = [
        mutual_info_regression(a[:, None], b, discrete_features=False, n_neighbors=k, random_state=0)[0]
        for a, b in zip(x, y, strict=True)
    ]
    assert min(expected) > 0.2  # far from where scikit-learn clips
    # Its noise of 1e-10 leaves the counts as they are.
    np.testing.assert_allclose(estimate_ksg(x, 50 * y - 7, k=k), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("smallest", "tolerance"), [(12, 1e-9), (2, 0.02)], ids=["large classes", "small"])
def test_ross_equals_scikit_learn(k, smallest, tolerance):
    # In classes of fewer than about 2k samples scikit-learn expands squared distances; as that rounds, some
    # k-th neighbours are counted too, each of which costs about 1 / samples.
    sizes = np.r_[1, smallest, smallest + 1, smallest + 2, 80, 120]
    labels = np.repeat(np.arange(6), sizes)
    x = np.random.default_rng(1).standard_normal((4, len(labels))) + labels
    expected = mutual_info_classif(x.T, labels, discrete_features=False, n_neighbors=k, random_state=0)
    assert expected.min() > 0.1  # far from where scikit-learn clips
    np.testing.assert_allclose(estimate_ross(x, labels, k=k), expected, rtol=0, atol=tolerance)

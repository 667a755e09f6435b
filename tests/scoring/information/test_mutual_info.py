"""Estimators: what changes no estimate, projections, groups of classes, and refusals."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from estimated import correlated_normals
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from scipy.special import digamma

from infoq_fx.errors import CalibrationDataError, OptionError
from infoq_fx.scoring.information import mutual_info
from infoq_fx.scoring.information.mutual_info import (
    absolute_change,
    class_samples,
    estimate_ksg,
    estimate_ross,
    group_classes,
    rank_samples,
    unit_projections,
)


@pytest.mark.parametrize("is_tied", [False, True], ids=["continuous", "tied"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_prepared_once_gives_the_same(is_tied, dtype):
    x, y = (v.astype(dtype) for v in correlated_normals(0.7, 6, 300))
    if is_tied:
        x, y = np.round(2 * x), np.maximum(np.round(4 * y), 0)
    ranked, shared = rank_samples(x), rank_samples(x[0])
    np.testing.assert_array_equal(estimate_ksg(ranked, y), estimate_ksg(x, y))
    np.testing.assert_array_equal(estimate_ksg(shared, y), estimate_ksg(x[0], y))
    np.testing.assert_array_equal(estimate_ksg(ranked, y[:1]), estimate_ksg(x, y[:1]))
    labels = np.arange(300) % 7
    np.testing.assert_array_equal(estimate_ross(x, class_samples(labels)), estimate_ross(x, labels))


@pytest.mark.parametrize("samples", [700, 2500])
@pytest.mark.parametrize("k", [1, 5, 6, 12])
def test_bands_of_the_plane_change_no_neighbour(samples, k):
    # Large enough for several bands; against a tree on the same float64 values.
    x, y = correlated_normals(0.9, 2, samples, seed=k)
    y[1] = np.maximum(y[1], 0)
    for a, b, found in zip(x, y, estimate_ksg(x, y, k=k), strict=True):
        points = np.stack([a / np.std(a), b / np.std(b)], 1)
        distances = cKDTree(points).query(points, k + 1, p=np.inf)[0]
        limits = distances[:, k] * (1 - 1e-12)
        inside = (distances[:, 1:] < limits[:, None]).sum(1) + 1
        counts = [
            np.array(
                [np.searchsorted(s, v + r) - np.searchsorted(s, v - r, "right") for v, r in zip(p, limits, strict=True)]
            )
            for p, s in ((points[:, i], np.sort(points[:, i])) for i in range(2))
        ]
        terms = digamma(inside) - digamma(counts[0]) - digamma(counts[1])
        assert found == pytest.approx(digamma(samples) + terms.mean(), abs=1e-9)


def test_estimates_are_not_clipped():
    x, y = correlated_normals(0.0, 32, 100)
    assert estimate_ksg(x, y).min() < 0
    assert estimate_ross(x, np.arange(100) % 4).min() < 0


TRANSFORMATIONS = {
    "shuffled": lambda x, y, order: (x[:, order], y[:, order]),
    "flipped": lambda x, y, order: (-x, y),
    "scaled": lambda x, y, order: (300 * x, y / 7),
    "huge and tiny": lambda x, y, order: (x * 2.0**900, y * 2.0**-900),
    "shifted": lambda x, y, order: (x + 1, y - 100),
    "exchanged": lambda x, y, order: (y, x),
}


@pytest.mark.parametrize("transform", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
@pytest.mark.parametrize("is_tied", [False, True], ids=["continuous", "tied"])
def test_ksg_does_not_change(transform, is_tied):
    x, y = correlated_normals(0.7, 3, 300)
    if is_tied:
        x, y = np.round(2 * x), np.maximum(np.round(4 * y), 0)
    order = np.random.default_rng(0).permutation(300)
    np.testing.assert_allclose(estimate_ksg(*transform(x, y, order)), estimate_ksg(x, y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("factor", [-1.0, 0.3, 2.0**900, 2.0**-900])
def test_ross_does_not_change(factor):
    generator = np.random.default_rng(0)
    labels, order = generator.integers(0, 5, 200), generator.permutation(200)
    x = np.round(generator.standard_normal((3, 200)), 1)
    moved = estimate_ross((x * factor)[:, order], labels[order] * -3)
    np.testing.assert_allclose(moved, estimate_ross(x, labels), rtol=0, atol=1e-12)


def test_float32_agrees_with_float64():
    x, y = (v.astype(np.float32) for v in correlated_normals(0.7, 8, 500))
    labels = np.arange(500) % 9
    wide = np.float64(x), np.float64(y)
    np.testing.assert_allclose(estimate_ksg(x, y), estimate_ksg(*wide), rtol=0, atol=1e-3)
    np.testing.assert_allclose(estimate_ross(x, labels), estimate_ross(wide[0], labels), rtol=0, atol=1e-3)
    assert estimate_ksg(x, y).dtype == estimate_ross(x, labels).dtype == np.float64


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("factor", [1e-37, 1e37])
def test_scales_at_the_edge_of_float32_do_no_harm(dtype, factor):
    x, y = (v.astype(dtype) for v in correlated_normals(0.7, 2, 200))
    labels = np.arange(200) % 3
    scale = dtype(factor)
    np.testing.assert_allclose(estimate_ksg(x * scale, y / scale), estimate_ksg(x, y), rtol=0, atol=0.01)
    np.testing.assert_allclose(estimate_ross(x * scale, labels), estimate_ross(x, labels), rtol=0, atol=0.01)


def test_inputs_may_be_read_only_strided_or_a_single_slice():
    x, y = correlated_normals(0.5, 3, 100)
    x.setflags(write=False)
    expected = estimate_ksg(x, y)
    np.testing.assert_array_equal(estimate_ksg(np.asfortranarray(x), y.tolist()), expected)
    np.testing.assert_array_equal(estimate_ksg(x[1], y[1]), expected[1:2])
    np.testing.assert_array_equal(estimate_ksg(x[1], y), estimate_ksg(np.stack([x[1]] * 3), y))
    assert estimate_ross(x[0], np.arange(100) % 2).shape == (1,)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e9])
def test_a_constant_slice_carries_exactly_nothing(value):
    x, y = correlated_normals(0.5, 3, 101)
    labels = np.arange(101) % 3
    expected_ksg, expected_ross = estimate_ksg(x, y), estimate_ross(x, labels)
    x[1] = value
    expected_ksg[1] = expected_ross[1] = 0
    np.testing.assert_array_equal(estimate_ksg(x, y), expected_ksg)
    np.testing.assert_array_equal(estimate_ksg(y, x), [0 if i == 1 else estimate_ksg(y[i], x[i])[0] for i in range(3)])
    np.testing.assert_array_equal(estimate_ross(x, labels), expected_ross)


def test_one_usable_class_carries_exactly_nothing():
    assert estimate_ross(np.arange(5.0), np.array([1, 1, 1, 2, 3]))[0] == 0


def test_results_are_the_same_in_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(mutual_info, "_MIN_VALUES_PER_THREAD", 1)
    x, y = correlated_normals(0.5, 11, 200)
    x[2], y[5:7] = np.round(x[2]), np.maximum(y[5:7], 0)
    labels = np.arange(200) % 6
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr("numba.get_num_threads", lambda threads=threads: threads)
        found.append((estimate_ksg(x, y), estimate_ross(x, labels)))
        with ThreadPoolExecutor(3) as pool:
            found += pool.map(lambda _: (estimate_ksg(x, y), estimate_ross(x, labels)), range(3))
    for ksg, ross in found:
        np.testing.assert_array_equal(ksg, found[0][0])
        np.testing.assert_array_equal(ross, found[0][1])


@pytest.mark.parametrize("dimension", [1, 2, 1000])
def test_projections_are_unit_vectors_fixed_by_the_seed(dimension):
    directions = unit_projections(dimension, 64, seed=3)
    assert directions.dtype == np.float32
    assert directions.shape == (dimension, 64)
    np.testing.assert_allclose(np.linalg.norm(directions.astype(np.float64), axis=0), 1, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(directions, unit_projections(dimension, 64, seed=3))
    assert not np.array_equal(directions, unit_projections(dimension, 64, seed=4))


def test_projections_from_one_dimension_are_signs():
    assert set(unit_projections(1, 200, seed=0).ravel().tolist()) == {-1.0, 1.0}


def test_projections_are_uniform_on_the_sphere():
    # On the sphere in three dimensions every coordinate is uniform in [-1, 1] (Archimedes).
    ranks = np.sort(unit_projections(3, 20000, seed=1), axis=1)
    expected = np.linspace(-1, 1, 20000)
    assert np.abs(ranks - expected).max() < 4 / math.sqrt(20000)


def test_absolute_change_is_the_mean_difference_and_its_error():
    change, error = absolute_change(np.array([1.0, 2.0, 3.0]), np.array([1.5, 3.5, 3.0]))
    assert change == pytest.approx(2 / 3)
    assert error == pytest.approx(math.sqrt(7 / 12) / math.sqrt(3))
    assert absolute_change([1.0], [3.0]) == (2.0, 0.0)


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_the_clusters(seed):
    generator = np.random.default_rng(seed)
    truth = generator.permutation(np.arange(60) % 6)
    rows = 50 * np.eye(6, 8)[truth] + generator.standard_normal((60, 8))
    groups = group_classes(rows.astype(np.float32), 6, seed)
    assert groups.dtype == np.int64
    assert len({(t, g) for t, g in zip(truth, groups, strict=True)}) == 6
    assert set(groups.tolist()) == set(range(6))
    np.testing.assert_array_equal(groups, group_classes(rows.astype(np.float32), 6, seed))


@given(
    rows=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=30),
    count=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=100, deadline=None)
def test_groups_have_no_gaps_and_keep_equal_rows_together(rows, count, seed):
    groups = group_classes(np.array(rows), count, seed)
    assert groups.shape == (len(rows),)
    assert set(groups.tolist()) == set(range(len(set(groups.tolist()))))
    assert len(set(groups.tolist())) <= min(count, len(set(rows)))
    assert len(set(zip(rows, groups.tolist(), strict=True))) == len(set(rows))


@pytest.mark.parametrize("count", [1, 3, 9])
def test_every_class_is_nearest_to_the_mean_of_its_group(count):
    rows = np.random.default_rng(2).standard_normal((40, 3))
    groups = group_classes(rows, count, seed=0)
    means = np.stack([rows[groups == g].mean(0) for g in range(groups.max() + 1)])
    np.testing.assert_array_equal(groups, np.linalg.norm(rows[:, None] - means, axis=2).argmin(1))


X = np.linspace(0, 1, 20)
REFUSALS = {
    "k of 0": (lambda: estimate_ksg(X, X, k=0), OptionError, "k=0; give an integer of at least 1"),
    "k of 1.5": (lambda: estimate_ross(X, np.arange(20), k=1.5), OptionError, "k=1.5"),
    "fewer samples": (lambda: estimate_ksg(X[:4], X[:4]), CalibrationDataError, "found 4; give more, or k=3"),
    "unequal samples": (lambda: estimate_ksg(X, X[:9]), OptionError, r"\(1, 20\) and y \(1, 9\)"),
    "unequal slices": (lambda: estimate_ksg(X.reshape(2, 10), X[:15].reshape(3, 5)), OptionError, "the same"),
    "cube": (lambda: estimate_ksg(X.reshape(1, 2, 10), X), OptionError, r"shape \(1, 2, 10\); give"),
    "empty": (lambda: estimate_ksg([], []), OptionError, r"shape \(0,\); give"),
    "NaN": (
        lambda: estimate_ksg(X, X * np.nan),
        CalibrationDataError,
        "y has 20 NaN or infinite of 20 values",
    ),
    "infinite": (
        lambda: estimate_ross(np.array([1.0, np.inf]), np.array([0, 0])),
        CalibrationDataError,
        "x has 1 NaN or infinite",
    ),
    "float labels": (lambda: estimate_ross(X, X), OptionError, r"labels are float64 \[20\]; give integers"),
    "too few labels": (
        lambda: estimate_ross(X, np.arange(3) % 2),
        OptionError,
        "3 labels for 20 samples; give",
    ),
    "one a class": (
        lambda: estimate_ross(X, np.arange(20)),
        CalibrationDataError,
        "none of 20 classes .* group_classes",
    ),
    "other slices": (lambda: absolute_change(X, X[:3]), OptionError, r"\(20,\) and perturbed \(3,\)"),
    "no dimension": (lambda: unit_projections(0, 1, 0), OptionError, "dimension=0"),
    "no slice": (lambda: unit_projections(1, 0, 0), OptionError, "slices=0"),
    "negative seed": (
        lambda: unit_projections(1, 1, -1),
        OptionError,
        "seed=-1; give an integer of at least 0",
    ),
    "no group": (lambda: group_classes(np.eye(3), 0, 0), OptionError, "groups=0"),
    "flat rows": (lambda: group_classes(X, 2, 0), OptionError, r"shape \(20,\); give"),
    "NaN rows": (lambda: group_classes(np.eye(2) * np.nan, 2, 0), CalibrationDataError, "rows has 4 NaN"),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_used_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()

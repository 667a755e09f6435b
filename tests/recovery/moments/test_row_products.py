"""Products of input rows, over integers and floats."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recovered import CONTEXT
from torch import nn

import infoq_fx
from infoq_fx.core.data import read_data
from infoq_fx.recovery.layerwise_runner import LayerwiseRunner
from infoq_fx.recovery.moments import row_products
from infoq_fx.recovery.moments.input_moments import RunningMoments, measure_moments
from infoq_fx.recovery.moments.row_products import (
    add_products,
    as_integers,
    dequantize_rows,
    join_rows,
    mirror,
    sum_rows,
)
from infoq_fx.recovery.parameters import fork
from infoq_fx.runtime.integer_convolution import QuantizedTensor

needs_integers = pytest.mark.skipif(
    not row_products._can_multiply_exactly(), reason="the processor has no exact 8-bit products"
)


def integers(seed, rows, columns, *, zero_point=117, scale=0.25, low=0, high=256):
    draw = torch.Generator().manual_seed(seed)
    q = torch.randint(low, high, (1, rows, columns), generator=draw, dtype=torch.uint8)
    return QuantizedTensor(q, scale, zero_point)


def product(x, found):
    return (dequantize_rows(x).double().mT @ dequantize_rows(found).double()).numpy()


@needs_integers
@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 90),
    columns=st.sampled_from([256, 600, 1100]),
    zero_points=st.tuples(st.integers(0, 255), st.integers(0, 255)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_products_of_integers_are_exact(rows, columns, zero_points, dtype):
    """With scales that are powers of two, and sums below 2^24, every sum is a float32."""
    x, found = (integers(seed, rows, columns, zero_point=z) for seed, z in enumerate(zero_points))
    total = torch.ones(1, columns, columns, dtype=dtype)
    add_products(total, x, found, map)
    assert (total.numpy() == 1 + product(x, found)).all()
    same = torch.zeros(1, columns, columns, dtype=dtype)
    add_products(same, x, x, map, is_symmetric=True)
    mirror(same)
    assert (same.numpy() == product(x, x)).all()
    assert torch.equal(sum_rows(x), dequantize_rows(x).double().sum(1))


@needs_integers
@pytest.mark.parametrize("zero_point", [0, 255])
def test_no_sum_of_the_largest_values_overflows(zero_point):
    rows = row_products._MOST_ROWS + 3
    value = 255 - zero_point
    x = QuantizedTensor(torch.full((1, rows, 256), value, dtype=torch.uint8), 1.0, zero_point)
    total = torch.zeros(1, 256, 256, dtype=torch.float64)
    add_products(total, x, x, map)
    assert bool((total == rows * 255**2).all())


@needs_integers
def test_floats_become_integers_only_where_they_are_multiples_of_the_scale():
    like = integers(0, 5, 300)
    assert torch.equal(as_integers(like.dequantize(), like).q, like.q)
    other = like.dequantize() + 0.01
    assert as_integers(other, like) is other
    narrow = integers(0, 5, 30)
    assert isinstance(as_integers(narrow.dequantize(), narrow), torch.Tensor)


@needs_integers
def test_rows_are_joined_as_integers_only_if_all_are_alike():
    x, other = integers(0, 5, 300), integers(1, 4, 300)
    assert torch.equal(join_rows([x, other]).q, torch.cat([x.q, other.q], 1))
    expected = torch.cat([x.dequantize(), other.dequantize()], 1)
    assert torch.equal(join_rows([x, other.dequantize()]), expected)
    far = integers(1, 4, 300, zero_point=3)
    assert torch.equal(join_rows([x, far]), torch.cat([x.dequantize(), far.dequantize()], 1))
    narrow = integers(0, 5, 30)
    assert torch.equal(join_rows([narrow]), narrow.dequantize())


def test_moments_of_integers_are_those_of_floats():
    draw = torch.Generator().manual_seed(3)
    batches = [(integers(seed, rows, 400), integers(seed + 9, rows, 400)) for seed, rows in enumerate((700, 7, 4500))]
    over_integers, over_floats = RunningMoments(), RunningMoments()
    for x, found in batches:
        x = x.dequantize() if torch.rand((), generator=draw) < 0.5 else x
        over_integers.add(x, found, 10**6)
        over_floats.add(dequantize_rows(x), found.dequantize(), 10**6)
    found, expected = over_integers.finish(), over_floats.finish()
    assert found.count == expected.count == 5207
    for name in ("second", "cross", "mean", "mean_quantized"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-3)


@needs_integers
def test_both_moments_of_recovery_are_computed_over_integers(monkeypatch):
    """The reference has float weights, and its inputs are quantized at the same scale."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 300), nn.ReLU(), nn.Linear(300, 5)), torch.randn(900, 20)
    prepared = infoq_fx.prepare(model.eval(), x)
    runner = LayerwiseRunner(
        fork(prepared), {}, read_data(x).named(prepared.input_names), CONTEXT, reference="float_weights"
    )
    layer = runner.layers[1]
    runner.advance(next(segment for segment in runner.segments if runner.layers[0] in segment.layers))
    seen = []
    add = row_products._add_integers
    monkeypatch.setattr(row_products, "_add_integers", lambda *args: seen.append(args[4]) or add(*args))
    assert measure_moments(runner, layer, 10**6) is not None
    assert sorted(seen) == [False, False, True, True]  # of two halves

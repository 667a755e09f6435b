import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infoq_fx.quantization import numerics
from infoq_fx.quantization.pointwise import (
    draw_share,
    fake_quantize_but_share,
    fake_quantize_flat,
    project_rows,
    sum_rounding_errors,
)
from infoq_fx.types import QParams, QuantSpec


def affine(bits, scale, zero_point):
    return QParams(
        QuantSpec(bits=bits, symmetric=False), torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32)
    )


def by_definition(x, qparams, addend, clip):
    """The operations one after the other, as quantize and dequantize define them."""
    total = x if addend is None else x + addend
    return numerics.quantize(total.clamp(*clip), qparams)


@given(
    seed=st.integers(0, 1000),
    bits=st.integers(2, 8),
    scale=st.sampled_from([2.0**-5, 0.0234375, 0.1, 3.0]),
    share=st.floats(0, 1),
    clip=st.sampled_from([(-np.inf, np.inf), (0.0, np.inf), (0.0, 6.0), (-1.0, 1.0), (0.3, 0.35)]),
    has_addend=st.booleans(),
    layout=st.sampled_from(["plain", "channels last", "strided", "broadcast"]),
)
@settings(max_examples=150, deadline=None)
def test_merged_operations_equal_one_after_the_other(seed, bits, scale, share, clip, has_addend, layout):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(2, 3, 5, 4, generator=generator) * 4 for _ in range(2))
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x, y = x[:, :, ::2, 1:], y[:, :, ::2, 1:]
    elif layout == "broadcast":
        y = y[:1, :, :1]
    x[0, 0, 0, 0] = -0.0
    qparams = affine(bits, scale, round(share * (2**bits - 1)))
    addend = y if has_addend else None
    expected = by_definition(x, qparams, addend, clip)
    found = numerics.quantize_in_one_pass(x, qparams, addend=addend, clip=clip)
    assert torch.equal(found, expected)
    values = numerics.fake_quantize(x, qparams, addend=addend, clip=clip)
    assert torch.equal(values, numerics.dequantize(expected, qparams))
    assert not (values.view(torch.int32) == torch.tensor(-0.0).view(torch.int32)).any()


def drawn(share, seed, count=40_000):
    out = np.empty(count, np.bool_)
    draw_share(share, seed, 0, out)
    return out


@given(share=st.sampled_from([0.0, 0.1, 0.5, 0.9]), seed=st.integers(0, 2**62))
@settings(max_examples=30, deadline=None)
def test_a_share_of_the_values_is_drawn_without_a_pattern(share, seed):
    one, other = drawn(share, seed), drawn(share, seed + 1)
    assert np.array_equal(one, drawn(share, seed))
    margin = 5 * np.sqrt(share * (1 - share) / len(one))
    assert abs(one.mean() - share) <= margin
    for second in (other, np.roll(one, 1), np.roll(one, 64), drawn(share, seed ^ (1 << 40))):
        assert abs((one & second).mean() - share**2) <= 2 * margin


def test_parts_draw_what_the_whole_draws():
    part = np.empty(1000, np.bool_)
    draw_share(0.5, 7, 3000, part)
    assert np.array_equal(part, drawn(0.5, 7)[3000:4000])


def test_what_is_not_drawn_is_fake_quantized():
    x, limits = np.random.default_rng(0).normal(size=5000).astype(np.float32), (np.float32(-3), np.float32(4))
    quantized, found = np.empty_like(x), np.empty_like(x)
    fake_quantize_flat(x, np.float32(0.3), *limits, quantized)
    fake_quantize_but_share(x, np.float32(0.3), *limits, 0.4, 7, 0, found)
    assert np.array_equal(found, np.where(drawn(0.4, 7, 5000), x, quantized))


def test_more_threads_take_the_other_path_to_the_same_values(monkeypatch):
    x, y, qparams = torch.randn(3, 4, 5), torch.randn(3, 4, 5), affine(8, 0.03, 17)
    expected = numerics.fake_quantize(x, qparams, addend=y, clip=(0.0, 3.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert torch.equal(numerics.fake_quantize(x, qparams, addend=y, clip=(0.0, 3.0)), expected)


def test_nan_stays_nan():
    x = torch.tensor([float("nan"), 1.0, float("inf"), float("-inf")])
    found = numerics.fake_quantize(x, affine(8, 0.5, 10), clip=(0.0, 6.0))
    assert torch.isnan(found[0])
    assert found[1:].tolist() == [1.0, 6.0, 0.0]


@pytest.mark.parametrize("samples", [1, 15, 16, 17, 40])
def test_a_projection_does_not_depend_on_its_neighbours(samples):
    generator = np.random.default_rng(0)
    rows, directions = (generator.standard_normal(shape).astype(np.float32) for shape in ((40, 7), (7, 12)))
    whole = np.empty((12, 40), np.float32)
    project_rows(rows, directions, whole)
    np.testing.assert_allclose(whole, (rows.astype(np.float64) @ directions).T, rtol=0, atol=1e-5)
    part = np.zeros((12, 50), np.float32)
    project_rows(rows[-samples:], directions, part[:, 5 : 5 + samples])
    np.testing.assert_array_equal(part[:, 5 : 5 + samples], whole[:, -samples:])
    assert not part[:, :5].any()
    assert not part[:, 5 + samples :].any()


def test_rounding_errors_are_those_of_their_definition():
    generator = np.random.default_rng(1)
    rows = generator.normal(size=(3, 2500)).astype(np.float32)
    scales = generator.uniform(0.05, 1, (3, 7)).astype(np.float32)
    found = np.empty((3, 7))
    sum_rounding_errors(rows, scales, np.float32(-4), np.float32(3), found)
    step = scales[:, :, None].astype(np.float64)
    q = np.clip(np.rint(rows[:, None] / scales[:, :, None]), -4, 3)
    np.testing.assert_allclose(found, ((q * step - rows[:, None]) ** 2).sum(2), rtol=1e-5)

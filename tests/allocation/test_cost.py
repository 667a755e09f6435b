"""Costs, counted by hand."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infoq_fx.allocation.cost import (
    activation_bytes,
    broken_limits,
    build_cost_row,
    measure_cost,
    operation_bitops,
    weight_bytes,
)
from infoq_fx.errors import OptionError
from infoq_fx.types import Budget, Inventory, Operation, QuantSite

BITS = tuple(range(2, 9))

# conv 3 -> 4, 3x3, on 8x8; linear 16 -> 5; a matmul of the input's activation with itself; one float operand.
NET = Inventory(
    sites=(
        QuantSite("conv.weight", "weight", (4, 3, 3, 3), BITS, channel_axis=0),
        QuantSite("input", "activation", (3, 8, 8), BITS),
        QuantSite("fc.weight", "weight", (5, 16), BITS, channel_axis=0),
        QuantSite("pool", "activation", (16,), BITS),
        QuantSite("add", "activation", (4, 8, 8), (8,), is_searched=False),
    ),
    operations=(
        Operation("conv", 4 * 27 * 64, "input", "conv.weight"),
        Operation("fc", 80, "pool", "fc.weight"),
        Operation("attention", 1000, "input", "input"),
        Operation("embedding", 10, None, "fc.weight"),
    ),
    float_bytes=36,
)

pytestmark = pytest.mark.usefixtures("free_unpacking")  # their networks are tiny
CHOSEN = {"conv.weight": 3, "input": 5, "fc.weight": 7, "pool": 4, "add": 8}


def test_costs_of_a_small_net_by_hand() -> None:
    cost = measure_cost(NET, CHOSEN)
    assert cost.weight_bits == (108 * 3 + 80 * 7) / 188
    assert cost.compression == 32 * 188 / (108 * 3 + 80 * 7)
    # 324 bits are 40.5 bytes and 560 bits 70; 4 and 5 scales of 4 bytes; 36 bytes of biases.
    assert cost.size_bytes == (41 + 16) + (70 + 20) + 36
    assert cost.bitops == 6912 * 5 * 3 + 80 * 4 * 7 + 1000 * 5 * 5 + 10 * 32 * 7
    assert cost.activation_bytes == 120 + 8  # the sum of the residual is not searched


@pytest.mark.parametrize(("bits", "compression"), [(2, 16.0), (3, 10.67), (4, 8.0), (8, 4.0)])
def test_uniform_bits_compress_as_the_paper_says(bits: int, compression: float) -> None:
    cost = measure_cost(NET, dict.fromkeys(CHOSEN, bits))
    assert round(cost.compression, 2) == compression
    assert cost.weight_bits == bits


def test_ignored_weights_count_32_bits() -> None:
    cost = measure_cost(replace(NET, ignored_weights=188), dict.fromkeys(CHOSEN, 4))
    assert cost.compression == 64 / 36
    assert cost.weight_bits == 4


@pytest.mark.parametrize("ignored", [0, 10], ids=["no weights at all", "only ignored weights"])
def test_nothing_quantized_is_not_compressed(ignored: int) -> None:
    cost = measure_cost(Inventory((), (), float_bytes=40, ignored_weights=ignored), {})
    assert (cost.weight_bits, cost.compression, cost.size_bytes, cost.bitops) == (32.0, 1.0, 40, 0)


@pytest.mark.parametrize(
    ("axis", "scales"), [(None, 1), (0, 2), (1, 3), (-1, 5)], ids=["one", "first", "second", "last"]
)
def test_scales_count_four_bytes_a_channel(axis: int | None, scales: int) -> None:
    site = QuantSite("w", "weight", (2, 3, 5), BITS, channel_axis=axis)
    assert weight_bytes(site, 3) == 12 + 4 * scales  # 90 bits round up to 12 bytes


@given(numel=st.integers(0, 10**12), bits=st.integers(2, 8))
def test_bytes_round_up_exactly(numel: int, bits: int) -> None:
    assert activation_bytes(QuantSite("a", "activation", (numel,), BITS), bits) == math.ceil(Fraction(numel * bits, 8))


def test_float_operands_count_32_bits() -> None:
    operation = Operation("matmul", 7, None, None)
    assert operation_bitops(operation, None, None) == 7 * 32 * 32
    assert operation_bitops(operation, 3, None) == operation_bitops(operation, None, 3) == 7 * 96
    assert operation_bitops(Operation("big", 10**15, None, None), 8, 8) == 64 * 10**15


def test_a_site_without_bits_is_named() -> None:
    with pytest.raises(OptionError, match=r"'fc.weight'"):
        measure_cost(NET, {name: bits for name, bits in CHOSEN.items() if name != "fc.weight"})


@pytest.mark.parametrize(
    ("budget", "broken"),
    [
        (Budget(weight_bits=884 / 188), []),
        (Budget(weight_bits=math.nextafter(884 / 188, 0)), ["weight_bits"]),
        (Budget(compression=6016 / 884), []),
        (Budget(compression=6.81), ["compression"]),
        (Budget(size_bytes=183, activation_bytes=128), []),
        (
            Budget(size_bytes=182.9, activation_bytes=127, bitops=1),
            ["size_bytes", "bitops", "activation_bytes"],
        ),
    ],
    ids=["mean met", "mean missed", "compression met", "compression missed", "two met", "three missed"],
)
def test_limits_are_compared_exactly(budget: Budget, broken: list[str]) -> None:
    assert broken_limits(measure_cost(NET, CHOSEN), budget) == broken


@given(
    name=st.sampled_from(["weight_bits", "compression", "size_bytes", "bitops", "activation_bytes"]),
    bits=st.fixed_dictionaries({name: st.sampled_from(BITS) for name in CHOSEN if name != "add"}),
    fixed=st.sets(st.sampled_from(["conv.weight", "input", "fc.weight", "pool"])),
    ignored=st.integers(0, 50),
)
def test_a_row_is_met_exactly_when_the_limit_is(name: str, bits: dict[str, int], fixed: set[str], ignored: int) -> None:
    net = replace(NET, ignored_weights=ignored)
    bits = {**bits, "add": 8}
    choices = {site.name: (bits[site.name],) if site.name in fixed else site.bits for site in net.sites}
    met = float(getattr(measure_cost(net, bits), name))
    missed = math.nextafter(met, math.inf if name == "compression" else 0)
    for limit, is_met in ((met, True), (missed, False)):
        row = build_cost_row(net, name, limit, choices)
        used = sum(cost for item, cost in row.linear.items() if bits[item[0]] == item[1])
        used += sum(macs * bits[left] * bits[right] for (left, right), macs in row.pairs.items())
        assert (used <= row.limit) == is_met


def test_written_decimals_are_met() -> None:
    # 3.3 as a float is a little less than 33/10; the allocation that the user means has to fit.
    net = Inventory(tuple(QuantSite(f"w{i}", "weight", (1,), BITS) for i in range(10)), (), 0)
    row = build_cost_row(net, "weight_bits", 3.3, {site.name: site.bits for site in net.sites})
    assert row.limit == 33


def test_operations_on_the_same_pair_are_merged() -> None:
    net = replace(NET, operations=(*NET.operations, Operation("again", 100, "conv.weight", "input")))
    row = build_cost_row(net, "bitops", 1e6, {site.name: site.bits for site in net.sites})
    assert row.pairs == {("conv.weight", "input"): 7012, ("fc.weight", "pool"): 80}

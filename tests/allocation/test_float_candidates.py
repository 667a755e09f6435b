"""Activations stay in float only where that pays, if no limit of the budget counts them."""

from dataclasses import replace

import pytest
from tables import activation, make_table, weight

from infoq_fx.allocation.solver import allocate, find_uniform, propose
from infoq_fx.types import Budget, Operation, Score

COUNT = 6


def build(gains, macs=1000):
    """Layers with inputs that gain so much in float; 4-bit weights lose 0.01 each."""
    sites = [site for i in range(COUNT) for site in (weight(f"w{i}", 64, (4, 8)), activation(f"a{i}", 10, (8, 16)))]
    operations = tuple(Operation(f"op{i}", macs, f"w{i}", f"a{i}") for i in range(COUNT))
    scores = {f"w{i}": {4: 0.01, 8: 0.0} for i in range(COUNT)}
    scores |= {f"a{i}": {8: gain, 16: 0.0} for i, gain in enumerate(gains)}
    return make_table(tuple(sites), scores, operations)


def in_float(allocation):
    return [name for name, bits in allocation.bits.items() if bits == 16]


def test_one_that_gains_much_more_than_the_others_stays_in_float():
    assert in_float(allocate(build([0.001] * 5 + [0.5]), 4.0)) == ["a5"]
    assert in_float(allocate(build([0.0] * 4 + [0.2, 0.1]), 4.0)) == ["a4", "a5"]


@pytest.mark.parametrize("gains", [[0.0] * 6, [0.3] * 6, [0.0] * 5 + [1e-4]])
def test_none_does_where_all_gain_alike_or_the_gain_does_not_matter(gains):
    for allocation in propose(build(gains), 4.0):
        assert in_float(allocation) == []


def test_a_limit_that_counts_activations_decides_by_itself():
    table = build([0.3] * 6)
    assert len(in_float(allocate(table, Budget(weight_bits=4.0, activation_bytes=6 * 20)))) == 6
    assert len(in_float(allocate(table, Budget(weight_bits=4.0, activation_bytes=6 * 10 + 25)))) == 2
    assert in_float(allocate(table, Budget(bitops=6 * 1000 * 4 * 8))) == []


def test_float_is_neither_uniform_nor_spent_for_nothing():
    sites = (weight("w0", 64, (4, 8, 16)), weight("w1", 64, (4, 8, 16)), activation("a0", 10, (8, 16)))
    table = make_table(sites, {name: {4: 0.0, 8: 0.0, 16: 0.0} for name in ("w0", "w1")} | {"a0": {8: 0.0, 16: 0.0}})
    found = allocate(table, Budget(weight_bits=16.0))
    assert set(found.bits.values()) == {8}
    assert find_uniform(table.inventory, Budget(weight_bits=16.0)) == (8, {"w0": 8, "w1": 8, "a0": 8})


def test_sites_that_follow_are_in_float_too():
    sites = (
        weight("w0", 64, (4, 16)),
        replace(activation("w0.output", 10, (8,)), is_searched=False, follows=("w0",)),
        replace(activation("other.output", 10, (8,)), is_searched=False),
    )
    table = make_table(sites, {"w0": {4: 5.0, 16: 0.0}})
    assert allocate(table, 16.0).bits == {"w0": 16, "w0.output": 16, "other.output": 8}
    assert allocate(table, 4.0).bits == {"w0": 4, "w0.output": 8, "other.output": 8}
    assert allocate(table, 16.0).scores == {"w0": Score(0.0, 0.0)} or allocate(table, 16.0).score == 0

"""Weights that are too small to be packed, counted as the file stores them."""

import pytest
import torch
from tables import make_table, weight

import infoq_fx
from infoq_fx.allocation.cost import measure_cost, packs_weights, weight_bytes


@pytest.mark.parametrize(
    ("numel", "bits", "expected"),
    [(400, 4, 200), (80, 4, 80), (82, 4, 41), (320, 7, 320), (328, 7, 287), (320, 8, 320), (10, 2, 10), (10, 16, 20)],
    ids=str,
)
def test_a_weight_is_packed_where_that_saves_more_than_its_operators_take(numel, bits, expected):
    """They take 40 bytes; a weight of 16 bits has no scale."""
    assert weight_bytes(weight("w", numel), bits) == expected + (4 if bits < 16 else 0)
    assert weight_bytes(weight("w", numel), bits, is_packed=False) == (2 * numel if bits == 16 else numel + 4)


def test_a_network_of_a_few_hundred_weights_is_not_packed():
    """At 2 bits, 440 weights save 330 bytes, 40 of which go to their own operators, and less than 300 are left."""
    tables = [make_table((weight("w", n), weight("tiny", 50)), {}) for n in (440, 460)]
    assert [packs_weights(table.inventory) for table in tables] == [False, True]
    sizes = [measure_cost(table.inventory, {"w": 2, "tiny": 2}).size_bytes for table in tables]
    assert sizes == [440 + 50 + 8, 115 + 50 + 8]


def test_what_is_not_packed_gets_all_bits_that_cost_nothing():
    scores = {name: {b: 4.0**-b for b in range(2, 9)} for name in ("w", "tiny")}
    table = make_table((weight("w", 4000), weight("tiny", 50)), scores)
    found = infoq_fx.allocate(table, infoq_fx.Budget(size_bytes=1500 + 50 + 8))
    assert found.bits == {"w": 3, "tiny": 8}
    tiny = make_table((weight("w", 200), weight("tiny", 50)), scores)
    assert set(infoq_fx.allocate(tiny, infoq_fx.Budget(size_bytes=258)).bits.values()) == {8}
    with pytest.raises(infoq_fx.InfeasibleBudgetError, match="below the smallest reachable 258"):
        infoq_fx.allocate(tiny, infoq_fx.Budget(size_bytes=150))


@pytest.mark.slow
def test_the_file_of_a_tiny_network_takes_what_is_counted(tmp_path):
    """Besides, it has constants of a few dozen bytes."""
    model, data = (
        torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)),
        torch.randn(32, 16),
    )
    quantized = infoq_fx.quantize(
        model.eval(), 3.0, calibration_data=data, criterion="weight_mse", recovery="none", progress=False
    )
    held = infoq_fx.measure_file(infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")).tensor_bytes
    counted = infoq_fx.allocation_of(quantized).cost.size_bytes
    assert 0.9 * counted < held < 1.1 * counted

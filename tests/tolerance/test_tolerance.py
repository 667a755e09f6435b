"""What a tolerance may be, what it turns into, and how it is written."""

import dataclasses

import pytest
import torch
from torch import nn

import infoq_fx
from infoq_fx.allocation.allocation_file import decode_allocation, describe_allocation
from infoq_fx.errors import OptionError
from infoq_fx.tolerance.tolerance import limit_cost, read_range
from infoq_fx.types import MeasuredLoss

LOSS = MeasuredLoss(measure="drop", limit=1.0, value=0.6, standard_error=0.3, samples=500, metric="top-1")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "has nothing to keep; give exactly one of drop, nats, sqnr_db"),
        ({"drop": 1.0, "nats": 0.1}, "has drop and nats; give exactly one"),
        ({"drop": -1.0}, r"drop=-1.0\); give a finite number of at least 0"),
        ({"nats": True}, r"nats=True\); give"),
        ({"sqnr_db": float("inf")}, r"sqnr_db=inf\); give"),
        ({"drop": "1"}, r"drop='1'\); give"),
        ({"drop": 1.0, "minimize": "compression"}, "minimize='compression'.*give one of size_bytes, bitops"),
        ({"drop": 1.0, "within": 3.0}, r"within=3.0\); give a Budget"),
    ],
)
def test_a_tolerance_is_checked(arguments, text):
    with pytest.raises(OptionError, match=text):
        infoq_fx.Tolerance(**arguments)


def test_limits_besides_are_kept_and_the_smaller_limit_holds():
    tolerance = infoq_fx.Tolerance(drop=1.0, within=infoq_fx.Budget(bitops=1e6, size_bytes=500, costs={"a": 2.0}))
    assert limit_cost(tolerance, 400) == infoq_fx.Budget(bitops=1e6, size_bytes=400, costs={"a": 2.0})
    assert limit_cost(tolerance, 600).size_bytes == 500
    own = dataclasses.replace(tolerance, minimize="a")
    assert limit_cost(own, 1.0).limits == {"bitops": 1e6, "size_bytes": 500, "a": 1.0}
    assert limit_cost(own, 3.0).costs == {"a": 2.0}
    assert limit_cost(infoq_fx.Tolerance(drop=1.0), 7) == infoq_fx.Budget(size_bytes=7)


@pytest.fixture(scope="module")
def inventory():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return infoq_fx.prepare(model, torch.randn(32, 4), bits=(2, 4, 8)).inventory


def test_the_range_is_that_of_the_candidates(inventory, monkeypatch):
    least, most = read_range(infoq_fx.Tolerance(drop=1.0, minimize="weight_bits"), inventory, {})
    assert (least, most) == (2, 8)
    assert read_range(infoq_fx.Tolerance(drop=1.0, minimize="weight_bits"), inventory, {"0.weight": 4})[1] < 8
    monkeypatch.setitem(infoq_fx.COSTS, "ms", lambda operation, left, right: 0.5 * left)
    assert read_range(infoq_fx.Tolerance(drop=1.0, minimize="ms"), inventory, {}) == (2.0, 8.0)


def test_a_cost_that_is_unknown_or_fixed_is_refused(inventory):
    with pytest.raises(OptionError, match=r"'size_byte'; nearest of .*'size_bytes'"):
        read_range(infoq_fx.Tolerance(drop=1.0, minimize="size_byte"), inventory, {})
    with pytest.raises(OptionError, match="at all candidate bit-widths; give bits= or activation_bits="):
        read_range(infoq_fx.Tolerance(drop=1.0, minimize="activation_bytes"), inventory, {})


def test_a_loss_reads_as_a_sentence_with_its_error():
    other = dataclasses.replace(LOSS, smaller_value=1.42, smaller_error=0.41)
    assert str(other) == "loses 0.6 ± 0.3 points of top-1 on 500 samples; the next smaller loses 1.4 ± 0.4"
    nats = dataclasses.replace(LOSS, measure="nats", value=1.234e-7, standard_error=2e-8, metric="")
    assert str(nats) == "loses 1.23e-07 ± 2e-08 nats a sample on 500 samples"
    sqnr = dataclasses.replace(
        LOSS, measure="sqnr_db", value=41.26, standard_error=None, limit=40.0, smaller_value=38.0
    )
    assert str(sqnr) == "has an SQNR of 41.3 dB on 500 samples; the next smaller has 38"
    assert sqnr.passes
    assert not dataclasses.replace(sqnr, limit=42.0).passes


def test_an_allocation_keeps_its_loss_in_files():
    allocation = infoq_fx.Allocation(bits={"a": 4}, loss=LOSS)
    assert decode_allocation(describe_allocation(allocation)) == allocation
    assert str(LOSS) in str(allocation)
    earlier = describe_allocation(allocation)
    del earlier["loss"]  # of a release that measured none
    assert decode_allocation(earlier).loss is None

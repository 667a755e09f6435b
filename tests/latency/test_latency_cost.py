"""The table of latencies as a cost: closed forms, files, errors."""

import json
from dataclasses import replace

import pytest
from tables import make_table, weight

import infoq_fx
from infoq_fx.allocation.cost import COSTS, measure_cost
from infoq_fx.errors import InfeasibleBudgetError, OptionError
from infoq_fx.latency.latency_cost import FileLatency, LatencyCost, load_latency
from infoq_fx.types import Budget, Inventory, Operation

COST = LatencyCost(
    target="onnxruntime",
    runtime="onnxruntime 1.0",
    threads=1,
    integer_ms={"a": 1.0, "b": 2.0},
    weight_only_ms={"a": 9.0, "b": 7.5},
    float_ms={"a": 3.0, "b": 5.0},
    rest_ms=0.25,
    files=(FileLatency("integers", 3.2, 3.25), FileLatency("float", 8.0, 6.0)),
)
A, B = Operation("a", 10, "wa", "x"), Operation("b", 20, "wb", "y")


@pytest.mark.parametrize(
    ("bits", "first", "second"),
    [((8, 8), 1.0, 2.0), ((2, 4), 1.0, 2.0), ((4, None), 9.0, 7.5), ((None, 8), 3.0, 5.0), ((None, None), 3.0, 5.0)],
    ids=str,
)
def test_an_operation_runs_in_integers_only_where_both_operands_do(bits, first, second):
    assert COST(A, *bits) == first + 0.25
    assert COST(B, *bits) == second


def test_the_cost_of_an_allocation_has_the_rest_once(monkeypatch):
    monkeypatch.setitem(COSTS, "latency_ms", COST)
    sites = (weight("wa", 10, (4, 8)), weight("wb", 10, (4, 8)))
    operations = (replace(A, right=None), replace(B, right="wa"))
    inventory = Inventory(sites, operations, 0)
    assert measure_cost(inventory, {"wa": 4, "wb": 8}, ["latency_ms"])["latency_ms"] == 9.0 + 2.0 + 0.25
    table = make_table(sites, {"wa": {4: 1.0, 8: 0.0}, "wb": {4: 1.0, 8: 0.0}}, operations)
    assert infoq_fx.allocate(table, Budget(costs={"latency_ms": 11.25})).bits == {"wa": 8, "wb": 8}
    with pytest.raises(InfeasibleBudgetError, match=r"reachable 11\.25"):
        infoq_fx.allocate(table, Budget(costs={"latency_ms": 11.2}))


def test_a_file_serves_on_another_device(tmp_path):
    COST.save(tmp_path / "latency.json")
    assert load_latency(tmp_path / "latency.json") == COST
    document = json.loads((tmp_path / "latency.json").read_text())
    assert document["integer_ms"] == {"a": 1.0, "b": 2.0}


def test_the_text_says_what_the_sum_misses():
    assert COST.files[1].missed == 0.25
    lines = str(COST).splitlines()
    assert lines[0] == "latencies in ms of one sample in onnxruntime 1.0, one thread"
    assert "float: 8 ms measured, sum 6 ms (-25.0 %)" in lines
    assert any(line.split() == ["b", "2.0000", "7.5000", "5.0000"] for line in lines)
    assert ">7.5000</td>" in COST._repr_html_()
    assert "4 threads" in str(replace(COST, threads=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"float_ms": {"a": 3.0}}, "2, 2, 1 operations; give all three for the same"),
        ({"integer_ms": {}, "weight_only_ms": {}, "float_ms": {}}, "0, 0, 0 operations"),
        ({"float_ms": {"a": 3.0, "b": -1.0}}, "the latency of 'b' is -1.0 ms; give a finite"),
        ({"integer_ms": {"a": "1", "b": 1.0}}, "the latency of 'a' is '1' ms"),
        ({"rest_ms": float("nan")}, "the latency of 'the rest' is nan ms"),
    ],
    ids=["one missing", "none", "negative", "text", "rest"],
)
def test_latencies_are_checked(change, message):
    with pytest.raises(OptionError, match=message):
        replace(COST, **change)


def test_an_operation_of_another_model_is_named():
    with pytest.raises(OptionError, match=r"the latencies have no operation 'aa', the nearest are 'a'.*; give those"):
        COST(replace(A, name="aa"), 8, 8)


@pytest.mark.parametrize(
    ("text", "reason"),
    [(None, "No such file"), ("{", "not JSON"), ("{}", "format marker"), ("damaged", "damaged: KeyError")],
    ids=["missing", "cut", "other", "damaged"],
)
def test_a_file_that_holds_no_latencies_is_refused(text, reason, tmp_path):
    path = tmp_path / "latency.json"
    if text == "damaged":
        text = json.dumps({"format": "infoq_fx.LatencyCost", "version": 1})
    if text is not None:
        path.write_text(text)
    with pytest.raises(OptionError, match=rf"cannot read latencies from .*{reason}.*; make them with"):
        load_latency(path)


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OptionError, match=r"cannot write the latencies .*; give a path"):
        COST.save(tmp_path / "no" / "latency.json")

"""The allocation, against brute force and by hand."""

import math
import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from other_solver import meets, score_of
from random_tables import every_allocation, random_budget, random_table
from tables import ALL_BITS, SMALL, activation, make_table, resnet50_sized_table, weight

import infoq_fx
from infoq_fx.allocation.cost import measure_cost
from infoq_fx.allocation.solver import allocate, check_budget
from infoq_fx.errors import InfeasibleBudgetError, OptionError
from infoq_fx.table import SensitivityTable
from infoq_fx.types import Budget, Operation

pytestmark = pytest.mark.usefixtures("free_unpacking")  # their networks are tiny


def best_by_enumeration(table: SensitivityTable, budget: Budget, alpha: float) -> float | None:
    inventory = table.inventory
    fitting = (b for b in every_allocation(inventory) if meets(measure_cost(inventory, b), budget))
    return min((score_of(table, bits, alpha) for bits in fitting), default=None)


LIMITS = ("weight_bits", "compression", "size_bytes", "bitops", "activation_bytes")


@pytest.mark.parametrize(
    "names",
    [
        ("weight_bits",),
        ("compression",),
        ("bitops",),
        ("size_bytes", "bitops"),
        ("bitops", "activation_bytes"),
        LIMITS,
    ],
    ids=["mean", "compression", "bitops", "size and bitops", "bitops and activations", "all limits"],
)
@pytest.mark.parametrize(("branches", "states"), [(400, 1 << 15), (10**6, 4), (0, 0)], ids=["listed", "split", "HiGHS"])
def test_equals_brute_force(
    names: tuple[str, ...], branches: int, states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infoq_fx.allocation.core_problem._MAX_BRANCHES", branches)
    monkeypatch.setattr("infoq_fx.allocation.core_problem._MAX_STATES", states)
    monkeypatch.setattr("infoq_fx.allocation.core_problem._FEW_STATES", 0)
    rng = random.Random(str(names))
    infeasible = 0
    for trial in range(12):
        table = random_table(rng, weights=4, activations=2, sign=trial % 4 == 0)
        budget = random_budget(rng, table.inventory, names)
        alpha = rng.choice([1.0, 0.3, 2.0])
        expected = best_by_enumeration(table, budget, alpha)
        if expected is None:
            infeasible += 1
            with pytest.raises(InfeasibleBudgetError):
                allocate(table, budget, alpha=alpha)
            continue
        found = allocate(table, budget, alpha=alpha)
        assert found.score == pytest.approx(expected, rel=1e-12, abs=1e-15)
        assert found.score == score_of(table, found.bits, alpha)
        assert found.cost == measure_cost(table.inventory, found.bits)
        assert meets(found.cost, budget)
        assert found.uniform_score is None or found.score <= found.uniform_score
    assert infeasible < 6


@settings(max_examples=15, deadline=None)
@given(
    exponents=st.lists(st.floats(-12, 6), min_size=4, max_size=4),
    seed=st.integers(0, 10**6),
    mean_bits=st.floats(2.2, 7.8),
)
def test_scores_of_any_magnitude(exponents: list[float], seed: int, mean_bits: float) -> None:
    rng = random.Random(seed)
    sites = tuple(weight(f"w{i}", rng.randrange(1, 5000), (2, 4, 8)) for i in range(4))
    scores = {f"w{i}": {b: 10.0**e * rng.uniform(0.2, 1) * 4.0**-b for b in (2, 4, 8)} for i, e in enumerate(exponents)}
    table = make_table(sites, scores)
    expected = best_by_enumeration(table, Budget(weight_bits=mean_bits), 1.0)
    assert allocate(table, mean_bits).score == pytest.approx(expected, rel=1e-12)


def test_tiny_differences_decide() -> None:
    # One bit more for one of two equal layers: the better one by 1e-15, against scores of 1e-9.
    sites = (weight("a", 10, (2, 3)), weight("b", 10, (2, 3)), weight("c", 10, (2, 3)))
    gains = {"a": 1e-9, "b": 1e-9 + 1e-15, "c": 1e-9 - 1e-15}
    table = make_table(sites, {name: {2: gain, 3: 0.0} for name, gain in gains.items()})
    assert allocate(table, 2.4).bits == {"a": 2, "b": 3, "c": 2}


@pytest.mark.parametrize("seed", range(8))
def test_a_huge_score_to_be_avoided_does_not_hide_small_ones(seed: int) -> None:
    # The allocation known beforehand scores 1e9; the optimum lies near 1e-6, with differences of 1e-9.
    rng = random.Random(seed)
    small = {f"w{i}": {2: 1e-6 * rng.uniform(0.9, 1.1), 4: rng.random() * 1e-7} for i in range(8)}
    sites = (
        weight("big", 10, (2, 4, 8)),
        *(weight(name, rng.randrange(500, 1500), (2, 4)) for name in small),
    )
    table = make_table(sites, {"big": {2: 1e9, 4: 1.0, 8: 0.0}, **small})
    expected = best_by_enumeration(table, Budget(weight_bits=2.9), 1.0)
    assert allocate(table, 2.9).score == pytest.approx(expected, rel=1e-12)


def test_budgets_larger_than_the_tolerances_of_the_solver() -> None:
    # 10^11 BitOps: one multiply-accumulate too many is 1e-11 of the limit and must still count.
    sites = (weight("a", 10, (2, 3)), weight("b", 10, (2, 3)), activation("x", 10, (2, 3)))
    macs = 10**10 + 1
    operations = (Operation("a", macs, "x", "a"), Operation("b", macs + 1, "x", "b"))
    table = make_table(sites, {"a": {2: 2, 3: 1}, "b": {2: 3, 3: 1}, "x": {2: 9, 3: 0}}, operations)
    enough = macs * 6 + (macs + 1) * 9
    assert allocate(table, Budget(bitops=enough)).bits == {"a": 2, "b": 3, "x": 3}
    assert allocate(table, Budget(bitops=enough - 1)).bits == {"a": 3, "b": 2, "x": 3}


def test_more_budget_is_never_worse() -> None:
    budgets = [2, 2.1, 2.5, 3, 3.3, 4, 5.75, 7, 8, 100]
    scores = [allocate(SMALL, budget).score for budget in budgets]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(8 / 16 + 2 / 16 + 0.25)
    assert scores[-1] == scores[-2] == pytest.approx(10 * 4.0**-8 + 0.25)


def test_fields_of_the_allocation() -> None:
    found = allocate(SMALL, 3, alpha=2.0)
    # conv takes the 3 * 100 bits that fc gives up: 8/4096 + 2/16 is less than 8/64 + 2/64 at 3 bits each.
    assert found.bits == {"conv": 6, "fc": 2, "relu": 8, "input": 8}
    assert list(found.bits) == ["conv", "fc", "relu", "input"]
    assert found.score == pytest.approx(8 / 4096 + 2 / 16 + 2 * 0.25)
    assert found.standard_error == pytest.approx(0.1 * math.sqrt((8 / 4096) ** 2 + (2 / 16) ** 2 + 0.5**2))
    assert (found.uniform_bits, found.uniform_score) == (3, pytest.approx(10 / 64 + 0.5))
    assert found.criterion == "test"
    assert found.budget == Budget(weight_bits=3.0)
    assert found.scores == {name: SMALL.scores[name][found.bits[name]] for name in ("conv", "fc", "relu")}
    assert found.cost == measure_cost(SMALL.inventory, found.bits)


@pytest.mark.parametrize("budget", [4, 4.0, np.float64(4), np.float32(4), Budget(weight_bits=4)])
def test_a_number_is_the_mean_weight_bits(budget: float | Budget) -> None:
    assert allocate(SMALL, budget).bits == allocate(SMALL, Budget(compression=8)).bits


@pytest.mark.parametrize("budget", [True, "3", None, [3.0], float("nan"), -1.0, 0, float("inf")], ids=repr)
def test_a_budget_that_is_none_is_refused(budget: float) -> None:
    with pytest.raises(OptionError, match=r"budget=|Budget\("):
        allocate(SMALL, budget)


@pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf"), True, "1"], ids=repr)
def test_alpha_is_checked(alpha: float) -> None:
    with pytest.raises(OptionError, match="alpha="):
        allocate(SMALL, 3, alpha=alpha)


def test_alpha_weighs_activations() -> None:
    # relu at 8 bits costs 1200 BitOps more with fc at 2 bits: worth it or not, depending on alpha.
    budget = Budget(bitops=8 * 1000 * 3 + 300 * 16)
    assert allocate(SMALL, budget, alpha=100.0).bits["relu"] == 8
    assert allocate(SMALL, budget, alpha=1e-3).bits["relu"] == 4
    assert allocate(SMALL, budget, alpha=0.0).bits["relu"] == 4


@pytest.mark.parametrize(
    ("budget", "messages"),
    [
        (1.5, ["budget weight_bits=1.5 is below the smallest reachable 2 (all layers at 2 bits)"]),
        (
            Budget(compression=17),
            ["budget compression=17 is above the largest reachable 16 (all layers at 2 bits)"],
        ),
        (Budget(size_bytes=107, weight_bits=3), ["size_bytes=107 is below the smallest reachable 108"]),
        (
            Budget(bitops=10, activation_bytes=24),
            ["bitops=10", "18400", "activation_bytes=24", "reachable 35"],
        ),
    ],
    ids=["mean", "compression", "size", "two"],
)
def test_an_infeasible_budget_says_what_is_reachable(budget: float | Budget, messages: list[str]) -> None:
    with pytest.raises(InfeasibleBudgetError) as caught:
        allocate(SMALL, budget)
    for message in messages:
        assert message in str(caught.value)
    assert "weight_bits=3 " not in str(caught.value)


def test_the_reachable_value_is_reached() -> None:
    table = make_table((weight("a", 3, (2, 4)), weight("b", 7_000_001, (3,))), {"a": {2: 1, 4: 0}})
    with pytest.raises(InfeasibleBudgetError) as caught:
        allocate(table, 2.0)
    reachable = float(str(caught.value).split("reachable ")[1].split()[0])
    assert allocate(table, reachable).bits == {"a": 2, "b": 3}
    assert "every layer at its fewest bits" in str(caught.value)


def test_a_reachable_value_has_few_digits_and_is_reached() -> None:
    """Two thirds, rounded up for upper limits and down for lower ones."""
    table = make_table((weight("a", 1, (2, 4)), weight("b", 2, (3, 4))), {n: {2: 2, 3: 1, 4: 0} for n in "ab"})
    with pytest.raises(InfeasibleBudgetError, match=r"weight_bits=2.5 is below the smallest reachable 2.66667 "):
        allocate(table, 2.5)
    assert allocate(table, 2.66667).bits == {"a": 2, "b": 3}
    with pytest.raises(InfeasibleBudgetError, match=r"compression=13 is above the largest reachable 12 "):
        allocate(table, Budget(compression=13))
    uneven = make_table((weight("a", 1, (2, 4)), weight("b", 6, (3, 4))), {n: {2: 2, 3: 1, 4: 0} for n in "ab"})
    with pytest.raises(InfeasibleBudgetError, match=r"above the largest reachable 11.2 "):
        allocate(uneven, Budget(compression=12))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget, "budget=Budget is a class; give an instance"),
        (infoq_fx.Tolerance, "budget=Tolerance is a class"),
    ],
    ids=["budget", "tolerance"],
)
def test_a_class_is_no_budget(budget: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        allocate(SMALL, budget)


def test_check_budget_needs_no_scores() -> None:
    assert check_budget(SMALL.inventory, 3) == Budget(weight_bits=3.0)
    with pytest.raises(InfeasibleBudgetError, match="reachable 2 "):
        check_budget(SMALL.inventory, 1)


def test_pins_are_kept() -> None:
    found = allocate(SMALL, 3, pin={"conv": 2, "relu": 4})
    assert found.bits == {"conv": 2, "fc": 3, "relu": 4, "input": 8}
    assert (found.uniform_bits, found.uniform_score) == (3, pytest.approx(8 / 16 + 2 / 64 + 0.5))
    assert allocate(SMALL, 8, pin={"conv": 2, "fc": 2}).uniform_bits is None
    with pytest.raises(InfeasibleBudgetError, match=r"reachable 3.5 \(every layer .*, 'conv' pinned to 8\).* or pin"):
        allocate(SMALL, 3, pin={"conv": 8})


@pytest.mark.parametrize(
    ("pin", "message"),
    [
        ({"convv": 3}, "unknown site in pin 'convv'.*'conv'"),
        ({"relu": 5}, r"pin\['relu'\]=5 is not among .*\(4, 8\)"),
        ({"conv": 9}, r"pin\['conv'\] holds 9"),
        ({"conv": True}, r"pin\['conv'\] holds True"),
    ],
    ids=["name", "candidate", "range", "bool"],
)
def test_pins_are_checked(pin: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        allocate(SMALL, 3, pin=pin)


def test_every_candidate_needs_a_score() -> None:
    table = make_table((weight("a", 10, (2, 4)),), {"a": {2: 1.0}})
    with pytest.raises(OptionError, match=r"no score for 'a' at 4 bits; scored there: 2"):
        allocate(table, 3)
    with pytest.raises(OptionError, match=r"no score for 'a' at 2 bits; scored there: none"):
        allocate(replace(table, scores={}), 3)
    assert allocate(replace(table, scores={}), 3, pin={"a": 2}).score == 0


def test_equal_scores_take_the_most_bits_that_fit() -> None:
    table = make_table((weight("a", 10), weight("b", 10)), dict.fromkeys("ab", dict.fromkeys(ALL_BITS, 0.5)))
    assert allocate(table, 8).bits == {"a": 8, "b": 8}
    assert sum(allocate(table, 5).bits.values()) == 10
    noisy = make_table((weight("a", 10, (2, 4, 8)),), {"a": {2: 1.0, 4: 0.1, 8: 0.2}})
    assert allocate(noisy, 8).bits == {"a": 4}


def test_uniform_activations_follow_where_their_largest_does_not_fit() -> None:
    sites = (weight("w", 10, (2, 4, 8)), activation("x", 10, (4, 8)))
    table = make_table(sites, {"w": {2: 3, 4: 1, 8: 0}, "x": {4: 1, 8: 0}}, (Operation("op", 1, "x", "w"),))
    assert allocate(table, Budget(bitops=32)).uniform_bits == 4  # 4 bits by 8
    assert allocate(table, Budget(bitops=31)).uniform_bits == 4  # 4 bits by 4
    assert allocate(table, Budget(bitops=31)).uniform_score == 2
    assert allocate(table, Budget(bitops=15)).uniform_bits is None  # 2 bits by 8 is 16; no 2 bits for x
    assert allocate(table, Budget(bitops=15)).bits == {"w": 2, "x": 4}


def test_nothing_to_search() -> None:
    table = make_table((weight("w", 10, (8,)), activation("x", 10, (8,))), {})
    found = allocate(table, 8)
    assert (found.bits, found.score, found.standard_error, found.uniform_bits) == (
        {"w": 8, "x": 8},
        0,
        0,
        None,
    )


@pytest.mark.parametrize("branches", [400, 0], ids=["listed", "HiGHS"])
def test_the_solver_is_silent_and_leaves_nothing(
    branches: int, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infoq_fx.allocation.core_problem._MAX_BRANCHES", branches)
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        allocate(SMALL, 3)
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]


@pytest.mark.parametrize("seed", range(10))
def test_near_ties_in_the_budget(seed: int) -> None:
    # Layers of 10^10 multiply-accumulates, different by a few, and a limit that one allocation meets exactly.
    rng = random.Random(seed)
    sites = (
        *(weight(f"w{i}", rng.randrange(1, 10**7), (2, 3, 4)) for i in range(3)),
        activation("x", 9, (2, 3)),
    )
    operations = tuple(Operation(f"w{i}", 10**10 + rng.randrange(-3, 4), f"w{i}", "x") for i in range(3))
    table = make_table(sites, {s.name: {b: rng.random() * 4.0**-b for b in s.bits} for s in sites}, operations)
    target = measure_cost(table.inventory, rng.choice(list(every_allocation(table.inventory))))
    budget = Budget(bitops=target.bitops - seed % 2, size_bytes=target.size_bytes)
    expected = best_by_enumeration(table, budget, 1.0)
    if expected is not None:
        assert allocate(table, budget).score == pytest.approx(expected, rel=1e-12)


def test_the_result_repeats() -> None:
    table = resnet50_sized_table(2, activation_bits=(8,))
    assert allocate(table, 3.7) == allocate(table, 3.7)

"""The allocation, against brute force and against another solver."""

import itertools
import math
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from other_solver import meets, score_of, size_and_bitops_budgets, solve_pairs_with_highs, solve_with_highs
from tables import ALL_BITS, SMALL, activation, make_table, resnet50_sized_table, weight

from infoq_fx.allocation import integer_program
from infoq_fx.allocation.cost import COSTS, measure_cost
from infoq_fx.allocation.solver import allocate, check_budget
from infoq_fx.errors import InfeasibleBudgetError, InfoqError, OptionError
from infoq_fx.table import SensitivityTable
from infoq_fx.types import Budget, Cost, Inventory, Operation


def random_table(rng: random.Random, *, weights: int, activations: int, sign: bool = False) -> SensitivityTable:
    """All that an inventory may hold: shared sites, float operands, attention, fixed and unsearched sites."""
    triples = [(2, 4, 8), (2, 3, 4), (4, 6, 8), (3, 8), (5,)]
    sites = [
        *(weight(f"w{i}", rng.choice([1, 7, 64, 1000, 4096]), rng.choice(triples)) for i in range(weights)),
        *(activation(f"a{i}", rng.choice([3, 50, 999]), rng.choice(triples)) for i in range(activations)),
        replace(activation("residual", 100, (8,)), is_searched=False),
    ]
    names: list[str | None] = [*(site.name for site in sites), None]
    operations = tuple(
        Operation(f"op{i}", rng.randrange(1, 10**6), rng.choice(names), rng.choice(names)) for i in range(6)
    )
    scores = {s.name: {b: rng.random() * 4.0**-b - sign * 0.01 for b in s.bits} for s in sites if len(s.bits) > 1}
    return make_table(tuple(sites), scores, operations, float_bytes=rng.randrange(50), ignored_weights=rng.randrange(9))


def every_allocation(inventory: Inventory) -> Iterator[dict[str, int]]:
    names = [site.name for site in inventory.sites]
    for bits in itertools.product(*(site.bits for site in inventory.sites)):
        yield dict(zip(names, bits, strict=True))


def best_by_enumeration(table: SensitivityTable, budget: Budget, alpha: float) -> float | None:
    inventory, container = table.inventory, budget.container
    fitting = (b for b in every_allocation(inventory) if meets(measure_cost(inventory, b, container), budget))
    return min((score_of(table, bits, alpha) for bits in fitting), default=None)


def random_budget(rng: random.Random, inventory: Inventory, names: tuple[str, ...]) -> Budget:
    """Limits between the extremes; half of them exactly at the cost of some allocation."""
    container = rng.choice([None, None, "packed", "int2"])
    low, high = (measure_cost(inventory, {s.name: s.bits[i] for s in inventory.sites}, container) for i in (0, -1))
    middle = measure_cost(inventory, {s.name: rng.choice(s.bits) for s in inventory.sites}, container)
    share = rng.random()
    limits = {}
    for name in names:
        between = (1 - share) * getattr(low, name) + share * getattr(high, name)
        limits[name] = max(rng.choice([between, getattr(middle, name)]), 1e-3)
    return Budget(**limits, container=container)


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
        assert found.cost == measure_cost(table.inventory, found.bits, budget.container)
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


@pytest.fixture
def only_highs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is listed: HiGHS has to find all that the bound leaves."""
    monkeypatch.setattr("infoq_fx.allocation.core_problem._MAX_BRANCHES", 0)


@pytest.mark.usefixtures("only_highs")
def test_the_rows_hold_without_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rows that are too loose would still give the optimum, by cutting off one wrong allocation after another.
    runs = []
    run = integer_program._run_highs
    monkeypatch.setattr(integer_program, "_run_highs", lambda problem: runs.append(run(problem)) or runs[-1])
    for seed in range(8):
        rng = random.Random(seed)
        table = random_table(rng, weights=5, activations=4)
        smallest = measure_cost(table.inventory, {s.name: s.bits[0] for s in table.inventory.sites})
        allocate(table, Budget(bitops=1.3 * smallest.bitops, size_bytes=1.3 * smallest.size_bytes))
    assert 4 <= len(runs) <= 8


def test_budgets_larger_than_the_tolerances_of_the_solver() -> None:
    # 10^11 BitOps: one multiply-accumulate too many is 1e-11 of the limit and must still count.
    sites = (weight("a", 10, (2, 3)), weight("b", 10, (2, 3)), activation("x", 10, (2, 3)))
    macs = 10**10 + 1
    operations = (Operation("a", macs, "x", "a"), Operation("b", macs + 1, "x", "b"))
    table = make_table(sites, {"a": {2: 2, 3: 1}, "b": {2: 3, 3: 1}, "x": {2: 9, 3: 0}}, operations)
    enough = macs * 6 + (macs + 1) * 9
    assert allocate(table, Budget(bitops=enough)).bits == {"a": 2, "b": 3, "x": 3}
    assert allocate(table, Budget(bitops=enough - 1)).bits == {"a": 3, "b": 2, "x": 3}


@pytest.mark.parametrize(("mean_bits", "bitops"), [(3.0, 1e12), (4.0, 1.2e11), (5.5, 1.6e11)])
def test_equals_another_solver_on_a_real_size(mean_bits: float, bitops: float) -> None:
    table = resnet50_sized_table(3, activation_bits=(8,))
    numel = sum(s.numel for s in table.inventory.sites if s.kind == "weight")
    limits = {"size_bytes": mean_bits * numel / 8 + 4 * 53_120 + 4 * 27_560, "bitops": bitops}
    started = time.perf_counter()
    found = allocate(table, Budget(**limits))
    assert time.perf_counter() - started < 20
    assert found.score == pytest.approx(solve_with_highs(table, limits), rel=1e-6)
    assert found.uniform_score is not None
    assert found.score < found.uniform_score


@pytest.mark.parametrize("index", [7, 16, 23, 31])
def test_equals_another_solver_with_searched_activations(index: int) -> None:
    table = resnet50_sized_table(1)
    budget = size_and_bitops_budgets(table)[index]
    found = allocate(table, budget)
    assert meets(measure_cost(table.inventory, found.bits), budget)
    assert found.score == pytest.approx(solve_pairs_with_highs(table, budget), rel=1e-9)


def test_fifty_budgets_in_ten_seconds() -> None:
    table = resnet50_sized_table(1)
    budgets = size_and_bitops_budgets(table)
    started = time.process_time()
    scores = [allocate(table, budget).score for budget in budgets]
    assert len(scores) == 50
    assert time.process_time() - started < 10
    grid = np.array(scores, dtype=float).reshape(10, 5)
    assert (np.diff(grid, axis=0) <= 0).all()
    assert (np.diff(grid, axis=1) <= 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("index", range(50))
def test_fifty_budgets_equal_another_solver(index: int) -> None:
    test_equals_another_solver_with_searched_activations(index)


@pytest.mark.slow
def test_resnet50_with_activations_size_and_bitops() -> None:
    table = resnet50_sized_table(1)
    macs = sum(operation.macs for operation in table.inventory.operations)
    budget = Budget(compression=32 / 4, bitops=macs * 16)
    found = allocate(table, budget)
    assert found.uniform_bits == 4
    assert found.score < found.uniform_score
    assert meets(measure_cost(table.inventory, found.bits), budget)


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
    # relu at 8 bits costs 1200 BitOps more with fc at 2 bits: dear or not, depending on alpha.
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


def test_check_budget_needs_no_scores() -> None:
    assert check_budget(SMALL.inventory, 3) == Budget(weight_bits=3.0)
    with pytest.raises(InfeasibleBudgetError, match="reachable 2 "):
        check_budget(SMALL.inventory, 1)


def test_pins_are_kept() -> None:
    found = allocate(SMALL, 3, pin={"conv": 2, "relu": 4})
    assert found.bits == {"conv": 2, "fc": 3, "relu": 4, "input": 8}
    assert (found.uniform_bits, found.uniform_score) == (3, pytest.approx(8 / 16 + 2 / 64 + 0.5))
    assert allocate(SMALL, 8, pin={"conv": 2, "fc": 2}).uniform_bits is None
    with pytest.raises(InfeasibleBudgetError, match=r"reachable 3.5 \(every layer at its fewest bits\)"):
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


def test_equal_scores_take_the_cheaper() -> None:
    table = make_table((weight("a", 10), weight("b", 10)), dict.fromkeys("ab", dict.fromkeys(ALL_BITS, 0.5)))
    assert allocate(table, 8).bits == {"a": 2, "b": 2}
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


@pytest.mark.usefixtures("only_highs")
def test_a_solver_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: pulp.HiGHS, lp: pulp.LpProblem) -> None:
        raise pulp.PulpSolverError("HiGHS: Not Available")

    monkeypatch.setattr("pulp.HiGHS.actualSolve", fail)
    with pytest.raises(InfoqError, match=r"HiGHS did not run: .*install the package 'highspy'"):
        allocate(SMALL, 3)


def test_highs_prints_nothing_in_a_fresh_process() -> None:
    # It may print when it is first used, and not through Python's standard output.
    program = (
        "from infoq_fx.allocation.integer_program import solve_with_highs\n"
        "from infoq_fx.types import Budget, Inventory, QuantSite\n"
        "sites = tuple(QuantSite(name, 'weight', (9, 3), (2, 3)) for name in 'ab')\n"
        "scores = {'a': {2: 2.0, 3: 1.0}, 'b': {2: 4.0, 3: 1.0}}\n"
        "bits = solve_with_highs(Inventory(sites, (), 0), Budget(weight_bits=2.5), scores)\n"
        "assert bits == {'a': 2, 'b': 3}, bits\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.usefixtures("only_highs")
def test_an_unproven_optimum_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(integer_program._HIGHS_OPTIONS, "timeLimit", 0)
    with pytest.raises(InfoqError, match="no proven optimum"):
        allocate(resnet50_sized_table(1), 3)


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


def own_cost(rng: random.Random, kind: str):
    """A latency that grows with the weights' bits; one that falls; one that jumps; one of both operands together."""
    table = {
        (name, i, j): rng.randrange(1, 40) / 10
        for name in range(6)
        for i in (None, *range(2, 9))
        for j in (None, *range(2, 9))
    }

    def measure(operation: Operation, left_bits: int | None, right_bits: int | None) -> float:
        number = int(operation.name.removeprefix("op"))
        if kind == "growing":
            return round(0.1 * (1 + number) * ((left_bits or 32) + 2 * (right_bits or 32)), 1)
        if kind == "falling":
            return round(0.1 * (1 + number) * (100 - (left_bits or 32) - 2 * (right_bits or 32)), 1)
        if kind == "jumping":
            return table[number, None, right_bits] + table[number, left_bits, None]
        return table[number, left_bits, right_bits]

    return measure


@pytest.mark.parametrize("kind", ["growing", "falling", "jumping", "together"])
@pytest.mark.parametrize("others", [(), ("weight_bits",), ("bitops", "activation_bytes")], ids=str)
@pytest.mark.parametrize("ties", ["", "some tied", "all tied"])
def test_a_cost_of_ones_own_equals_brute_force(
    kind: str, others: tuple[str, ...], ties: str, monkeypatch: pytest.MonkeyPatch
):
    rng = random.Random(f"{kind} {others}{ties}")
    infeasible = 0
    for trial in range(14):
        monkeypatch.setitem(COSTS, "latency_ms", own_cost(rng, kind))
        table = random_table(rng, weights=3, activations=2, sign=trial % 4 == 0)
        table = tie_scores(rng, table, {"": 0.0, "some tied": 0.7, "all tied": 1.0}[ties])
        costs = {
            tuple(b.items()): measure_cost(table.inventory, b, None, ["latency_ms"])
            for b in every_allocation(table.inventory)
        }
        reached = sorted({cost["latency_ms"] for cost in costs.values()})
        limit = rng.choice([reached[0], rng.choice(reached), math.nextafter(rng.choice(reached), 0)])
        limits = random_budget(rng, table.inventory, others).limits if others else {}
        budget = Budget(**limits, costs={"latency_ms": max(limit, 1e-3)})
        fitting = [score_of(table, dict(bits)) for bits, cost in costs.items() if meets_all(cost, budget)]
        if not fitting:
            infeasible += 1
            with pytest.raises(InfeasibleBudgetError, match="raise"):
                allocate(table, budget)
            continue
        found = allocate(table, budget)
        assert meets_all(measure_cost(table.inventory, found.bits, None, ["latency_ms"]), budget)
        assert found.score == pytest.approx(min(fitting), rel=1e-9, abs=1e-12)
        assert found.cost == measure_cost(table.inventory, found.bits, None, ["latency_ms"])
    assert infeasible < 14


def tie_scores(rng: random.Random, table: SensitivityTable, share: float) -> SensitivityTable:
    """The table with the scores of some sites equal at all bit-widths: their least."""
    tied = {name: rng.random() < share for name in table.scores}
    least = {name: min(by_bits.values(), key=lambda s: s.value) for name, by_bits in table.scores.items()}
    return replace(
        table,
        scores={n: dict.fromkeys(by_bits, least[n]) if tied[n] else by_bits for n, by_bits in table.scores.items()},
    )


@pytest.mark.parametrize("scores", [{2: 0.0, 4: 0.0, 8: 0.0}, {2: 0.1, 4: 0.1, 8: 0.3}, {2: -1.0, 4: -1.0, 8: -1.0}])
def test_equal_scores_under_a_cost_that_falls_with_the_bits(scores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COSTS, "latency_ms", lambda _, left, right: {2: 3.0, 4: 2.0, 8: 1.0}[right])
    sites = tuple(weight(name, 100, (2, 4, 8)) for name in "vw")
    table = make_table(sites, {"v": scores, "w": scores}, tuple(Operation(s.name, 10, None, s.name) for s in sites))
    found = allocate(table, Budget(costs={"latency_ms": 4.0}))
    assert found.score == pytest.approx(2 * min(scores.values()))
    assert found.cost.costs["latency_ms"] <= 4.0


def meets_all(cost: Cost, budget: Budget) -> bool:
    upper = {name: limit for name, limit in budget.limits.items() if name != "compression"}
    return cost.compression >= (budget.compression or 0) and all(cost[n] <= limit for n, limit in upper.items())


def test_limits_that_are_met_one_by_one_but_not_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bits are slow here, and eight are large."""
    monkeypatch.setitem(COSTS, "latency_ms", lambda _, left, right: {2: 3.0, 4: 2.5, 8: 1.0}[right])
    table = make_table(
        (weight("w", 100, (2, 4, 8)),), {"w": {2: 1.0, 4: 0.5, 8: 0.1}}, (Operation("op", 10, None, "w"),)
    )
    assert allocate(table, Budget(costs={"latency_ms": 2.5})).bits == {"w": 8}
    assert allocate(table, Budget(weight_bits=4, costs={"latency_ms": 2.5})).bits == {"w": 4}
    with pytest.raises(InfeasibleBudgetError, match="at once"):
        allocate(table, Budget(weight_bits=4, costs={"latency_ms": 2.0}))
    with pytest.raises(InfeasibleBudgetError, match=r"latency_ms=0.5 is below the smallest reachable 1 "):
        allocate(table, Budget(costs={"latency_ms": 0.5}))


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "fast", None, True])
def test_a_cost_is_a_number(value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COSTS, "latency_ms", lambda *_: value)
    table = make_table((weight("w", 100),), {"w": {b: 1.0 / b for b in ALL_BITS}}, (Operation("op", 10, None, "w"),))
    with pytest.raises(OptionError, match=r"cost 'latency_ms' is .* for 'op' at None and 2 bits; return a finite"):
        allocate(table, Budget(costs={"latency_ms": 1.0}))


def test_an_unknown_cost_says_how_to_make_it_known() -> None:
    table = make_table((weight("w", 100),), {"w": {b: 1.0 / b for b in ALL_BITS}}, (Operation("op", 10, None, "w"),))
    with pytest.raises(OptionError, match=r"infoq_fx.COSTS\['energy'\]"):
        allocate(table, Budget(costs={"energy": 1.0}))
    with pytest.raises(OptionError, match="give Budget\\(bitops="):
        Budget(costs={"bitops": 1.0})


def test_decimals_are_taken_as_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times 0.1 is 0.3, which floats deny."""
    monkeypatch.setitem(COSTS, "latency_ms", lambda *_: 0.1)
    sites = tuple(weight(f"w{i}", 10) for i in range(3))
    operations = tuple(Operation(f"op{i}", 10, None, f"w{i}") for i in range(3))
    table = make_table(sites, {s.name: {b: 1.0 / b for b in ALL_BITS} for s in sites}, operations)
    assert allocate(table, Budget(costs={"latency_ms": 0.3})).cost.costs == {"latency_ms": 0.3}


def test_a_container_counts_what_it_stores() -> None:
    packed = Budget(weight_bits=4, container="packed")
    found = allocate(SMALL, packed)
    assert all(found.bits[name] not in (2, 3) for name in ("conv", "fc"))  # they would cost 4
    assert found.score < allocate(SMALL, 3).score
    with pytest.raises(InfeasibleBudgetError, match=r"reachable 4 .*as stored in 'packed'"):
        allocate(SMALL, Budget(weight_bits=3, container="packed"))
    with pytest.raises(OptionError, match="unknown container 'pakced'; nearest of 3: 'packed'"):
        Budget(weight_bits=3, container="pakced")

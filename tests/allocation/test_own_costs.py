"""Costs of a user's own, against brute force."""

import math
import random
from dataclasses import replace

import pytest
from other_solver import score_of
from random_tables import every_allocation, random_budget, random_table
from tables import ALL_BITS, make_table, weight

from infoq_fx.allocation.cost import COSTS, measure_cost
from infoq_fx.allocation.solver import allocate
from infoq_fx.errors import InfeasibleBudgetError, OptionError
from infoq_fx.table import SensitivityTable
from infoq_fx.types import Budget, Cost, Operation


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
            tuple(b.items()): measure_cost(table.inventory, b, ["latency_ms"])
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
        assert meets_all(measure_cost(table.inventory, found.bits, ["latency_ms"]), budget)
        assert found.score == pytest.approx(min(fitting), rel=1e-9, abs=1e-12)
        assert found.cost == measure_cost(table.inventory, found.bits, ["latency_ms"])
    assert infeasible < 14


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
    """Three times 0.1 is 0.3, but not in floats."""
    monkeypatch.setitem(COSTS, "latency_ms", lambda *_: 0.1)
    sites = tuple(weight(f"w{i}", 10) for i in range(3))
    operations = tuple(Operation(f"op{i}", 10, None, f"w{i}") for i in range(3))
    table = make_table(sites, {s.name: {b: 1.0 / b for b in ALL_BITS} for s in sites}, operations)
    assert allocate(table, Budget(costs={"latency_ms": 0.3})).cost.costs == {"latency_ms": 0.3}


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

"""Layers with one bit-width, against brute force and by hand."""

import random
from dataclasses import replace

import pytest
from other_solver import meets, score_of
from random_tables import every_allocation, random_budget, random_table, tie_weights
from tables import SMALL, activation, make_table, weight

from infoq_fx.allocation.allocation_file import load_allocation, save_allocation
from infoq_fx.allocation.cost import COSTS, build_cost_row, measure_cost
from infoq_fx.allocation.solver import allocate, check_budget, find_uniform, pin_sites, propose
from infoq_fx.allocation.summary import summarize_allocation
from infoq_fx.errors import InfeasibleBudgetError, OptionError
from infoq_fx.report.curve import find_uniforms, trace_curve
from infoq_fx.table import SensitivityTable
from infoq_fx.types import Budget, Inventory, Operation

pytestmark = pytest.mark.usefixtures("free_unpacking")  # their networks are tiny

TIED = replace(SMALL, inventory=replace(SMALL.inventory, ties=(("conv", "fc"),)))
OWN = {(i, j): (7 * i + 5 * j + i * j % 3) / 10 for i in range(9) for j in range(9)}


@pytest.mark.parametrize("names", [("weight_bits",), ("size_bytes", "bitops"), ("bitops", "activation_bytes")], ids=str)
@pytest.mark.parametrize(("branches", "states"), [(400, 1 << 15), (10**6, 4), (0, 0)], ids=["listed", "split", "HiGHS"])
def test_equals_brute_force(
    names: tuple[str, ...], branches: int, states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infoq_fx.allocation.core_problem._MAX_BRANCHES", branches)
    monkeypatch.setattr("infoq_fx.allocation.core_problem._MAX_STATES", states)
    monkeypatch.setattr("infoq_fx.allocation.core_problem._FEW_STATES", 0)
    rng = random.Random(f"ties {names}")
    for _ in range(10):
        table = tie_weights(rng, random_table(rng, weights=4, activations=2))
        budget = random_budget(rng, table.inventory, names)
        check_against_all(table, budget)


@pytest.mark.parametrize("others", [(), ("weight_bits",)], ids=["alone", "with a mean"])
def test_a_cost_of_ones_own_equals_brute_force(others: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers jump, so that products of two tied weights need their own bits."""
    monkeypatch.setitem(COSTS, "ms", lambda operation, left, right: OWN[left or 0, right or 0])
    rng = random.Random(f"own ties {others}")
    for _ in range(12):
        table = tie_weights(rng, random_table(rng, weights=4, activations=1))
        every = [measure_cost(table.inventory, bits, ["ms"])["ms"] for bits in every_allocation(table.inventory)]
        limits = random_budget(rng, table.inventory, others).limits if others else {}
        check_against_all(table, Budget(**limits, costs={"ms": rng.choice(every)}))


def check_against_all(table: SensitivityTable, budget: Budget) -> None:
    inventory = table.inventory
    costs = [(bits, measure_cost(inventory, bits, budget.costs)) for bits in every_allocation(inventory)]
    fitting = [bits for bits, cost in costs if all(cost[n] <= v for n, v in budget.costs.items())]
    built_in = replace(budget, costs={}) if len(budget.limits) > len(budget.costs) else None
    fitting = [bits for bits in fitting if built_in is None or meets(measure_cost(inventory, bits), built_in)]
    if not fitting:
        for search in (lambda: check_budget(inventory, budget), lambda: allocate(table, budget)):
            with pytest.raises(InfeasibleBudgetError):
                search()
        return
    assert check_budget(inventory, budget) == budget
    best = min(score_of(table, bits) for bits in fitting)
    proposals = propose(table, budget, second={})
    assert proposals[0].score == pytest.approx(best, rel=1e-9, abs=1e-12)
    for found in proposals:
        assert found.bits in fitting
        assert found.score == score_of(table, found.bits)
        assert found.cost == measure_cost(inventory, found.bits, budget.costs)
        assert found.ties == inventory.ties
    uniform = find_uniform(inventory, budget)[1]
    assert uniform is None or uniform in fitting


def test_scores_are_summed() -> None:
    """Alone, conv takes the bits that fc gives up; tied, both have the mean."""
    assert allocate(SMALL, 3).bits == {"conv": 6, "fc": 2, "relu": 8, "input": 8}
    found = allocate(TIED, 3)
    assert found.bits == {"conv": 3, "fc": 3, "relu": 8, "input": 8}
    assert found.score == pytest.approx(8 / 64 + 2 / 64 + 0.25)
    assert list(found.scores) == ["conv", "fc", "relu"]


def test_a_pin_of_one_site_pins_all() -> None:
    assert allocate(TIED, 8, pin={"fc": 2}).bits == {"conv": 2, "fc": 2, "relu": 8, "input": 8}
    assert pin_sites(TIED.inventory, {"conv": 5})["fc"].bits == (5,)
    with pytest.raises(OptionError, match=r"'conv': 2, 'fc': 3.* gives tied sites different bits; pin one"):
        allocate(TIED, 8, pin={"conv": 2, "fc": 3})
    assert set(find_uniforms(TIED, pin={"fc": 2})) == set()
    assert all(found.bits["conv"] == 2 for found in trace_curve(TIED, budgets=4, pin={"fc": 2}).allocations)


def test_every_point_of_the_curve_has_one_bit_width() -> None:
    found = trace_curve(TIED, budgets=20).allocations
    assert all(allocation.bits["conv"] == allocation.bits["fc"] for allocation in found)
    assert len({allocation.bits["conv"] for allocation in found}) > 3


def test_rows_have_the_sites_of_a_tie_as_one() -> None:
    sites = (weight("q", 10, (2, 4)), weight("k", 3, (2, 4)), activation("x", 5, (4, 8)))
    operations = (Operation("q", 100, "q", "x"), Operation("k", 20, "k", "x"), Operation("both", 7, "q", "k"))
    inventory = Inventory(sites, operations, 0, ties=(("q", "k"),))
    choices = {"q": (2, 4), "x": (4, 8)}
    size = build_cost_row(inventory, "size_bytes", 100, choices)
    assert size.linear == {("q", 2): (3 + 4) + (1 + 4), ("q", 4): (5 + 4) + (2 + 4)}
    bitops = build_cost_row(inventory, "bitops", 10**6, choices)
    assert bitops.pairs == {("q", "x"): 120}
    assert bitops.linear == {("q", 2): 7 * 4, ("q", 4): 7 * 16}


def test_tables_and_allocations_keep_them(tmp_path) -> None:
    TIED.save(tmp_path / "scores.json")
    assert SensitivityTable.load(tmp_path / "scores.json") == TIED
    found = allocate(TIED, 3)
    save_allocation(found, tmp_path / "allocation.json")
    assert load_allocation(tmp_path / "allocation.json") == found
    assert "tied to one bit-width: conv, fc" in str(found)
    assert "tied to one bit-width: conv, fc" in summarize_allocation(found, TIED.inventory)
    assert "tied" not in str(allocate(SMALL, 3))


@pytest.mark.parametrize(
    ("ties", "message"),
    [
        ((("conv",),), "the tie of 'conv' with .* is not one of several weights"),
        (((),), "the tie of no site"),
        ((("conv", "fcc"),), "unknown weight in ties 'fcc'.*'fc'"),
        ((("conv", "relu"),), "unknown weight in ties 'relu'"),
        ((("conv", "fc"), ("fc", "conv")), "each in one tie"),
    ],
    ids=["one", "none", "name", "activation", "twice"],
)
def test_ties_are_checked(ties: tuple[tuple[str, ...], ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        replace(SMALL.inventory, ties=ties)


def test_tied_sites_have_equal_candidates() -> None:
    with pytest.raises(OptionError, match=r"'a' with \(2, 4\), 'b' with \(2, 8\) is not one"):
        Inventory((weight("a", 1, (2, 4)), weight("b", 1, (2, 8))), (), 0, ties=(("a", "b"),))


def test_a_table_of_an_earlier_version_has_none(tmp_path) -> None:
    table = make_table((weight("w", 4, (4,)),), {})
    (tmp_path / "scores.json").write_text(table.to_json().replace(',\n  "ties": []', ""))
    assert "ties" not in (tmp_path / "scores.json").read_text()
    assert SensitivityTable.load(tmp_path / "scores.json") == table

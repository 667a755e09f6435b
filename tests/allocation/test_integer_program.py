"""HiGHS, where the bound leaves too much to be listed."""

import random
import subprocess
import sys

import pulp
import pytest
from random_tables import random_table
from tables import SMALL, resnet50_sized_table

from infoq_fx.allocation import integer_program
from infoq_fx.allocation.cost import measure_cost
from infoq_fx.allocation.solver import allocate
from infoq_fx.errors import InfoqError
from infoq_fx.types import Budget

pytestmark = pytest.mark.usefixtures("free_unpacking")  # their networks are tiny


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

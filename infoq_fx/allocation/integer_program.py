"""The integer program over 0-1 choices, for CBC; the only PuLP import."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import pulp

from infoq_fx.allocation.cost import CostRow, broken_limits, build_cost_row, measure_cost
from infoq_fx.allocation.lagrangian_bound import CandidateScores
from infoq_fx.errors import InfoqError
from infoq_fx.types import Budget, Inventory

__all__ = ["build_rows", "solve_with_cbc"]

_LOGGER = logging.getLogger(__name__)

# CBC takes a row as met when it is broken by about 1e-7 of its coefficients, and can then lose the optimum.
# So rows get more slack than that, and what fits the slack alone is cut off by exact costs. Another slack
# helps where something lies just at the edge of the first.
_SLACKS = (3e-7, 1e-6, 3e-6, 1e-5)
_ROW_SCALE = 1e5
# No gap and no minimum improvement. Preprocessing costs a third more time than it saves on these programs.
_CBC_OPTIONS = ("ratio 0", "allow 0", "increment 1e-9", "preprocess off")


def solve_with_cbc(inventory: Inventory, budget: Budget, scores: CandidateScores) -> dict[str, int] | None:
    """One candidate a site, least total score, every limit met; None: no such allocation was found.

    Args:
        inventory: what the prepared model holds.
        budget: the limits.
        scores: of every candidate, by site and bits.

    Raises:
        InfoqError: the solver did not run, or did not finish.
    """
    for slack in _SLACKS:
        problem, x, grows = _build_program(inventory, budget, scores, slack)
        while (status := _run_cbc(problem)) == pulp.LpSolutionOptimal:
            bits = {n: max(by, key=lambda b: x[n, b].value() if (n, b) in x else 1.0) for n, by in scores.items()}
            if not broken_limits(measure_cost(inventory, bits, budget.container, budget.costs), budget):
                return bits
            # Within the slack but over the budget: some site has to have fewer bits than here, or at least others.
            others = [(v, 1) for (name, b), v in x.items() if (b < bits[name] if grows else b != bits[name])]
            problem += pulp.LpAffineExpression(others) >= 1
        if status != pulp.LpSolutionInfeasible and status != pulp.LpSolutionNoSolutionFound:
            raise InfoqError(
                f"CBC found no proven optimum ({pulp.LpSolution[status]}) for {budget}; try a budget near it"
            )
        _LOGGER.debug("CBC finds nothing within the budget, perhaps by rounding: solving again with another slack")
    return None


def build_rows(inventory: Inventory, budget: Budget, scores: CandidateScores) -> list[CostRow]:
    """The limits of the budget over the sites that have a choice among the candidates."""
    choices = {name: tuple(by_bits) for name, by_bits in scores.items()}
    return [build_cost_row(inventory, name, limit, choices, budget.container) for name, limit in budget.limits.items()]


def _build_program(
    inventory: Inventory, budget: Budget, scores: CandidateScores, slack: float
) -> tuple[Any, dict[tuple[str, int], Any], bool]:
    """The 0-1 program, its x[site, bits] for the sites that have a choice, and whether all costs grow with the bits."""
    choices = {name: tuple(by_bits) for name, by_bits in scores.items()}
    rows = build_rows(inventory, budget, scores)
    free = {name: by_bits for name, by_bits in scores.items() if len(by_bits) > 1}
    problem = pulp.LpProblem("allocation", pulp.LpMinimize)
    x = {
        (name, b): _add_variable(problem, f"x_{index}_{b}", "Binary")
        for index, (name, by_bits) in enumerate(free.items())
        for b in by_bits
    }
    problem += pulp.LpAffineExpression([(v, scores[name][b]) for (name, b), v in x.items()])
    for name, by_bits in free.items():
        problem += pulp.LpAffineExpression([(x[name, b], 1) for b in by_bits]) == 1
    z = _add_products(problem, {pair for row in rows for pair in (*row.pairs, *row.products)}, choices, x)
    for row in rows:
        _add_row(problem, row, slack, x, z)
    return problem, x, all(row.grows_with_bits for row in rows)


def _add_variable(problem: Any, name: str, category: str) -> Any:
    if hasattr(problem, "add_variable"):  # PuLP 3.3 warns of the constructor, earlier ones have nothing else
        return problem.add_variable(name, lowBound=0, cat=category)
    return pulp.LpVariable(name, lowBound=0, cat=category)


def _add_products(
    problem: Any,
    pairs: Iterable[tuple[str, str]],
    choices: Mapping[str, tuple[int, ...]],
    x: Mapping[tuple[str, int], Any],
) -> dict[tuple[str, str], dict[tuple[int, int], Any]]:
    """Continuous z[left bits, right bits] whose rows and columns sum to x: the hull of the products."""
    products = {}
    for index, (left, right) in enumerate(sorted(pairs)):
        z = {
            (i, j): _add_variable(problem, f"z_{index}_{i}_{j}", "Continuous")
            for i in choices[left]
            for j in choices[right]
        }
        for i in choices[left]:
            problem += pulp.LpAffineExpression([(z[i, j], 1) for j in choices[right]] + [(x[left, i], -1)]) == 0
        for j in choices[right]:
            problem += pulp.LpAffineExpression([(z[i, j], 1) for i in choices[left]] + [(x[right, j], -1)]) == 0
        products[left, right] = z
    return products


def _add_row(
    problem: Any,
    row: CostRow,
    slack: float,
    x: Mapping[tuple[str, int], Any],
    z: Mapping[tuple[str, str], Mapping[tuple[int, int], Any]],
) -> None:
    """The limit on what is spent above the least of every site and pair, in the largest common unit."""
    terms: list[tuple[Any, int, Any]] = [(x[item], cost, item[0]) for item, cost in row.linear.items()]
    terms += [(v, macs * i * j, pair) for pair, macs in row.pairs.items() for (i, j), v in z[pair].items()]
    terms += [(z[pair][bits], cost, pair) for pair, held in row.products.items() for bits, cost in held.items()]
    least: dict[Any, int] = {}
    for _, cost, group in terms:
        least[group] = min(cost, least.get(group, cost))
    above = [(v, cost - least[group]) for v, cost, group in terms]
    unit = math.gcd(*(cost for _, cost in above)) or 1
    limit = (row.limit - sum(least.values())) // unit
    scale = min(1.0, _ROW_SCALE / max(limit, 1))
    kept = [(v, cost // unit * scale) for v, cost in above if cost // unit <= limit]
    if kept:
        problem += pulp.LpAffineExpression(kept) <= max(limit + 0.5, limit * (1 + slack)) * scale
    for v, cost in above:
        if cost // unit > limit:
            problem += pulp.LpAffineExpression([(v, 1)]) == 0


def _run_cbc(problem: Any) -> int:
    with tempfile.TemporaryDirectory(prefix="infoq_fx_") as folder:
        solver = pulp.COIN_CMD(path=pulp.PULP_CBC_CMD.pulp_cbc_path, msg=False, options=list(_CBC_OPTIONS))
        solver.tmpDir = folder  # whatever happens, nothing is left behind
        try:
            problem.solve(solver)
        except pulp.PulpSolverError as error:
            raise InfoqError(
                f"the CBC solver that PuLP {pulp.__version__} carries did not run: {error}; "
                "install PuLP again, or another release of it"
            ) from error
    return int(problem.sol_status)

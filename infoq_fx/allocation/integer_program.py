"""Solves the integer program of 0-1 choices by HiGHS, through PuLP; the only module that imports PuLP."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pulp

from infoq_fx.allocation.cost import CostRow, broken_limits, build_cost_row, measure_cost
from infoq_fx.allocation.lagrangian_bound import CandidateScores
from infoq_fx.errors import InfoqError
from infoq_fx.table import PairScores
from infoq_fx.types import Budget, Inventory

__all__ = ["build_rows", "solve_with_highs"]

# A row is scaled to this limit, so that the solver's absolute tolerance is 1e-14 of it. Rows have slightly more slack
# than rounding needs; an allocation that fits only by the slack is found by its exact cost and cut off.
_ROW_SCALE = 1e5
_SLACK = 1e-9
_TOLERANCE = 1e-9
# No gap, and always the same one of several equal optima. HiGHS rejects a number of threads if the process has already
# run it.
_HIGHS_OPTIONS: dict[str, Any] = {
    "gapRel": 0.0,
    "gapAbs": 0.0,
    "parallel": "off",
    "random_seed": 0,
    "primal_feasibility_tolerance": _TOLERANCE,
    "dual_feasibility_tolerance": _TOLERANCE,
    "mip_feasibility_tolerance": _TOLERANCE,
}


def solve_with_highs(
    inventory: Inventory, budget: Budget, scores: CandidateScores, pairs: PairScores | None = None
) -> dict[str, int] | None:
    """Find one candidate per site with the least total score within every limit; None if no allocation meets them.

    Args:
        inventory: of the prepared model.
        budget: the limits.
        scores: of every candidate, by site and bits; of a tie only its first site.
        pairs: scores of two sites' candidates that are added; missing ones are 0.

    Raises:
        InfoqError: the solver did not run, or did not finish.
    """
    problem, x, grows = _build_program(inventory, budget, scores, pairs or {})
    while (status := _run_highs(problem)) == pulp.LpSolutionOptimal:
        bits = {n: max(by, key=lambda b: x[n, b].value() if (n, b) in x else 1.0) for n, by in scores.items()}
        if not broken_limits(measure_cost(inventory, inventory.spread(bits), budget.costs), budget):
            return bits
        # Within the slack but over the budget: at least one site needs fewer bits, or just other bits, than here.
        others = [(v, 1) for (name, b), v in x.items() if (b < bits[name] if grows else b != bits[name])]
        problem += pulp.LpAffineExpression(others) >= 1
    if status != pulp.LpSolutionInfeasible:
        raise InfoqError(
            f"HiGHS found no proven optimum ({pulp.LpSolution[status]}) for {budget}; try a slightly different budget"
        )
    return None


def build_rows(inventory: Inventory, budget: Budget, scores: CandidateScores) -> list[CostRow]:
    """Return a row of costs for every limit of the budget, over the sites with more than one candidate."""
    choices = {name: tuple(by_bits) for name, by_bits in scores.items()}
    return [build_cost_row(inventory, name, limit, choices) for name, limit in budget.limits.items()]


def _build_program(
    inventory: Inventory, budget: Budget, scores: CandidateScores, pairs: PairScores
) -> tuple[Any, dict[tuple[str, int], Any], bool]:
    """The 0-1 program, its x[site, bits] for sites with several candidates, and whether all costs grow with bits."""
    choices = {name: tuple(by_bits) for name, by_bits in scores.items()}
    rows = build_rows(inventory, budget, scores)
    free = {name: by_bits for name, by_bits in scores.items() if len(by_bits) > 1}
    problem = pulp.LpProblem("allocation", pulp.LpMinimize)
    x = {
        (name, b): _add_variable(problem, f"x_{index}_{b}", "Binary")
        for index, (name, by_bits) in enumerate(free.items())
        for b in by_bits
    }
    for name, by_bits in free.items():
        problem += pulp.LpAffineExpression([(x[name, b], 1) for b in by_bits]) == 1
    counted = {pair for row in rows for pair in (*row.pairs, *row.products)}
    z = _add_products(problem, counted | {pair for pair in pairs if set(pair) <= free.keys()}, choices, x)
    problem += pulp.LpAffineExpression(
        [(v, scores[name][b]) for (name, b), v in x.items()] + _objective_of_pairs(pairs, choices, x, z)
    )
    for row in rows:
        _add_row(problem, row, x, z)
    return problem, x, all(row.grows_with_bits for row in rows)


def _objective_of_pairs(
    pairs: PairScores,
    choices: Mapping[str, tuple[int, ...]],
    x: Mapping[tuple[str, int], Any],
    z: Mapping[tuple[str, str], Mapping[tuple[int, int], Any]],
) -> list[tuple[Any, float]]:
    """The terms of pairs; one with a fixed site is a score of the other, and one of two fixed sites is constant."""
    terms: list[tuple[Any, float]] = []
    for pair, by_bits in pairs.items():
        for (i, j), value in by_bits.items():
            if i not in choices.get(pair[0], ()) or j not in choices.get(pair[1], ()):
                continue
            if pair in z:
                terms.append((z[pair][i, j], value))
            else:
                terms += [(x[item], value) for item in ((pair[0], i), (pair[1], j)) if item in x]
    return terms


def _add_variable(problem: Any, name: str, category: str) -> Any:
    if hasattr(problem, "add_variable"):  # PuLP 3.3 deprecates the constructor; earlier releases have nothing else
        return problem.add_variable(name, lowBound=0, cat=category)
    return pulp.LpVariable(name, lowBound=0, cat=category)


def _add_products(
    problem: Any,
    pairs: Iterable[tuple[str, str]],
    choices: Mapping[str, tuple[int, ...]],
    x: Mapping[tuple[str, int], Any],
) -> dict[tuple[str, str], dict[tuple[int, int], Any]]:
    """Add continuous z[left bits, right bits] whose rows and columns sum to x: the convex hull of the products."""
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
    x: Mapping[tuple[str, int], Any],
    z: Mapping[tuple[str, str], Mapping[tuple[int, int], Any]],
) -> None:
    """Add a limit on the cost above the least of every site and pair, in the largest common unit."""
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
        problem += pulp.LpAffineExpression(kept) <= max(limit + 0.5, limit * (1 + _SLACK)) * scale
    for v, cost in above:
        if cost // unit > limit:
            problem += pulp.LpAffineExpression([(v, 1)]) == 0


def _run_highs(problem: Any) -> int:
    # HiGHS 1.15 calls some feasible programs infeasible in presolve: only a search without it is believed.
    for options in (_HIGHS_OPTIONS, {**_HIGHS_OPTIONS, "presolve": "off"}):
        try:
            problem.solve(pulp.HiGHS(msg=False, **options))
        except pulp.PulpSolverError as error:
            raise InfoqError(f"HiGHS did not run: {error}; install the package 'highspy' again") from error
        if problem.sol_status != pulp.LpSolutionInfeasible:
            break
    return int(problem.sol_status)

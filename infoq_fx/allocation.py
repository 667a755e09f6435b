"""A bit-width for every site: the integer program of Eq. 5 over a sensitivity table, solved exactly."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

import pulp

from infoq_fx.cost import CostRow, broken_limits, build_cost_row, measure_cost
from infoq_fx.errors import InfeasibleBudgetError, InfoqError, OptionError, unknown_name_error
from infoq_fx.relaxation import Candidates, search_core
from infoq_fx.spec import Allocation, Budget, Cost, Inventory, QuantSite, Score, check_bits
from infoq_fx.table import SensitivityTable

__all__ = ["allocate", "check_budget", "find_uniform", "propose"]

_POWERS = (1.0, 0.75, 0.5, 0.25)
_LOGGER = logging.getLogger(__name__)

# The objective is the excess of a score over its site's best, scaled so that the best known allocation has
# this much: CBC's absolute tolerances (1e-7) are then 1e-12 of it. _RESCALE is the improvement from which on
# the scale no longer suits.
_OBJECTIVE_SCALE = 1e5
_RESCALE = 1e-3
# CBC takes a row as met when it is broken by about 1e-7 of its coefficients, and can then lose the optimum.
# So rows get more slack than that, and what fits the slack alone is cut off by exact costs. Another slack
# helps where something lies just at the edge of the first.
_SLACKS = (3e-7, 1e-6, 3e-6, 1e-5)
_ROW_SCALE = 1e5
# No gap and no minimum improvement. Preprocessing costs a third more time than it saves on these programs.
_CBC_OPTIONS = ("ratio 0", "allow 0", "increment 1e-9", "preprocess off")

_Candidates = dict[str, dict[int, float]]
_Bits = dict[str, int]


def allocate(
    table: SensitivityTable,
    budget: float | Budget,
    *,
    alpha: float = 1.0,
    pin: Mapping[str, int] | None = None,
) -> Allocation:
    """The allocation of least total score among all that meet every limit of the budget.

    Of two bit-widths of a site with equal scores only the smaller, cheaper one is considered. The same
    arguments give the same result.

    Args:
        table: scores of every site with more than one candidate.
        budget: the limits; a number is the mean weight bit-width.
        alpha: weight of the activations' scores against those of the weights.
        pin: bit-widths fixed beforehand, one of the site's candidates by site name.

    Returns:
        Bits of every site, the score with its standard error (the sites' errors taken as independent), the
        cost, and the largest uniform weight bit-width within the same budget, scored by the same table. With
        it, searched activations have their largest candidate or, where that does not fit, the weights' bits.

    Raises:
        OptionError: an argument cannot be used, or a candidate has no score.
        InfeasibleBudgetError: a limit is out of reach; the message says what is reachable.
        InfoqError: the solver did not run, or did not finish.

    Reference:
        InfoQ, Eq. 5.
    """
    return next(_propose(table, budget, alpha, pin or {}, (1.0,)))


def propose(
    table: SensitivityTable,
    budget: float | Budget,
    *,
    alpha: float = 1.0,
    pin: Mapping[str, int] | None = None,
    second: Mapping[str, Mapping[int, float]] | None = None,
) -> list[Allocation]:
    """A few different allocations within the budget, of which the best can be found by running them.

    Scores of single sites add up as long as the damage is small. Where it is not, the largest of them say too much:
    they level off, and the sum with them. So there is :func:`allocate`'s own, then those of least total of the scores'
    powers 0.75, 0.5 and 0.25, that of ``second``, other scores of all searched sites, where they are given, and last
    the uniform allocation of the largest bit-width that fits.

    Other arguments and errors are those of :func:`allocate`. All are described by the table's own scores.
    """
    found: list[Allocation] = []
    for allocation in _propose(table, budget, alpha, pin or {}, _POWERS, second):
        if all(allocation.bits != other.bits for other in found):
            found.append(allocation)
    return found


def check_budget(inventory: Inventory, budget: float | Budget) -> Budget:
    """The budget as a :class:`Budget`, known to be within reach of the sites' candidate bit-widths.

    Args:
        inventory: what the prepared model holds.
        budget: the limits; a number is the mean weight bit-width.

    Raises:
        OptionError: not a budget.
        InfeasibleBudgetError: some limit is broken even with every site at its fewest bits.
    """
    limits = _read_budget(budget)
    # Every cost grows with every bit-width: this one allocation reaches the extreme of all limits at once.
    cost = measure_cost(inventory, {site.name: site.bits[0] for site in inventory.sites})
    if broken := broken_limits(cost, limits):
        raise InfeasibleBudgetError("; ".join(_describe_reach(inventory, limits, cost, name) for name in broken))
    return limits


def _propose(
    table: SensitivityTable,
    budget: float | Budget,
    alpha: float,
    pin: Mapping[str, int],
    powers: Iterable[float],
    second: Mapping[str, Mapping[int, float]] | None = None,
) -> Iterator[Allocation]:
    _check_alpha(alpha)
    inventory = _pin_sites(table.inventory, pin)
    limits = check_budget(inventory, budget)
    candidates = {site.name: _read_scores(table, site, float(alpha)) for site in inventory.sites}
    uniform_bits, uniform = find_uniform(inventory, limits)
    smallest = {site.name: site.bits[0] for site in inventory.sites}
    known = [smallest] if uniform is None else [smallest, uniform]
    of_uniform = None if uniform is None else _total_score(candidates, uniform)

    def describe(bits: _Bits) -> Allocation:
        return _describe(table, inventory, limits, candidates, bits, float(alpha), (uniform_bits, of_uniform))

    for power in powers:
        # Scores below 0 are a user's own criterion's; their order is kept.
        raised = {n: {b: math.copysign(abs(v) ** power, v) for b, v in d.items()} for n, d in candidates.items()}
        yield describe(_minimize_score(inventory, limits, raised if power != 1 else candidates, known))
    if second is not None:
        others = {s.name: {b: second.get(s.name, {}).get(b, 0.0) for b in s.bits} for s in inventory.sites}
        yield describe(_minimize_score(inventory, limits, others, known))
    if uniform is not None:
        yield describe(uniform)


def _describe(
    table: SensitivityTable,
    inventory: Inventory,
    limits: Budget,
    candidates: _Candidates,
    bits: _Bits,
    alpha: float,
    uniform: tuple[int | None, float | None],
) -> Allocation:
    chosen = {name: table.scores[name][b] for name, b in bits.items() if b in table.scores.get(name, {})}
    weights = {site.name: 1.0 if site.kind == "weight" else alpha for site in inventory.sites}
    return Allocation(
        bits=bits,
        criterion=table.criterion,
        budget=limits,
        score=_total_score(candidates, bits),
        standard_error=math.hypot(*(weights[name] * score.standard_error for name, score in chosen.items())),
        cost=measure_cost(inventory, bits),
        uniform_bits=uniform[0],
        uniform_score=uniform[1],
        scores=chosen,
    )


def _check_alpha(alpha: Any) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not 0 <= float(alpha) < math.inf:
        raise OptionError(f"alpha={alpha!r} must be a finite number, 0 or more; give 1.0 to weigh both kinds alike")


def _read_budget(budget: Any) -> Budget:
    if isinstance(budget, Budget):
        return budget
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise OptionError(
            f"budget={budget!r} is neither a number nor a Budget; give mean weight bits, such as 3.0, or a Budget"
        )
    return Budget(weight_bits=float(budget))


def _pin_sites(inventory: Inventory, pin: Mapping[str, int]) -> Inventory:
    """The inventory with the pinned sites' candidates narrowed to one."""
    names = [site.name for site in inventory.sites]
    fixed = {}
    for name, bits in pin.items():
        if name not in names:
            raise unknown_name_error("site in pin", name, names)
        (fixed[name],) = check_bits(bits, f"pin[{name!r}]")
        if bits not in inventory[name].bits:
            raise OptionError(
                f"pin[{name!r}]={bits} is not among the site's candidates; take one of {inventory[name].bits}"
            )
    sites = tuple(replace(site, bits=(fixed[site.name],)) if site.name in fixed else site for site in inventory.sites)
    return replace(inventory, sites=sites)


def _read_scores(table: SensitivityTable, site: QuantSite, alpha: float) -> dict[int, float]:
    """Weighted scores of a site's candidates; a site with one candidate need not be scored."""
    scores: Mapping[int, Score] = table.scores.get(site.name, {})
    if not scores and len(site.bits) == 1:
        return {site.bits[0]: 0.0}
    for bits in site.bits:
        if bits not in scores:
            known = ", ".join(map(str, sorted(scores))) or "none"
            raise OptionError(
                f"the table has no score for {site.name!r} at {bits} bits, only at {known}; score it, or pin the site"
            )
    weight = 1.0 if site.kind == "weight" else alpha
    return {bits: weight * scores[bits].value for bits in site.bits}


def _total_score(candidates: Candidates, bits: Mapping[str, int]) -> float:
    return math.fsum(candidates[name][b] for name, b in bits.items())


def _describe_reach(inventory: Inventory, budget: Budget, cost: Cost, name: str) -> str:
    kinds = {"bitops": ("weight", "activation"), "activation_bytes": ("activation",)}.get(name, ("weight",))
    fewest = {site.bits[0] for site in inventory.sites if site.kind in kinds and site.is_searched}
    how = f"all layers at {fewest.pop()} bits" if len(fewest) == 1 else "every layer at its fewest bits"
    side = "above the largest" if name == "compression" else "below the smallest"
    asked, reachable = budget.limits[name], getattr(cost, name)
    remedy = (
        "lower it to that, or allow fewer bits" if name == "compression" else "raise it to that, or allow fewer bits"
    )
    return f"budget {name}={_exact_text(asked)} is {side} reachable {_exact_text(reachable)} ({how}); {remedy}"


def _exact_text(value: float) -> str:
    """A number that reads back exactly: the reachable value copied into a budget has to work."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def find_uniform(inventory: Inventory, budget: Budget) -> tuple[int | None, _Bits | None]:
    """The largest bit-width that all searched weights can have within the budget, and the bits it means.

    Searched activations have their largest candidate or, where that does not fit, the weights' bits.
    """
    free = [site for site in inventory.sites if len(site.bits) > 1]
    candidates = [set(site.bits) for site in free if site.kind == "weight"]
    common = set.intersection(*candidates) if candidates else set()
    largest = {site.name: site.bits[-1] for site in inventory.sites}
    for bits in sorted(common, reverse=True):
        wide = {**largest, **{site.name: bits for site in free if site.kind == "weight"}}
        choices = [wide]
        if all(bits in site.bits for site in free):
            choices.append({**largest, **{site.name: bits for site in free}})
        for choice in choices:
            if not broken_limits(measure_cost(inventory, choice), budget):
                return bits, choice
    return None, None


def _minimize_score(inventory: Inventory, budget: Budget, candidates: _Candidates, known: Iterable[_Bits]) -> _Bits:
    """The best allocation within the budget; the ``known`` ones, which fit, bound what is worth searching."""
    efficient = {name: _drop_dominated(scores) for name, scores in candidates.items()}
    floor = {name: min(scores.values()) for name, scores in efficient.items()}
    excess = {name: {b: s - floor[name] for b, s in scores.items()} for name, scores in efficient.items()}
    unlimited = {name: max(scores) for name, scores in efficient.items()}
    if not broken_limits(measure_cost(inventory, unlimited), budget):
        return unlimited
    lowered = [{name: max(c for c in efficient[name] if c <= b) for name, b in bits.items()} for bits in known]
    best = min(lowered, key=lambda bits: _total_score(excess, bits))
    while True:
        span = _total_score(excess, best)
        # A candidate whose own excess is above the span cannot be part of anything better.
        scaled = {
            name: {b: e / span * _OBJECTIVE_SCALE for b, e in scores.items() if e <= span}
            for name, scores in excess.items()
        }
        found = _solve(inventory, budget, scaled, best)
        if _total_score(excess, found) < span:
            best = found
        if _total_score(excess, best) > _RESCALE * span:
            return best
        _LOGGER.debug("scores span many orders of magnitude: solving again around the best found")


def _drop_dominated(scores: Mapping[int, float]) -> dict[int, float]:
    """Only the candidates that score below every smaller one: all costs grow with the bits."""
    efficient: dict[int, float] = {}
    for bits in sorted(scores):
        if not efficient or scores[bits] < min(efficient.values()):
            efficient[bits] = scores[bits]
    return efficient


def _solve(inventory: Inventory, budget: Budget, scores: _Candidates, known: _Bits) -> _Bits:
    """One candidate a site, least total score, every limit met; the ``known`` one meets them."""
    bits, rest = search_core(_build_rows(inventory, budget, scores), scores, _total_score(scores, known))
    best = {**known, **bits}
    if rest is None or all(len(by_bits) == 1 for by_bits in rest.values()):
        return best
    _LOGGER.debug("too many allocations near the bound to list them: CBC searches the rest")
    found = _solve_with_cbc(inventory, budget, rest)
    return min(best, found, key=lambda bits: _total_score(scores, bits))


def _solve_with_cbc(inventory: Inventory, budget: Budget, scores: Candidates) -> _Bits:
    """One candidate a site, least total score, every limit met; some allocation is known to fit."""
    for slack in _SLACKS:
        problem, x = _build_program(inventory, budget, scores, slack)
        while (status := _run_cbc(problem)) == pulp.LpSolutionOptimal:
            bits = {n: max(by, key=lambda b: x[n, b].value() if (n, b) in x else 1.0) for n, by in scores.items()}
            if not broken_limits(measure_cost(inventory, bits), budget):
                return bits
            # Within the slack but over the budget: some site has to have fewer bits than here.
            lower = [(v, 1) for (name, b), v in x.items() if b < bits[name]]
            problem += pulp.LpAffineExpression(lower) >= 1
        if status != pulp.LpSolutionInfeasible and status != pulp.LpSolutionNoSolutionFound:
            break
        _LOGGER.debug("CBC lost the known allocation to rounding: solving again with another slack")
    raise InfoqError(f"CBC found no proven optimum ({pulp.LpSolution[status]}) for {budget}; try a budget near it")


def _build_program(
    inventory: Inventory, budget: Budget, scores: Candidates, slack: float
) -> tuple[Any, dict[tuple[str, int], Any]]:
    """The 0-1 program and its x[site, bits] for the sites that have a choice."""
    choices = {name: tuple(by_bits) for name, by_bits in scores.items()}
    rows = _build_rows(inventory, budget, scores)
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
    z = _add_products(problem, {pair for row in rows for pair in row.pairs}, choices, x)
    for row in rows:
        _add_row(problem, row, slack, x, z)
    return problem, x


def _build_rows(inventory: Inventory, budget: Budget, scores: Candidates) -> list[CostRow]:
    choices = {name: tuple(by_bits) for name, by_bits in scores.items()}
    return [build_cost_row(inventory, name, limit, choices) for name, limit in budget.limits.items()]


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

"""A bit-width for every site: the integer program of Eq. 5 over a sensitivity table, solved exactly."""

from __future__ import annotations

import logging
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from numbers import Real
from typing import Any

import pulp

from infoq_fx.cost import activation_bytes, measure_cost, operation_bitops, weight_bytes
from infoq_fx.errors import InfeasibleBudgetError, InfoqError, OptionError, unknown_name_error
from infoq_fx.spec import FLOAT_BITS, Allocation, Budget, Cost, Inventory, QuantSite, Score, check_bits
from infoq_fx.table import SensitivityTable

__all__ = ["allocate", "check_budget", "summarize"]

_LOGGER = logging.getLogger(__name__)

# Scores above the best possible total, rescaled so that the best known allocation has this much. CBC's absolute
# tolerances (1e-7) are then 1e-12 of it; _RESCALE is the improvement from which on that is no longer enough.
_OBJECTIVE_SCALE = 1e5
_RESCALE = 1e-3
# Right-hand sides at most this large: half a unit of a cost stays above CBC's tolerance up to 1e12 units.
_ROW_SCALE = 1e5
# No gap and no minimum improvement; gomory and flow cover cuts cost more than they save on these programs.
_CBC_OPTIONS = ("ratio 0", "allow 0", "increment 1e-9", "preprocess off")

_SITE_COSTS: Mapping[str, tuple[str, Callable[[QuantSite, int], int]]] = {
    "weight_bits": ("weight", lambda site, bits: site.numel * bits),
    "compression": ("weight", lambda site, bits: site.numel * bits),
    "size_bytes": ("weight", weight_bytes),
    "activation_bytes": ("activation", activation_bytes),
}

_Candidates = dict[str, dict[int, float]]
_Bits = dict[str, int]


@dataclass(frozen=True)
class _Row:
    """One limit in exact integers: ``sum(linear) + sum(macs * left bits * right bits of pairs) <= limit``."""

    limit: int
    linear: Mapping[tuple[str, int], int]
    pairs: Mapping[tuple[str, str], int]


def allocate(
    table: SensitivityTable,
    budget: float | Budget,
    *,
    alpha: float = 1.0,
    pin: Mapping[str, int] | None = None,
) -> Allocation:
    """The allocation of least total score among all that meet every limit of the budget.

    Between two bit-widths of one site with equal scores the smaller one is taken, as is one that scores better
    than a larger one. The result is the same for every run.

    Args:
        table: scores of every site with more than one candidate.
        budget: the limits; a number is the mean weight bit-width.
        alpha: weight of the activations' scores against those of the weights.
        pin: bit-widths fixed beforehand, one of the site's candidates by site name.

    Returns:
        Bits of every site, the score with its standard error (candidates' errors taken as independent), the cost,
        and the largest uniform weight bit-width within the same budget, scored by the same table. There, searched
        activations have their largest candidate or, where that does not fit, the bit-width of the weights.

    Raises:
        OptionError: an argument cannot be used, or a candidate has no score.
        InfeasibleBudgetError: a limit is out of reach; the message says what is reachable.
        InfoqError: the solver did not run, or did not finish.

    Reference:
        InfoQ, Eq. 5.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not 0 <= alpha < math.inf:
        raise OptionError(f"alpha={alpha!r} must be a finite number, 0 or more; 1.0 weighs both kinds alike")
    inventory = _pin_sites(table.inventory, pin or {})
    limits = check_budget(inventory, budget)
    candidates = {site.name: _read_scores(table, site, float(alpha)) for site in inventory.sites}

    uniform_bits, uniform = _find_uniform(inventory, limits)
    smallest = {site.name: site.bits[0] for site in inventory.sites}
    known = [smallest] if uniform is None else [smallest, uniform]
    bits = _minimize_score(inventory, limits, candidates, known)
    chosen = {name: table.scores[name][b] for name, b in bits.items() if b in table.scores.get(name, {})}
    weights = {site.name: 1.0 if site.kind == "weight" else float(alpha) for site in inventory.sites}
    return Allocation(
        bits=bits,
        criterion=table.criterion,
        budget=limits,
        score=_total_score(candidates, bits),
        standard_error=math.hypot(*(weights[name] * score.standard_error for name, score in chosen.items())),
        cost=measure_cost(inventory, bits),
        uniform_bits=uniform_bits,
        uniform_score=None if uniform is None else _total_score(candidates, uniform),
        scores=chosen,
    )


def check_budget(inventory: Inventory, budget: float | Budget) -> Budget:
    """The budget as a :class:`Budget`, known to be within reach of the sites' candidate bit-widths.

    Args:
        inventory: what the prepared model holds.
        budget: the limits; a number is the mean weight bit-width.

    Raises:
        OptionError: not a budget.
        InfeasibleBudgetError: some limit is broken even with every site at its fewest bits.
    """
    if isinstance(budget, Real) and not isinstance(budget, bool):
        budget = Budget(weight_bits=float(budget))
    if not isinstance(budget, Budget):
        raise OptionError(
            f"budget={budget!r} is neither a number (the mean weight bit-width, 3.0) nor Budget(size_bytes=...)"
        )
    # Every cost grows with every bit-width: this one allocation reaches the extreme of all limits at once.
    cost = measure_cost(inventory, {site.name: site.bits[0] for site in inventory.sites})
    if broken := _broken_limits(cost, budget):
        raise InfeasibleBudgetError(
            "; ".join(_describe_reach(inventory, budget, cost, name) for name in broken)
        )
    return budget


def summarize(allocation: Allocation, inventory: Inventory) -> str:
    """A text table of the allocation: its sites, its cost, and how the uniform bit-width compares.

    Args:
        allocation: bits for every site of the inventory.
        inventory: what the prepared model holds.

    Returns:
        One line a weight site and one a searched activation site, then two of totals.
    """
    rows = [("layer", "kind", "elements", "bits", "score")]
    for site in inventory.sites:
        if site.kind == "weight" or (site.is_searched and len(site.bits) > 1):
            score = allocation.scores.get(site.name)
            text = "-" if score is None else f"{score.value:.3g}"
            rows.append((site.name, site.kind, f"{site.numel:,}", str(allocation.bits[site.name]), text))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        f"{name:<{widths[0]}}  {kind:<{widths[1]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[2:], strict=True))
        for name, kind, *cells in rows
    ]
    cost = allocation.cost or measure_cost(inventory, allocation.bits)
    lines.append(
        f"{cost.weight_bits:.3g} bits a weight ({cost.compression:.2f}x smaller than float32), {cost.size_bytes:,} bytes, "
        f"{cost.bitops / 1e9:.4g} G BitOps, {cost.activation_bytes:,} bytes of activations"
    )
    if allocation.score is not None:
        spread = f" ± {allocation.standard_error:.2g}" if allocation.standard_error else ""
        lines.append(f"score {allocation.score:.4g}{spread}; {_describe_uniform(allocation)}")
    return "\n".join(lines)


def _describe_uniform(allocation: Allocation) -> str:
    if allocation.uniform_bits is None or allocation.uniform_score is None:
        return "no uniform bit-width fits the budget"
    return (
        f"uniform {allocation.uniform_bits} bits, the largest that fit, score {allocation.uniform_score:.4g}"
    )


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
                f"pin[{name!r}]={bits} is not among the site's candidates {inventory[name].bits}"
            )
    sites = tuple(
        replace(site, bits=(fixed[site.name],)) if site.name in fixed else site for site in inventory.sites
    )
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
                f"the table has no score for {site.name!r} at {bits} bits; scored there: {known}"
            )
    weight = 1.0 if site.kind == "weight" else alpha
    return {bits: weight * scores[bits].value for bits in site.bits}


def _total_score(candidates: _Candidates, bits: Mapping[str, int]) -> float:
    return math.fsum(candidates[name][b] for name, b in bits.items())


def _broken_limits(cost: Cost, budget: Budget) -> list[str]:
    # The costs are correctly rounded, and so is a limit that the user wrote down: 3.3 is met by 33 bits in 10.
    return [
        name
        for name, limit in budget.limits.items()
        if (getattr(cost, name) < limit if name == "compression" else getattr(cost, name) > limit)
    ]


def _describe_reach(inventory: Inventory, budget: Budget, cost: Cost, name: str) -> str:
    kinds = {"bitops": ("weight", "activation"), "activation_bytes": ("activation",)}.get(name, ("weight",))
    fewest = {site.bits[0] for site in inventory.sites if site.kind in kinds and site.is_searched}
    how = f"all layers at {fewest.pop()} bits" if len(fewest) == 1 else "every layer at its fewest bits"
    side = "above the largest" if name == "compression" else "below the smallest"
    asked, reachable = budget.limits[name], getattr(cost, name)
    return f"budget {name}={_exact_text(asked)} is {side} reachable {_exact_text(reachable)} ({how})"


def _exact_text(value: float) -> str:
    """A number that reads back exactly: whoever copies the reachable value into a budget must have it work."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def _find_uniform(inventory: Inventory, budget: Budget) -> tuple[int | None, _Bits | None]:
    """The largest bit-width that all searched weights can have within the budget, and the bits it means."""
    free = [site for site in inventory.sites if len(site.bits) > 1]
    common = set.intersection(*(set(site.bits) for site in free if site.kind == "weight") or [set()])
    largest = {site.name: site.bits[-1] for site in inventory.sites}
    for bits in sorted(common, reverse=True):
        wide = {**largest, **{site.name: bits for site in free if site.kind == "weight"}}
        choices = [wide]
        if all(bits in site.bits for site in free):
            choices.append({**largest, **{site.name: bits for site in free}})
        for choice in choices:
            if not _broken_limits(measure_cost(inventory, choice), budget):
                return bits, choice
    return None, None


def _minimize_score(
    inventory: Inventory, budget: Budget, candidates: _Candidates, known: Iterable[_Bits]
) -> _Bits:
    """The best allocation within the budget; the ``known`` ones, which fit, bound what is worth searching."""
    efficient = {name: _drop_dominated(scores) for name, scores in candidates.items()}
    floor = {name: min(scores.values()) for name, scores in efficient.items()}
    excess = {name: {b: s - floor[name] for b, s in scores.items()} for name, scores in efficient.items()}
    unlimited = {name: max(scores) for name, scores in efficient.items()}
    if not _broken_limits(measure_cost(inventory, unlimited), budget):
        return unlimited
    lowered = [
        {name: max(c for c in efficient[name] if c <= b) for name, b in bits.items()} for bits in known
    ]
    best = min(lowered, key=lambda bits: _total_score(excess, bits))
    while True:
        span = _total_score(excess, best)
        # A candidate whose own excess is above the span cannot be part of anything better.
        scaled = {
            name: {b: e / span * _OBJECTIVE_SCALE for b, e in scores.items() if e <= span}
            for name, scores in excess.items()
        }
        found = _solve(inventory, budget, scaled)
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


def _solve(inventory: Inventory, budget: Budget, scores: _Candidates) -> _Bits:
    """The 0-1 program: one candidate a site, least total score, every limit met."""
    choices = {name: tuple(by_bits) for name, by_bits in scores.items()}
    rows = [_build_row(inventory, name, limit, choices) for name, limit in budget.limits.items()]
    free = {name: by_bits for name, by_bits in scores.items() if len(by_bits) > 1}
    problem = pulp.LpProblem("allocation", pulp.LpMinimize)
    x = {
        (name, b): _add_variable(problem, f"x_{index}_{b}", "Binary")
        for index, (name, by_bits) in enumerate(free.items())
        for b in by_bits
    }
    problem += pulp.LpAffineExpression(
        [(x[name, b], s) for name, by_bits in free.items() for b, s in by_bits.items()]
    )
    for name, by_bits in free.items():
        problem += pulp.LpAffineExpression([(x[name, b], 1) for b in by_bits]) == 1
    z = _add_products(problem, {pair for row in rows for pair in row.pairs}, choices, x)
    for row in rows:
        _add_row(problem, row, x, z)
    while True:
        _run_cbc(problem)
        bits = {
            name: max(by_bits, key=lambda b: x[name, b].value() if len(by_bits) > 1 else 1.0)
            for name, by_bits in scores.items()
        }
        if not _broken_limits(measure_cost(inventory, bits), budget):
            return bits
        # Broken by less than CBC's tolerance: some site has to have fewer bits than here.
        problem += (
            pulp.LpAffineExpression(
                [(x[n, b], 1) for n, by_bits in free.items() for b in by_bits if b < bits[n]]
            )
            >= 1
        )


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
    """Continuous z[left bits, right bits] whose rows and columns sum to x: the convex hull of the products."""
    products = {}
    for index, (left, right) in enumerate(sorted(pairs)):
        z = {
            (i, j): _add_variable(problem, f"z_{index}_{i}_{j}", "Continuous")
            for i in choices[left]
            for j in choices[right]
        }
        for i in choices[left]:
            problem += (
                pulp.LpAffineExpression([(z[i, j], 1) for j in choices[right]] + [(x[left, i], -1)]) == 0
            )
        for j in choices[right]:
            problem += (
                pulp.LpAffineExpression([(z[i, j], 1) for i in choices[left]] + [(x[right, j], -1)]) == 0
            )
        products[left, right] = z
    return products


def _add_row(
    problem: Any,
    row: _Row,
    x: Mapping[tuple[str, int], Any],
    z: Mapping[tuple[str, str], Mapping[tuple[int, int], Any]],
) -> None:
    terms = [(x[item], cost) for item, cost in row.linear.items()]
    terms += [(v, macs * i * j) for pair, macs in row.pairs.items() for (i, j), v in z[pair].items()]
    unit = math.gcd(*(cost for _, cost in terms)) or 1
    limit = row.limit // unit
    scale = min(1.0, _ROW_SCALE / max(limit, 1))
    # Costs are whole units: half a unit more on the right keeps rounding errors on the safe side of both.
    problem += (
        pulp.LpAffineExpression([(v, cost // unit * scale) for v, cost in terms]) <= (limit + 0.5) * scale
    )


def _run_cbc(problem: Any) -> None:
    with tempfile.TemporaryDirectory(prefix="infoq_fx_") as folder:
        solver = pulp.COIN_CMD(path=pulp.PULP_CBC_CMD.pulp_cbc_path, msg=False, options=list(_CBC_OPTIONS))
        solver.tmpDir = folder  # whatever happens, nothing is left behind
        try:
            problem.solve(solver)
        except pulp.PulpSolverError as error:
            raise InfoqError(
                f"the CBC solver that PuLP {pulp.__version__} carries did not run: {error}"
            ) from error
    if problem.sol_status != pulp.LpSolutionOptimal:
        raise InfoqError(
            f"CBC found no proven optimum: status {pulp.LpStatus[problem.status]!r}, "
            f"solution {pulp.LpSolution[problem.sol_status]!r}; another budget or alpha may work"
        )


def _build_row(inventory: Inventory, name: str, limit: float, choices: Mapping[str, tuple[int, ...]]) -> _Row:
    """A limit over the sites with several choices; what the others cost is taken off the limit."""
    costs: defaultdict[tuple[str | None, int], int] = defaultdict(int)
    pairs: defaultdict[tuple[str, str], int] = defaultdict(int)
    if name == "bitops":
        _count_bitops(inventory, choices, costs, pairs)
    else:
        kind, measure = _SITE_COSTS[name]
        for site in inventory.sites:
            if site.kind == kind and site.is_searched >= (kind == "activation"):
                costs.update({(site.name, b): measure(site, b) for b in choices[site.name]})
    linear: dict[tuple[str, int], int] = {}
    remaining = _integer_limit(inventory, name, limit)
    for (site_name, b), cost in costs.items():
        if site_name is None or len(choices[site_name]) == 1:
            remaining -= cost
        else:
            linear[site_name, b] = cost
    return _Row(remaining, linear, pairs)


def _count_bitops(
    inventory: Inventory,
    choices: Mapping[str, tuple[int, ...]],
    costs: dict[tuple[str | None, int], int],
    pairs: dict[tuple[str, str], int],
) -> None:
    for operation in inventory.operations:
        left, right = operation.left, operation.right
        lefts = (FLOAT_BITS,) if left is None else choices[left]
        rights = (FLOAT_BITS,) if right is None else choices[right]
        if left is not None and left == right:
            for b in lefts:
                costs[left, b] += operation_bitops(operation, b, b)
        elif left is not None and right is not None and len(lefts) > 1 and len(rights) > 1:
            pairs[min(left, right), max(left, right)] += operation.macs
        elif len(rights) == 1:
            for b in lefts:
                costs[left, b] += operation_bitops(operation, b, rights[0])
        else:
            for b in rights:
                costs[right, b] += operation_bitops(operation, lefts[0], b)


def _integer_limit(inventory: Inventory, name: str, limit: float) -> int:
    """The largest whole total that meets a limit, in the units of the row: bits, bytes or BitOps."""
    numel = sum(site.numel for site in inventory.sites if site.kind == "weight")
    ignored_bits = FLOAT_BITS * inventory.ignored_weights
    float_bits = FLOAT_BITS * numel + ignored_bits
    if name == "weight_bits":
        return _largest(math.floor(numel * Fraction(limit)), lambda total: total / numel <= limit)
    if name == "compression":
        return (
            _largest(math.floor(float_bits / Fraction(limit)), lambda total: float_bits / total >= limit)
            - ignored_bits
        )
    return math.floor(limit) - (inventory.float_bytes if name == "size_bytes" else 0)


def _largest(start: int, fits: Callable[[int], bool]) -> int:
    while not fits(start):
        start -= 1
    while fits(start + 1):
        start += 1
    return start

"""An independent formulation of Eq. 5 for HiGHS; and budgets on a table of ResNet-50's size."""

import math
from collections.abc import Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from infoq_fx.allocation.cost import measure_cost
from infoq_fx.table import SensitivityTable
from infoq_fx.types import Budget, Cost


def score_of(table: SensitivityTable, bits: Mapping[str, int], alpha: float = 1.0) -> float:
    alphas = {site.name: alpha if site.kind == "activation" else 1.0 for site in table.inventory.sites}
    return math.fsum(alphas[n] * table.scores[n][b].value for n, b in bits.items() if n in table.scores)


def meets(cost: Cost, budget: Budget) -> bool:
    upper = {name: limit for name, limit in budget.limits.items() if name != "compression"}
    return cost.compression >= (budget.compression or 0) and all(getattr(cost, n) <= v for n, v in upper.items())


def solve_with_highs(table: SensitivityTable, limits: Mapping[str, float]) -> float:
    """Eq. 5 with fixed activations by HiGHS: size_bytes and bitops, formulated independently."""
    inventory = table.inventory
    macs = {operation.right: operation.macs for operation in inventory.operations}
    columns = [(i, s, b) for i, s in enumerate(inventory.sites) if s.kind == "weight" for b in s.bits]
    size = [math.ceil(s.numel * b / 8) + 4 * s.shape[0] for _, s, b in columns]
    bitops = [macs[s.name] * b * 8 for _, s, b in columns]
    one_each = np.array([[float(i == j) for i, *_ in columns] for j in sorted({i for i, *_ in columns})])
    rows = np.array([size, bitops], dtype=float)
    upper = np.array([limits["size_bytes"] - inventory.float_bytes, limits["bitops"]])
    result = milp(
        c=[table.scores[s.name][b].value for _, s, b in columns],
        integrality=np.ones(len(columns)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(rows / upper[:, None], -np.inf, 1)],
        options={"mip_rel_gap": 0.0},
    )
    assert result.success
    return float(result.fun)


def size_and_bitops_budgets(table: SensitivityTable, sizes: int = 10, speeds: int = 5) -> list[Budget]:
    """A grid from tight to loose: mean weight bits of 2.2 to 6.5, BitOps of 2.4 to 6.5 bits squared."""
    weights = [site for site in table.inventory.sites if site.kind == "weight"]
    numel, channels = sum(site.numel for site in weights), sum(site.shape[0] for site in weights)
    macs = sum(operation.macs for operation in table.inventory.operations)
    return [
        Budget(
            size_bytes=math.floor(float(mean) * numel / 8) + 4 * channels + table.inventory.float_bytes,
            bitops=math.floor(macs * float(bits) ** 2),
        )
        for mean in np.linspace(2.2, 6.5, sizes)
        for bits in np.linspace(2.4, 6.5, speeds)
    ]


def solve_pairs_with_highs(table: SensitivityTable, budget: Budget) -> float:
    """Eq. 5 with searched activations by HiGHS, a variable for every pair of bit-widths of an operation."""
    inventory, limits = table.inventory, budget.limits
    columns = [("site", s.name, b) for s in inventory.sites for b in s.bits]
    columns += [
        (o.name, i, j) for o in inventory.operations for i in inventory[o.left].bits for j in inventory[o.right].bits
    ]
    at = {column: k for k, column in enumerate(columns)}
    size = {
        at["site", s.name, b]: math.ceil(s.numel * b / 8) + 4 * s.shape[0]
        for s in inventory.sites
        if s.kind == "weight"
        for b in s.bits
    }
    macs = {o.name: o.macs for o in inventory.operations}
    bitops = {k: macs[name] * i * j for (name, i, j), k in at.items() if name != "site"}
    rows: list[tuple[dict[int, float], float, float]] = []
    for costs, limit in ((size, limits["size_bytes"] - inventory.float_bytes), (bitops, limits["bitops"])):
        rows.append(({k: cost / limit for k, cost in costs.items()}, -np.inf, 1.0))
    rows += [({at["site", s.name, b]: 1.0 for b in s.bits}, 1.0, 1.0) for s in inventory.sites]
    for o in inventory.operations:
        lefts, rights = inventory[o.left].bits, inventory[o.right].bits
        rows += [({at["site", o.left, i]: -1.0} | {at[o.name, i, j]: 1.0 for j in rights}, 0, 0) for i in lefts]
        rows += [({at["site", o.right, j]: -1.0} | {at[o.name, i, j]: 1.0 for i in lefts}, 0, 0) for j in rights]
    entries = [(r, k, value) for r, (row, _, _) in enumerate(rows) for k, value in row.items()]
    index, column, value = zip(*entries, strict=True)
    matrix = csr_array((value, (index, column)), shape=(len(rows), len(columns)))
    result = milp(
        c=[table.scores[s][b].value if kind == "site" else 0.0 for kind, s, b in columns],
        integrality=[float(kind == "site") for kind, _, _ in columns],
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, [low for _, low, _ in rows], [high for _, _, high in rows]),
        options={"mip_rel_gap": 0.0},
    )
    assert result.success
    chosen = {s: b for (kind, s, b), on in zip(columns, result.x, strict=True) if kind == "site" and on > 0.5}
    assert meets(measure_cost(inventory, chosen), budget)
    return score_of(table, chosen)

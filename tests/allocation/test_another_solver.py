"""Tables of ResNet-50's size, against another solver."""

import time

import numpy as np
import pytest
from other_solver import meets, size_and_bitops_budgets, solve_pairs_with_highs, solve_with_highs
from tables import resnet50_sized_table

from infoq_fx.allocation.cost import measure_cost
from infoq_fx.allocation.solver import allocate
from infoq_fx.types import Budget

pytestmark = pytest.mark.usefixtures("free_unpacking")  # their networks are tiny


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


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "speeds"), [(4, 3), pytest.param(10, 5, marks=pytest.mark.slow)])
def test_more_of_either_limit_is_never_worse(sizes: int, speeds: int) -> None:
    table = resnet50_sized_table(1)
    scores = [allocate(table, budget).score for budget in size_and_bitops_budgets(table, sizes, speeds)]
    grid = np.array(scores, dtype=float).reshape(sizes, speeds)
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

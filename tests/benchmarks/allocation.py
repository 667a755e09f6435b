"""Time allocations on a table of ResNet-50's size with weights and activations searched, and check the optima.

    python tests/benchmarks/allocation.py [--seed 1] [--verify N]

54 weights and 50 activations with 7 bit-widths each; 50 budgets limit size_bytes and bitops at the same time, from
tight to loose. Times are CPU seconds, child processes included. ``--verify N`` solves N of the budgets
again (50: all of them) with scipy's HiGHS, on an independent formulation of the program.
"""

import argparse
import random
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from other_solver import size_and_bitops_budgets, solve_pairs_with_highs
from tables import resnet50_sized_table

from infoq_fx.allocation.cost import broken_limits, measure_cost
from infoq_fx.allocation.solver import allocate


def cpu_seconds():
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def timed(function, *arguments):
    started = cpu_seconds()
    result = function(*arguments)
    return result, cpu_seconds() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of the table's scores")
    parser.add_argument("--verify", type=int, default=0, metavar="N", help="budgets to solve with milp as well")
    options = parser.parse_args()

    table = resnet50_sized_table(options.seed)
    budgets = size_and_bitops_budgets(table)
    found, seconds = zip(*(timed(allocate, table, budget) for budget in budgets), strict=True)
    slowest = max(range(len(budgets)), key=lambda i: seconds[i])
    feasible = sum(
        not broken_limits(measure_cost(table.inventory, allocation.bits), budget)
        for allocation, budget in zip(found, budgets, strict=True)
    )
    print(f"{len(budgets)} budgets, {feasible} met: {sum(seconds):.2f} s of CPU")
    print(f"slowest: {seconds[slowest]:.2f} s for {budgets[slowest]}")

    checked = sorted(random.Random(0).sample(range(len(budgets)), min(options.verify, len(budgets))))
    total = equal = 0
    for i in checked:
        expected, spent = timed(solve_pairs_with_highs, table, budgets[i])
        total += spent
        equal += abs(found[i].score - expected) <= 1e-9 * expected
        print(f"milp: {expected:.12g} in {spent:.1f} s, here {found[i].score:.12g} in {seconds[i]:.2f} s", flush=True)
    if checked:
        print(f"equal to milp (1e-9): {equal} of {len(checked)}; milp took {total:.1f} s of CPU")


if __name__ == "__main__":
    main()

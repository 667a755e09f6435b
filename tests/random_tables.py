"""Random tables, and all of their allocations."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

from tables import activation, make_table, weight

from infoq_fx.allocation.cost import measure_cost
from infoq_fx.table import SensitivityTable
from infoq_fx.types import Budget, Inventory, Operation, Score


def random_table(rng: random.Random, *, weights: int, activations: int, sign: bool = False) -> SensitivityTable:
    """All that an inventory may hold: shared sites, float operands, attention, fixed and unsearched sites."""
    triples = [(2, 4, 8), (2, 3, 4), (4, 6, 8), (3, 8), (5,)]
    sites = [
        *(
            weight(f"w{i}", rng.choice([1, 7, 64, 1000, 4096]), rng.choice([*triples, (4, 8, 16)]))
            for i in range(weights)
        ),
        *(activation(f"a{i}", rng.choice([3, 50, 999]), rng.choice(triples)) for i in range(activations)),
        replace(activation("residual", 100, (8,)), is_searched=False),
    ]
    names: list[str | None] = [*(site.name for site in sites), None]
    operations = tuple(
        Operation(f"op{i}", rng.randrange(1, 10**6), rng.choice(names), rng.choice(names)) for i in range(6)
    )
    scores = {s.name: {b: rng.random() * 4.0**-b - sign * 0.01 for b in s.bits} for s in sites if len(s.bits) > 1}
    return make_table(tuple(sites), scores, operations, float_bytes=rng.randrange(50), ignored_weights=rng.randrange(9))


def every_allocation(inventory: Inventory) -> Iterator[dict[str, int]]:
    names = [site.name for site in inventory.sites]
    for bits in itertools.product(*(site.bits for site in inventory.sites)):
        found = dict(zip(names, bits, strict=True))
        if all(len({found[name] for name in tie}) == 1 for tie in inventory.ties):
            yield found


def tie_weights(rng: random.Random, table: SensitivityTable) -> SensitivityTable:
    """The table with one to three of its weights tied to another one, with the candidates and scores that it needs."""
    inventory = table.inventory
    weights = [site for site in inventory.sites if site.kind == "weight"]
    rng.shuffle(weights)
    cut = rng.randrange(2, len(weights) + 1)
    groups = [weights[:cut], weights[cut:]] if len(weights) - cut > 1 else [weights[:cut]]
    bits = {site.name: group[0].bits for group in groups for site in group}
    sites = tuple(replace(site, bits=bits.get(site.name, site.bits)) for site in inventory.sites)
    ties = tuple(tuple(site.name for site in group) for group in groups)
    scores = {name: {b: Score(rng.random() * 4.0**-b) for b in found} for name, found in bits.items() if len(found) > 1}
    kept = {name: by_bits for name, by_bits in table.scores.items() if name not in bits}
    return replace(table, inventory=replace(inventory, sites=sites, ties=ties), scores={**kept, **scores})


def random_budget(rng: random.Random, inventory: Inventory, names: tuple[str, ...]) -> Budget:
    """Limits between the extremes; half of them exactly at the cost of some allocation."""
    low, high = (measure_cost(inventory, {s.name: s.bits[i] for s in inventory.sites}) for i in (0, -1))
    middle = measure_cost(inventory, {s.name: rng.choice(s.bits) for s in inventory.sites})
    share = rng.random()
    limits = {}
    for name in names:
        between = (1 - share) * getattr(low, name) + share * getattr(high, name)
        limits[name] = max(rng.choice([between, getattr(middle, name)]), 1e-3)
    return Budget(**limits)

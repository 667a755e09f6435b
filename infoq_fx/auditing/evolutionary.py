"""An evolutionary search over bit-widths, as a reference for audits."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from infoq_fx.allocation.cost import broken_limits, measure_cost
from infoq_fx.allocation.solver import allocate
from infoq_fx.core.data import CalibrationData
from infoq_fx.core.option_checks import check_count
from infoq_fx.core.threads import one_torch_thread
from infoq_fx.errors import OptionError
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.recovery.candidates import Candidates
from infoq_fx.runtime.forward import RunOptions, choose_batch_size
from infoq_fx.scoring.refinement import LossRuns
from infoq_fx.table import SensitivityTable
from infoq_fx.types import MAX_BITS, Budget, Inventory, Score

__all__ = ["EvolutionarySearch"]

_Genes = dict[str, int]


@dataclass(frozen=True)
class EvolutionarySearch:
    """Crossover and mutation of the allocations that lose the least, each measured on calibration samples.

    A generation is bred from the ``parents`` best allocations so far: one half takes each site's bits from one of two
    of them, the other half changes each site of one of them with the probability ``mutation``. The first generation is
    random. An allocation over the budget loses bits at random sites until it fits; what the budget has left is then
    spent at random sites. The loss is that of :func:`infoq_fx.refine`, on the same samples. Float (16 bits) is not
    among the genes of sites that have other candidates.

    Cost: ``evaluations`` forward passes over at most 512 samples for each budget; no scores, no labels.

    Args:
        evaluations: number of different allocations that are measured.
        population: allocations in a generation.
        parents: the best allocations, of which the next generation is bred.
        mutation: probability that a site's bits change.
        seed: of all random choices.

    Reference:
        "Single Path One-Shot Neural Architecture Search with Uniform Sampling", arXiv 1904.00420, Section 3.4, which
        also searches bit-widths so; BP-NAS, arXiv 2007.10026, ends with such a search too.
    """

    evaluations: int = 300
    population: int = 24
    parents: int = 8
    mutation: float = 0.1
    seed: int = 0
    name: ClassVar[str] = "evolutionary"

    def __post_init__(self) -> None:
        for option in ("evaluations", "population", "parents"):
            check_count(option, getattr(self, option), 1)
        if not 0 <= self.mutation <= 1:
            raise OptionError(f"mutation={self.mutation!r}; give a probability, such as 0.1")

    def __call__(
        self, prepared: PreparedModel, data: CalibrationData, limits: Budget, candidates: Candidates | None
    ) -> dict[str, int]:
        """Return the bits of every site of the allocation that loses the least of all measured."""
        with one_torch_thread() as threads:
            run_options = RunOptions(threads=threads if prepared.device.type == "cpu" else 1)
            size = choose_batch_size(prepared)
            runs = LossRuns.begin(prepared, data, candidates, batch_size=size, run_options=run_options)
            runs = runs.rounded(prepared.inventory.sites)
            breeder = _Breeder(prepared.inventory, limits, random.Random(self.seed))
            known: dict[frozenset[tuple[str, int]], tuple[float, _Genes]] = {}
            generation, barren = [breeder.draw() for _ in range(self.population)], 0
            while len(known) < self.evaluations and barren < 3:
                before = len(known)
                for genes in generation:
                    key = frozenset(genes.items())
                    if key not in known and len(known) < self.evaluations:
                        known[key] = float(runs(prepared.inventory.spread(genes)).mean()), genes
                barren = barren + 1 if len(known) == before else 0
                best = [genes for _, genes in sorted(known.values(), key=lambda found: found[0])[: self.parents]]
                generation = [breeder.breed(best, i % 2 == 0, self.mutation) for i in range(self.population)]
        return prepared.inventory.spread(best[0])


class _Breeder:
    """Draws, crosses and mutates allocations within the limits; genes are the bits of the first site of every tie."""

    def __init__(self, inventory: Inventory, limits: Budget, generator: random.Random) -> None:
        self._inventory, self._limits, self._random = inventory, limits, generator
        self._choices = {
            site.name: tuple(b for b in site.bits if b <= MAX_BITS) or site.bits
            for site in inventory.sites
            if inventory.leaders[site.name] == site.name
        }
        self._free = [name for name, widths in self._choices.items() if len(widths) > 1]
        self._fallback = _any_allocation(inventory, limits, self._choices)

    def draw(self) -> _Genes:
        return self._fit({name: self._random.choice(widths) for name, widths in self._choices.items()})

    def breed(self, parents: list[_Genes], is_crossed: bool, mutation: float) -> _Genes:
        first, second = self._random.choice(parents), self._random.choice(parents)
        if is_crossed:
            return self._fit({name: (first, second)[self._random.randrange(2)][name] for name in first})
        changed = {
            name: self._random.choice(widths) if self._random.random() < mutation else first[name]
            for name, widths in self._choices.items()
        }
        return self._fit(changed)

    def _fit(self, genes: _Genes) -> _Genes:
        """Lower random sites until all limits hold, then raise random ones as far as they do."""
        genes = dict(genes)
        while not self._fits(genes):
            high = [name for name in self._free if genes[name] > self._choices[name][0]]
            if not high:
                return dict(self._fallback)
            name = self._random.choice(high)
            genes[name] = self._choices[name][self._choices[name].index(genes[name]) - 1]
        for name in self._random.sample(self._free, len(self._free)):
            for wider in self._choices[name][self._choices[name].index(genes[name]) + 1 :]:
                if not self._fits({**genes, name: wider}):
                    break
                genes[name] = wider
        return genes

    def _fits(self, genes: Mapping[str, int]) -> bool:
        cost = measure_cost(self._inventory, self._inventory.spread(genes), self._limits.costs)
        return not broken_limits(cost, self._limits)


def _any_allocation(inventory: Inventory, limits: Budget, names: Mapping[str, tuple[int, ...]]) -> _Genes:
    """An allocation within the limits, for costs that do not grow with the bits."""
    scores = {site.name: dict.fromkeys(site.bits, Score(0.0)) for site in inventory.sites}
    found = allocate(SensitivityTable(criterion="none", inventory=inventory, scores=scores), limits)
    return {name: found.bits[name] if found.bits[name] in names[name] else names[name][-1] for name in names}

"""The protocols of a sensitivity criterion, and the measure of criteria that have found everything in ``begin``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from infoq_fx.core.data import CalibrationData
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.runtime.forward import RunOptions
from infoq_fx.types import Measurement, Plain, QuantSite, Score

__all__ = ["Criterion", "Kind", "KnownValues", "Measure", "Observer", "Scores"]

Kind = Literal["weight", "activation"]
Scores = Mapping[str, Mapping[int, Score]]


@dataclass(frozen=True)
class Observer:
    """A tensor at which sliced mutual information (SMI) is measured.

    ``name`` is a module path (its output), a site (its tensor) or ``"output"`` (the first output of the model).
    ``measure`` is ``"input"`` for SMI(X_E; L) or ``"task"`` for SMI(L; Y).
    """

    name: str
    measure: Literal["input", "task"]


class Measure(Protocol):
    """Measures blocks of sites, in this or another process; it is picklable and holds what all blocks share."""

    @property
    def run_bytes(self) -> int:
        """Bytes that one (site, bit-width) takes until its block is done, without its quantized weight."""

    def __call__(
        self, prepared: PreparedModel, data: CalibrationData | None, sites: Sequence[QuantSite], run_options: RunOptions
    ) -> list[Measurement]:
        """Measure every candidate bit-width of every site; the result must not depend on blocks and run options."""


class Criterion(Protocol):
    """Scores how much quantizing one site to a bit-width harms the model, with all other sites at 8 bits.

    ``begin`` computes once what is common to all sites, and returns the object that measures them. ``score`` turns the
    measurements of all blocks into scores, smaller is better, and must be cheap. Neither may change the prepared model.

    Seven attributes are optional. ``samples`` is the largest number of samples that the criterion is given, evenly
    spread over the data; ``choose_samples(prepared, sites, samples)``, if there is such a method, returns it instead;
    ``samples`` is how many the data has.
    ``runs_weights`` is True if it runs the model with weights at candidate bit-widths, so that it
    can use weights as recovery would round them. ``choose_bits(site)`` returns the bit-widths of a site that are
    measured, all if there is no such method; ``score`` then gives the others a score too. ``scores_float`` is True if
    it can score the bit-width 16, a tensor that stays in float. ``runs_pairs`` is True if a measurement of one site
    also runs others below 8 bits. ``score_pairs(prepared, measurements)`` returns what pairs of sites lose beyond the
    sum of their scores, see :class:`infoq_fx.SensitivityTable`.
    """

    @property
    def name(self) -> str:
        """The criterion's name, which is saved with the table."""

    @property
    def needs_data(self) -> bool:
        """Whether ``begin`` needs calibration data."""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of sites that it scores; other sites are not searched."""

    def describe(self, prepared: PreparedModel, data: CalibrationData | None) -> Mapping[str, Plain]:
        """Return everything that determines the measurements besides model, data and site, as named values; cheap.

        Cached measurements are reused only under the same description. ``"measure"`` names what is measured: criteria
        that score the same measurements in different ways return the same description, and share them.
        ``"algorithm_version"`` is raised when the same data gives other measurements.
        """

    def begin(
        self, prepared: PreparedModel, data: CalibrationData | None, *, batch_size: int, run_options: RunOptions
    ) -> Measure:
        """Compute what all sites share, and return the object that measures them."""

    def score(self, prepared: PreparedModel, measurements: Sequence[Measurement]) -> Scores:
        """Return the score of every (site, bit-width) that was measured."""


@dataclass(frozen=True)
class KnownValues:
    """A measure that reads values which ``begin`` has found, by site and bit-width; sites without any are skipped."""

    values: Mapping[tuple[str, int], Mapping[str, float]]
    run_bytes: int = 0

    def __call__(
        self, prepared: PreparedModel, data: CalibrationData | None, sites: Sequence[QuantSite], run_options: RunOptions
    ) -> list[Measurement]:
        """Return the values of every (site, bit-width) that has some."""
        measured = []
        for site in sites:
            for bits in site.bits:
                if (site.name, bits) in self.values:
                    measured.append(Measurement(site.name, bits, self.values[site.name, bits]))
                    run_options.advance(1.0)
        return measured

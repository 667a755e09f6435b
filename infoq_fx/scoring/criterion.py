"""What a sensitivity criterion is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from infoq_fx.core.data import CalibrationData
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.runtime.forward import RunOptions
from infoq_fx.types import Measurement, Plain, QuantSite, Score

__all__ = ["Criterion", "Kind", "Measure", "Scores"]

Kind = Literal["weight", "activation"]
Scores = Mapping[str, Mapping[int, Score]]


class Measure(Protocol):
    """Measures blocks of sites, here or in another process: it can be pickled and holds all that blocks share."""

    @property
    def run_bytes(self) -> int:
        """Memory that one (site, bit-width) takes until its block is done, without its quantized weight."""

    def __call__(
        self, prepared: PreparedModel, data: CalibrationData | None, sites: Sequence[QuantSite], run_options: RunOptions
    ) -> list[Measurement]:
        """Measure every candidate bit-width of every site. The same numbers whatever the blocks and the run options."""


class Criterion(Protocol):
    """Scores how much harm one site does at one bit-width, all others at 8 bits.

    ``begin`` does what is common to all sites, once, and returns what measures them; ``score`` turns what all
    blocks measured into scores, smaller is better, and must be cheap. None may change the prepared model.

    A criterion may have an attribute ``samples``: the most samples that it is given, evenly spread over the data; and
    ``runs_weights``: True where it runs the model with weights at candidate bit-widths, so that it can be given those
    that recovery would leave.
    """

    @property
    def name(self) -> str:
        """The name that a table is saved under."""

    @property
    def needs_data(self) -> bool:
        """Whether ``begin`` must be given calibration data."""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of sites that it scores; others are not searched under it."""

    def describe(self, prepared: PreparedModel, data: CalibrationData | None) -> Mapping[str, Plain]:
        """All that decides the measurements beside model, data and site, plain values under plain names; cheap.

        Measurements are found again in a cache only under the same description. ``"measure"`` names what is measured:
        criteria that only read the same measurements differently give the same description, and share them.
        """

    def begin(
        self, prepared: PreparedModel, data: CalibrationData | None, *, batch_size: int, run_options: RunOptions
    ) -> Measure:
        """What all sites share, computed once."""

    def score(self, prepared: PreparedModel, measurements: Sequence[Measurement]) -> Scores:
        """Scores of every (site, bit-width) that was measured."""

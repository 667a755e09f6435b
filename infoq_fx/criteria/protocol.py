"""What a sensitivity criterion is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from infoq_fx.data import CalibrationData
from infoq_fx.prepared import PreparedModel
from infoq_fx.spec import Measurement, QuantSite, Score

__all__ = ["Criterion", "Scores"]

Scores = Mapping[str, Mapping[int, Score]]


class Criterion(Protocol):
    """Scores how much harm one site does at one bit-width, all others at 8 bits.

    ``measure`` does the costly work and may be called for any block of sites; ``score`` turns what all blocks
    measured into scores, smaller is better, and must be cheap. Neither may change the prepared model. The same
    arguments give the same numbers, whatever the blocks.
    """

    @property
    def name(self) -> str:
        """The name that a table is saved under."""

    @property
    def needs_data(self) -> bool:
        """Whether ``measure`` must be given calibration data."""

    def measure(
        self,
        prepared: PreparedModel,
        data: CalibrationData | None,
        sites: Sequence[QuantSite],
        *,
        batch_size: int,
        advance: Callable[[float], None],
    ) -> list[Measurement]:
        """Measure every candidate bit-width of every site.

        ``advance`` is told of progress in units of (site, bit-width), in as small shares as there are.
        """

    def score(self, prepared: PreparedModel, measurements: Sequence[Measurement]) -> Scores:
        """Scores of every (site, bit-width) that was measured."""

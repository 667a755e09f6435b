"""A criterion from a user-defined function."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from infoq_fx.core.data import CalibrationData
from infoq_fx.errors import OptionError
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.runtime.forward import RunOptions
from infoq_fx.scoring.criterion import Kind, Measure, Scores
from infoq_fx.types import Measurement, Plain, QuantSite, Score

__all__ = ["FunctionCriterion", "ScoreFunction"]

ScoreFunction = Callable[[PreparedModel, CalibrationData | None, QuantSite, int], float]
"""(prepared, data, site, bits) -> the sensitivity of that site at that bit-width; smaller is better, in any unit."""


@dataclass(frozen=True)
class FunctionCriterion:
    """Scores by a function of the prepared model, the data, a site and a bit-width.

    :func:`infoq_fx.runtime.forward.hold_outputs` gives the outputs with one site at other bits, and
    :func:`infoq_fx.graph.float_interpreter.read_weights` the sites' weights. The function is called once per (site,
    bit-width), 8 bits included, from one thread; for an ``executor`` it must be picklable.

    Cost: that of the function.

    Args:
        function: see :data:`ScoreFunction`.
        version: identifies everything that determines the function's values. Scores in a ``cache_dir`` are reused only
            under the same name and version; without a version they are reused only by this criterion object.
        needs_data: whether the function needs data.
        kinds: of the sites that it scores.
    """

    function: ScoreFunction
    version: str | None = None
    needs_data: bool = True
    kinds: tuple[Kind, ...] = ("weight", "activation")
    scores_float: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.version is None:
            object.__setattr__(self, "version", f"unnamed {secrets.token_hex(8)}")

    @property
    def name(self) -> str:
        """The name of the function."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def describe(self, prepared: PreparedModel, data: CalibrationData | None) -> Mapping[str, Plain]:
        """Return the function's name and version."""
        return {"measure": f"function {self.name}", "function version": self.version}

    def begin(
        self, prepared: PreparedModel, data: CalibrationData | None, *, batch_size: int, run_options: RunOptions
    ) -> Measure:
        """Return the measure; sites share no computation."""
        return FunctionMeasure(self.function, self.name)

    def score(self, prepared: PreparedModel, measurements: Sequence[Measurement]) -> Scores:
        """Return the function's values."""
        scores: dict[str, dict[int, Score]] = {}
        for found in measurements:
            scores.setdefault(found.site, {})[found.bits] = Score(found.values["value"])
        return scores


@dataclass(frozen=True)
class FunctionMeasure:
    """Calls the function for every (site, bit-width)."""

    function: ScoreFunction
    name: str
    run_bytes: int = 0

    def __call__(
        self, prepared: PreparedModel, data: CalibrationData | None, sites: Sequence[QuantSite], run_options: RunOptions
    ) -> list[Measurement]:
        """Call the function for every (site, bit-width).

        Raises:
            OptionError: it returned something other than a finite number.
        """
        measured = []
        for site in sites:
            for bits in site.bits:
                returned = self.function(prepared, data, site, bits)
                try:
                    value = float(returned)
                except (TypeError, ValueError):
                    value = math.nan
                if not math.isfinite(value):
                    raise OptionError(
                        f"criterion {self.name!r} returned {returned!r} for {site.name!r} at {bits} bits; "
                        "return a finite number"
                    )
                measured.append(Measurement(site.name, bits, {"value": value}))
                run_options.advance(1.0)
        return measured

"""The criterion of the InfoQ paper: the change of sliced mutual information at observers downstream of a site."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import fx

from infoq_fx.core.data import CalibrationData
from infoq_fx.errors import CalibrationDataError, OptionError, unknown_name_error
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.runtime.forward import RunOptions
from infoq_fx.runtime.run_plan import plan_perturbed_runs
from infoq_fx.scoring.criterion import Kind, Observer, Scores
from infoq_fx.scoring.information.encoders import Encoder, encode_inputs
from infoq_fx.scoring.information.measurement import InformationMeasure, Neighbours, measure_baseline
from infoq_fx.scoring.information.observers import choose_default_observers, find_observers
from infoq_fx.scoring.output_measure import ACCURACY_DROP
from infoq_fx.types import BASELINE_BITS, Measurement, Plain, Score

__all__ = ["CORRELATION_THRESHOLD", "InfoQPaper"]

CORRELATION_THRESHOLD = 0.70
_ALGORITHM_VERSION = 3  # raised when the same data gives other measurements
_SMALLEST_BASELINE_NATS = 1e-3


def _key(observer: Observer) -> str:
    return f"{observer.measure}:{observer.name}"


@dataclass(frozen=True, kw_only=True)
class InfoQPaper:
    """The paper's criterion: normalised change of sliced mutual information at downstream observers.

    ``S(i, b) = 1/b * (sum of |change of SMI| over downstream observers) / (sum of their baseline SMI)``, Eqs. 3 and 4:
    SMI(X_E; L_j) by KSG at input observers, SMI(L_j; Y) by Ross at task observers, over the same random unit
    projections for the baseline and every perturbed run. Feature maps are averaged over space (tokens over the
    sequence) before they are projected. The score has no unit (nats over nats, divided by bits).

    Cost: one partial forward pass per (site, bit-width); labels help but are not needed.

    Args:
        observers: None for the paper's heuristic (task information at the classifier's input and at the logits,
            input information at intermediate blocks); names or :class:`Observer` values (a bare name measures
            both); ``"auto"`` for the paper's correlation analysis: every named tensor is measured, and those whose
            change correlates with the accuracy drop at r > 0.70 are used.
        terms: ``"both"`` sums of Eq. 4, or only the one over ``"input"`` (O_XL) or over ``"task"`` observers (O_LY);
            ``"input"`` without given observers also measures the output, so that every site has an observer
            downstream.
        divide_by_bits: whether to apply the factor 1/b of Eq. 4.
        encoder: X -> X_E, see :func:`infoq_fx.scoring.information.encoders.encode_inputs`.
        slices: random projections per observed tensor; the standard error falls with the square root of it.
        neighbours: k of KSG; larger has less variance and more bias.
        class_neighbours: k of Ross.
        seed: of projections and of class groups.

    Reference:
        "InfoQ: Mixed-Precision Quantization via Global Information Flow", Eqs. 3 and 4, Algorithm 1.
    """

    observers: Sequence[Observer | str] | Literal["auto"] | None = None
    terms: Literal["both", "input", "task"] = "both"
    divide_by_bits: bool = True
    encoder: Encoder | str | None = None
    slices: int = 256
    neighbours: int = 5
    class_neighbours: int = 3
    seed: int = 0
    name: str = "infoq_paper"
    needs_data: bool = True
    kinds: tuple[Kind, ...] = ("weight", "activation")

    def __post_init__(self) -> None:
        if self.terms not in ("both", "input", "task"):
            raise unknown_name_error("terms", self.terms, ("both", "input", "task"))

    def describe(self, prepared: PreparedModel, data: CalibrationData | None) -> Mapping[str, Plain]:
        """Return the resolved observers, slices, neighbours, seed and encoder."""
        observers = "auto" if self.observers == "auto" else ", ".join(map(_key, self._resolve(prepared)))
        return {
            "measure": "information",
            "algorithm_version": _ALGORITHM_VERSION,
            "observers": observers,
            "encoder": None if data is None else _name_encoder(self.encoder, data),
            "slices": self.slices,
            "neighbours": self.neighbours,
            "class_neighbours": self.class_neighbours,
            "seed": self.seed,
        }

    def begin(
        self,
        prepared: PreparedModel,
        data: CalibrationData | None,
        *,
        batch_size: int,
        run_options: RunOptions,
        reads_output: bool = False,
    ) -> InformationMeasure:
        """Run the baseline, and compute its information, the classes and the projections of X_E once.

        With ``reads_output``, perturbed runs continue to the output even if no observer needs it.

        Raises:
            CalibrationDataError: there is no data, or too few samples for the estimators.
            OptionError: an observer is unknown, or a site has none downstream.
        """
        if data is None or data.samples <= self.neighbours + 1:
            found = "none" if data is None else f"{data.samples} samples"
            raise CalibrationDataError(
                f"criterion {self.name!r} needs more than {self.neighbours + 1} samples, found {found}; "
                "give more, or lower neighbours"
            )
        observers = self._resolve(prepared)
        if not reads_output:
            _check_downstream(prepared, set(observers.values()))
        return measure_baseline(
            prepared,
            data,
            observers,
            encode_inputs(data.inputs, self.encoder, batch_size=batch_size).numpy(),
            slices=self.slices,
            neighbours=Neighbours(self.neighbours, self.class_neighbours),
            seed=self.seed,
            batch_size=batch_size,
            reads_output=reads_output,
            run_options=run_options,
        )

    def score(self, prepared: PreparedModel, measurements: Sequence[Measurement]) -> Scores:
        """Return Eq. 4 over the observers; with ``"auto"`` they are chosen here from the same measurements."""
        chosen = {_key(observer) for observer in self._resolve(prepared)}
        if self.observers == "auto":
            chosen = self._select(prepared, measurements)
        scores: dict[str, dict[int, Score]] = {}
        for found in measurements:
            keys = [key for key in chosen if f"{key}:change" in found.values]
            if not keys:
                raise OptionError(f"site {found.site!r} has no observer downstream; add 'output' to observers")
            total = sum(found.values[f"{key}:baseline"] for key in sorted(keys))
            scale = max(total, _SMALLEST_BASELINE_NATS) * (found.bits if self.divide_by_bits else 1)
            change = sum(found.values[f"{key}:change"] for key in sorted(keys))
            error = math.sqrt(sum(found.values[f"{key}:standard_error"] ** 2 for key in sorted(keys)))
            scores.setdefault(found.site, {})[found.bits] = Score(change / scale, error / scale)
        return scores

    def correlations(self, measurements: Sequence[Measurement]) -> dict[str, float]:
        """Return Pearson's r between the change of SMI and the accuracy drop by ``"measure:observer"`` (paper, Fig. 1).

        It is over all (site, bit-width) below 8 bits upstream of the observer. Observers with fewer than three of
        these, or without variation, are left out. Empty if no run reached the output of the model.
        """
        below = [m for m in measurements if m.bits < BASELINE_BITS and ACCURACY_DROP in m.values]
        suffix = ":change"
        keys = sorted({k.removesuffix(suffix) for m in below for k in m.values if k.endswith(suffix)})
        found = {}
        for key in keys:
            pairs = [(m.values[key + suffix], m.values[ACCURACY_DROP]) for m in below if key + suffix in m.values]
            changes, drops = np.array(pairs).T
            if len(pairs) > 2 and np.std(changes) > 0 and np.std(drops) > 0:
                found[key] = float(np.corrcoef(changes, drops)[0, 1])
        return found

    def _resolve(self, prepared: PreparedModel) -> dict[Observer, fx.Node]:
        given = self.observers
        found = choose_default_observers(prepared) if given is None else find_observers(prepared, given)
        if self.terms == "input" and given is None:
            found |= find_observers(prepared, [Observer("output", "input")])
        return {observer: node for observer, node in found.items() if self.terms in ("both", observer.measure)}

    def _select(self, prepared: PreparedModel, measurements: Sequence[Measurement]) -> set[str]:
        correlations = self.correlations(measurements)
        chosen = {key for key, r in correlations.items() if r > CORRELATION_THRESHOLD}
        log = logging.getLogger(__name__)
        if any(not any(f"{key}:change" in m.values for key in chosen) for m in measurements):
            log.warning(
                "observers='auto': %d observers reach r > %.2f but not every site has one downstream; the default "
                "observers are added",
                len(chosen),
                CORRELATION_THRESHOLD,
            )
            measured_as = {node: observer.name for observer, node in self._resolve(prepared).items()}
            defaults = choose_default_observers(prepared)
            chosen |= {f"{o.measure}:{measured_as[node]}" for o, node in defaults.items()}
        log.info("observers='auto' chose %s", ", ".join(sorted(chosen)))
        return chosen


def _check_downstream(prepared: PreparedModel, observed: set[fx.Node]) -> None:
    searched = [site.name for site in prepared.inventory.sites if site.is_searched and len(site.bits) > 1]
    for site, plan in plan_perturbed_runs(prepared, searched, observed).items():
        if not plan.nodes:
            raise OptionError(f"site {site!r} has no observer downstream; add 'output' to observers")


def _name_encoder(encoder: Encoder | str | None, data: CalibrationData) -> str:
    """A name that identifies an encoder; for a callable, a hash of its output for a few samples."""
    if encoder is None or isinstance(encoder, str):
        return encoder or "principal components"
    first = {name: x[:4] for name, x in data.inputs.items()}
    return hashlib.sha256(encode_inputs(first, encoder, batch_size=4).numpy().tobytes()).hexdigest()[:16]

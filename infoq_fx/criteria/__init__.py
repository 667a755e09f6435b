"""Sensitivity criteria: one a file, one Protocol, one dict."""

from __future__ import annotations

from collections.abc import Callable

from infoq_fx.criteria.accuracy import Accuracy
from infoq_fx.criteria.alps import ALPS
from infoq_fx.criteria.eagl import EAGL
from infoq_fx.criteria.function import FunctionCriterion, ScoreFunction
from infoq_fx.criteria.hawq_v2 import HAWQv2
from infoq_fx.criteria.infoq import InfoQ
from infoq_fx.criteria.infoq_paper import InfoQPaper
from infoq_fx.criteria.limpq import LIMPQ
from infoq_fx.criteria.loss import Loss
from infoq_fx.criteria.mpqco import MPQCO
from infoq_fx.criteria.ompq import OMPQ
from infoq_fx.criteria.output_kl import OutputKL
from infoq_fx.criteria.output_sqnr import OutputSQNR
from infoq_fx.criteria.protocol import Criterion, Kind, Measure, Plain
from infoq_fx.criteria.weight_mse import WeightMSE
from infoq_fx.errors import OptionError, unknown_name_error
from infoq_fx.runs import Work

__all__ = [
    "ALPS",
    "CRITERIA",
    "EAGL",
    "LIMPQ",
    "MPQCO",
    "OMPQ",
    "Accuracy",
    "AnyCriterion",
    "Criterion",
    "FunctionCriterion",
    "HAWQv2",
    "InfoQ",
    "InfoQPaper",
    "Kind",
    "Loss",
    "Measure",
    "OutputKL",
    "OutputSQNR",
    "Plain",
    "ScoreFunction",
    "WeightMSE",
    "Work",
    "find_criterion",
]

AnyCriterion = Criterion | str | ScoreFunction

CRITERIA: dict[str, Callable[[], Criterion]] = {
    "infoq": InfoQ,
    "infoq_paper": InfoQPaper,
    "eagl": EAGL,
    "weight_mse": WeightMSE,
    "output_sqnr": OutputSQNR,
    "output_kl": OutputKL,
    "loss": Loss,
    "accuracy": Accuracy,
    "hawq_v2": HAWQv2,
    "mpqco": MPQCO,
    "ompq": OMPQ,
    "limpq": LIMPQ,
    "alps": ALPS,
}
"""The criteria by name, each with its default options."""


def find_criterion(criterion: AnyCriterion) -> Criterion:
    """A criterion from its registered name, from a function of the user's own, or the object itself.

    Raises:
        OptionError: an unknown name, or something that is no criterion.
    """
    if not isinstance(criterion, str):
        if hasattr(criterion, "begin") and not isinstance(criterion, type):
            return criterion  # type: ignore[return-value]
        if callable(criterion) and not isinstance(criterion, type):
            return FunctionCriterion(criterion)
        raise OptionError(
            f"criterion={criterion!r}; give a name ({', '.join(CRITERIA)}), a criterion object or a function "
            "(prepared, data, site, bits) -> score"
        )
    if criterion not in CRITERIA:
        raise unknown_name_error("criterion", criterion, CRITERIA)
    return CRITERIA[criterion]()

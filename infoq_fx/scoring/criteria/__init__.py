"""The sensitivity criteria, one per file, registered by name in ``CRITERIA``; those of papers in ``literature``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from infoq_fx.core.option_checks import check_count, with_seed
from infoq_fx.errors import OptionError, unknown_name_error
from infoq_fx.runtime.forward import RunOptions
from infoq_fx.scoring.criteria.function import FunctionCriterion, ScoreFunction
from infoq_fx.scoring.criteria.infoq import InfoQ
from infoq_fx.scoring.criteria.infoq_paper import InfoQPaper
from infoq_fx.scoring.criteria.literature.alps import ALPS
from infoq_fx.scoring.criteria.literature.clado import CLADO
from infoq_fx.scoring.criteria.literature.eagl import EAGL
from infoq_fx.scoring.criteria.literature.hawq_v2 import HAWQv2
from infoq_fx.scoring.criteria.literature.limpq import LIMPQ
from infoq_fx.scoring.criteria.literature.mpqco import MPQCO
from infoq_fx.scoring.criteria.literature.ompq import OMPQ
from infoq_fx.scoring.criteria.output_change import Accuracy, Loss, OutputKL, OutputSQNR
from infoq_fx.scoring.criteria.weight_mse import WeightMSE
from infoq_fx.scoring.criterion import Criterion, Kind, Measure, Observer
from infoq_fx.scoring.information.encoders import Encoder
from infoq_fx.types import Plain

__all__ = [
    "ALPS",
    "CLADO",
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
    "RunOptions",
    "ScoreFunction",
    "WeightMSE",
    "find_criterion",
    "make_criterion",
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
    "clado": CLADO,
}
"""Criteria by name, each with its default options."""


def find_criterion(criterion: AnyCriterion, seed: int = 0) -> Criterion:
    """Return a criterion from its registered name, from a user-defined function, or the object itself.

    One made from a name takes the ``seed``, if it has a field for it; an object brings its own.

    Raises:
        OptionError: the name is unknown, the object is not a criterion, or the seed is not an integer of at least 0.
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
    return with_seed(CRITERIA[criterion](), seed)


def make_criterion(
    criterion: AnyCriterion,
    observers: Sequence[Observer | str] | Literal["auto"] | None = None,
    encoder: Encoder | str | None = None,
    seed: int = 0,
) -> Criterion:
    """Create the criterion from the options of :func:`infoq_fx.quantize`.

    Raises:
        OptionError: the criterion is unknown, the seed is not a count, or observers or an encoder are given for a
            criterion that has none.
    """
    check_count("seed", seed, 0)
    if criterion == "infoq" and observers is None and encoder is not None:
        raise OptionError("encoder needs observers, for SMI(X; L): name observers too, or take criterion='infoq_paper'")
    if criterion == "infoq":
        return InfoQ(observers=observers, encoder=encoder, seed=seed)
    if criterion == "infoq_paper":
        return InfoQPaper(observers=observers, encoder=encoder, seed=seed)
    if observers is not None or encoder is not None:
        raise OptionError(
            "observers and encoder belong to criterion='infoq' or 'infoq_paper'; give them to the criterion object"
        )
    return find_criterion(criterion, seed)

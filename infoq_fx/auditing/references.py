"""Searches that audits may compare criteria with, registered by name in ``REFERENCES``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

from infoq_fx.auditing.differentiable import DifferentiableSearch
from infoq_fx.auditing.evolutionary import EvolutionarySearch
from infoq_fx.core.data import CalibrationData
from infoq_fx.errors import OptionError, unknown_name_error
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.recovery.candidates import Candidates
from infoq_fx.types import Budget

__all__ = ["REFERENCES", "AnyReference", "Reference", "find_references"]


class Reference(Protocol):
    """A search that finds an allocation for one budget, without a table of scores.

    Its representation (``repr``) names all its options, so that kept results are only used for the same ones.
    """

    @property
    def name(self) -> str:
        """The name of its row."""

    def __call__(
        self, prepared: PreparedModel, data: CalibrationData, limits: Budget, candidates: Candidates | None
    ) -> Mapping[str, int]:
        """Return the bits of every site within the limits, the same for the same arguments.

        Args:
            prepared: calibrated; it is not changed.
            data: calibration samples by the model's input names.
            limits: the budget, which can be met.
            candidates: weights as recovery would round them; None for rounding to nearest.
        """


AnyReference: TypeAlias = Reference | str

REFERENCES: dict[str, Callable[[], Reference]] = {
    "evolutionary": EvolutionarySearch,
    "differentiable": DifferentiableSearch,
}
"""Searches by name, each with its default options."""


def find_references(given: Sequence[AnyReference]) -> list[Reference]:
    """Return the searches, those given by name with default options.

    Raises:
        OptionError: it is no list, a name is unknown or given twice, or an object cannot be called.
    """
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise OptionError(f"references={given!r}; give a list of names ({', '.join(REFERENCES)}) or of searches")
    found: list[Reference] = []
    for one in given:
        if isinstance(one, str):
            if one not in REFERENCES:
                raise unknown_name_error("reference", one, REFERENCES)
            found.append(REFERENCES[one]())
        elif callable(one) and hasattr(one, "name") and not isinstance(one, type):
            found.append(one)
        else:
            raise OptionError(f"references holds {one!r}; give a name ({', '.join(REFERENCES)}) or a search object")
    names = [one.name for one in found]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise OptionError(f"reference {repeated[0]!r} is given twice; give one of them another name")
    return found

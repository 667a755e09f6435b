"""What a step of recovery is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from infoq_fx.core.data import CalibrationData
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.runtime.forward import RunOptions

__all__ = ["RecoveryStep", "StepContext"]


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """What a step works with besides model and data; none of it but the batch size may change a result.

    ``batch_size`` samples are run together. ``run_options`` holds threads and the progress bar: a step tells it shares that
    sum to 1. ``cache_dir`` is where a long step keeps what is finished, so that it can go on; None keeps nothing.
    """

    batch_size: int
    run_options: RunOptions = field(default_factory=RunOptions)
    cache_dir: Path | None = None


class RecoveryStep(Protocol):
    """Gives a prepared model better numbers for one allocation: weights, biases, qparams; its graph stays.

    A step is a frozen value: its fields are its options. It reads the float model from ``prepared.origin`` (or from
    ``prepared`` itself, where no step came before), so that steps follow each other without adding up their errors.
    """

    @property
    def name(self) -> str:
        """Under which the step is asked for, and logged."""

    def recover(
        self, prepared: PreparedModel, bits: Mapping[str, int], data: CalibrationData, context: StepContext
    ) -> PreparedModel:
        """A changed copy of ``prepared``.

        Args:
            prepared: calibrated; it stays as it is.
            bits: bit-width by site; sites that are not named are at 8 bits.
            data: by the model's input names, on the model's device; labels are not read.
            context: how.
        """

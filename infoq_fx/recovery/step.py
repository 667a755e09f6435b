"""The protocol of a recovery step, and the context that it runs in."""

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
    """What a step needs besides model and data; it changes the result by no more than the order of sums.

    ``batch_size`` samples are run together. ``run_options`` holds threads, what a run may keep for gradients, and the
    progress bar: a step advances it by shares that sum to 1. ``cache_dir`` is where a long step keeps finished parts,
    so that it can resume; None keeps nothing. ``held_bytes`` is what values between layers may take in memory; those
    beyond it go to a temporary file.
    """

    batch_size: int
    run_options: RunOptions = field(default_factory=RunOptions)
    cache_dir: Path | None = None
    held_bytes: int = 512 << 20


class RecoveryStep(Protocol):
    """A step that improves a prepared model's weights, biases and qparams for one allocation; the graph is kept.

    A step is a frozen dataclass whose fields are its options. It reads the float model from ``prepared.origin`` (or
    from ``prepared`` itself if no step came before), so that the errors of successive steps do not add up.
    """

    @property
    def name(self) -> str:
        """The name by which the step is selected and logged."""

    def recover(
        self, prepared: PreparedModel, bits: Mapping[str, int], data: CalibrationData, context: StepContext
    ) -> PreparedModel:
        """Return an improved copy of ``prepared``.

        Args:
            prepared: calibrated; not changed.
            bits: bit-width by site; sites that are not named are at 8 bits.
            data: by the model's input names, on the model's device; labels are not read.
            context: batch size, threads, progress bar and cache folder.
        """

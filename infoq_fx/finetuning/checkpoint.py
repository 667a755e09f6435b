"""Checkpoints of finetuning: the state of a training in a file, from which the same call goes on."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from infoq_fx.core.atomic_files import write_atomically
from infoq_fx.errors import OptionError
from infoq_fx.finetuning.training_loop import Optimizer, Training, begin_optimizer

__all__ = ["Checkpoint", "TrainingState", "load_state", "read_numbers", "save_state"]

_FORMAT, _VERSION = "infoq_fx.finetune", 6


@dataclass(frozen=True)
class TrainingState:
    """State of training: held-out losses, initial and after each epoch; the optimizer; the best parameters."""

    losses: tuple[float, ...]
    optimizer: Optimizer
    best: Mapping[str, Tensor]

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return len(self.losses) - 1


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file, and hashes and options that it must have been made with."""

    path: Path
    made_of: Mapping[str, str | float]


def save_state(file: Checkpoint, training: Training, state: TrainingState) -> None:
    """Write a training's state and its present parameters.

    Raises:
        OptionError: the file cannot be written.
    """
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "made_of": dict(file.made_of),
        "losses": list(state.losses),
        "adam": state.optimizer.adam.state_dict(),
        "average": list(state.optimizer.average),
        "best": dict(state.best),
        "numbers": read_numbers(training),
    }
    content = io.BytesIO()
    torch.save(document, content)
    try:
        write_atomically(file.path, content.getvalue())
    except OSError as error:
        raise OptionError(f"cannot write checkpoint={str(file.path)!r}: {error}; give another path") from error


def load_state(file: Checkpoint, training: Training) -> TrainingState:
    """Read a state, and put its parameters into the student.

    Raises:
        OptionError: the file is no checkpoint, or that of another call.
    """
    shown = f"checkpoint={str(file.path)!r}"
    try:
        document = torch.load(file.path, map_location=training.device, weights_only=True)
    except Exception as error:
        raise OptionError(f"cannot read {shown} ({error}); remove it, or give another path") from error
    if not isinstance(document, dict) or (document.get("format"), document.get("version")) != (_FORMAT, _VERSION):
        raise OptionError(f"{shown} is not a checkpoint of finetune() in this release; give another path")
    theirs, options = document["made_of"], dataclasses.asdict(training.settings)
    others = [name for name, value in file.made_of.items() if theirs.get(name) != value]
    if others:
        told = [f"{name}={theirs.get(name)} instead of {options[name]}" if name in options else name for name in others]
        raise OptionError(
            f"{shown} is of another call, which differs in: {', '.join(told)}; repeat that call, or give another path"
        )
    training.student.load_state_dict(document["numbers"], strict=False)
    optimizer = begin_optimizer(training.learned)
    optimizer.adam.load_state_dict(document["adam"])
    for mine, theirs in zip(optimizer.average, document["average"], strict=True):
        mine.copy_(theirs)
    return TrainingState(tuple(document["losses"]), optimizer, document["best"])


def read_numbers(training: Training) -> dict[str, Tensor]:
    """Return a copy of the student's parameters."""
    return {name: parameter.detach().clone() for name, parameter in training.student.named_parameters()}

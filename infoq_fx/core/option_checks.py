"""Checks of arguments, made before anything is computed, and the seed of what is made from a name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from infoq_fx.errors import OptionError, UnsupportedModelError

if TYPE_CHECKING:  # numbers are checked without torch
    import torch

__all__ = [
    "check_alpha",
    "check_count",
    "check_device",
    "check_memory_limit",
    "check_model",
    "check_patterns",
    "check_rate",
    "read_search_passes",
    "with_seed",
]

_T = TypeVar("_T")
_SEARCH_PASSES = 150


def check_count(option: str, value: int, least: int) -> None:
    """Check that an option is an integer of at least ``least``.

    Raises:
        OptionError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{option}={value!r}; give an integer of at least {least}")


def check_rate(option: str, value: float) -> None:
    """Check that an option is a positive finite number.

    Raises:
        OptionError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise OptionError(f"{option}={value!r}; give a positive finite number")


def check_alpha(alpha: Any) -> None:
    """Check the weight of activation scores against weight scores.

    Raises:
        OptionError: it is not a finite number of at least 0.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not 0 <= float(alpha) < math.inf:
        raise OptionError(f"alpha={alpha!r} must be a finite number, 0 or more; give 1.0 to weigh both kinds alike")


def read_search_passes(refine: Any, passes: Any) -> int:
    """Return the number of passes that a search for better bit-widths may take: 0 unless ``refine`` is ``"search"``.

    Raises:
        OptionError: ``refine`` is neither a bool nor ``"search"``, or passes are given for no search or below 1.
    """
    if not isinstance(refine, bool) and refine != "search":
        raise OptionError(f"refine={refine!r}; give True, False, or 'search' to improve the best proposal too")
    if refine != "search":
        if passes is not None:
            raise OptionError(f"search_passes={passes!r} is for a search; give refine='search' too, or leave it out")
        return 0
    if passes is None:
        return _SEARCH_PASSES
    check_count("search_passes", passes, 1)
    return int(passes)


def check_device(device: Any) -> torch.device:
    """Return the device that a name stands for, if tensors can be made on it.

    Raises:
        OptionError: it is not a device, or not one of this machine.
    """
    import torch

    remedy = f"give 'cpu'{', or a GPU such as ' + repr('cuda') if torch.cuda.is_available() else ''}"
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    # Each backend that is not there raises what it likes.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise OptionError(f"device={device!r} cannot be used here: {reason}; {remedy}") from error
    if found.type == "meta":
        raise OptionError(f"device={device!r} holds no values; {remedy}")
    return found


def check_patterns(ignore: Any, pin: Any, tie: Any = ()) -> None:
    """Check that layers are named by glob patterns: a list of them to ignore, a dict of bit-widths by pattern to pin.

    ``tie`` is a list of groups of them.

    Raises:
        OptionError: they are not.
    """
    if not isinstance(ignore, list | tuple | set | frozenset) or not all(isinstance(x, str) for x in ignore):
        raise OptionError(f"ignore={ignore!r}; give a list of glob patterns on module paths, such as ['head.*']")
    if pin is not None and not (isinstance(pin, Mapping) and all(isinstance(x, str) for x in pin)):
        raise OptionError(f"pin={pin!r}; give a dict of bit-widths by glob pattern, such as {{'head.*': 8}}")
    for pattern, fixed in (pin or {}).items():
        if not isinstance(fixed, Integral):
            raise OptionError(f"pin[{pattern!r}]={fixed!r} is not one bit-width; give a number, such as 8")
    if not isinstance(tie, list | tuple) or not all(
        isinstance(group, list | tuple) and group and all(isinstance(x, str) for x in group) for group in tie
    ):
        raise OptionError(
            f"tie={tie!r}; give a list of groups of glob patterns on module paths, such as [('*.q_proj', '*.k_proj')]"
        )


def check_memory_limit(limit: Any) -> None:
    """Check a memory limit, a number of bytes or None.

    Raises:
        OptionError: it is not.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise OptionError(f"memory_limit={limit!r} is not a number of bytes; give one, half a gigabyte is {1 << 29}")


def check_model(model: Any) -> None:
    """Check that a model is one: an ``nn.Module`` (an ``fx.GraphModule`` too) or an ``ExportedProgram``.

    Raises:
        UnsupportedModelError: it is something else; the message says how to make a model of it.
    """
    from torch import nn
    from torch.export import ExportedProgram

    if isinstance(model, nn.Module | ExportedProgram):
        return
    found = f"a {type(model).__name__}"
    remedy = "give a trained nn.Module, a traced fx.GraphModule or an ExportedProgram"
    if model is None:
        found = "None"
    elif isinstance(model, type):
        found, remedy = f"the class {model.__name__}", f"give an instance with trained weights, {model.__name__}(...)"
    elif isinstance(model, Mapping):
        found = f"a {type(model).__name__} of {len(model)} entries"
        remedy = "if it is a state dict, make the model and give it after model.load_state_dict(...)"
    elif isinstance(model, str | Path):
        found, remedy = f"the path {str(model)!r}", "load the model first, a .pt2 file by torch.export.load(path)"
    elif callable(model):
        found = f"the function {getattr(model, '__name__', type(model).__name__)}"
        remedy = "give a module, or one whose forward() calls the function"
    raise UnsupportedModelError(f"the model is {found}; {remedy}")


def with_seed(made: _T, seed: int) -> _T:
    """Return a frozen dataclass with this seed; anything without a field ``seed`` as it is.

    Raises:
        OptionError: the seed is not an integer of at least 0.
    """
    check_count("seed", seed, 0)
    if dataclasses.is_dataclass(made) and any(field.name == "seed" for field in dataclasses.fields(made)):
        return dataclasses.replace(made, seed=seed)  # type: ignore[type-var]
    return made

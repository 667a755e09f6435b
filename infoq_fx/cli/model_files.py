"""Loads models from files or Python callables, and samples from arrays or image folders, for the command line."""

from __future__ import annotations

import ast
import importlib
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from infoq_fx.cli.image_folder import load_images, spread_rows
from infoq_fx.errors import CalibrationDataError, OptionError, nearest_names
from infoq_fx.export.quantized_files import refuse_code
from infoq_fx.graph.program.exporting import load_quietly

__all__ = ["load_model", "load_samples"]

_INPUT_KEYS = ("x", "images", "inputs", "data")
_LABEL_KEYS = ("y", "labels", "targets")


def load_model(name: str, *, weights: Path | None = None) -> nn.Module | ExportedProgram:
    """Load a model from an exported ``.pt2`` file or from a ``package.module:callable`` that returns it.

    Args:
        name: the file; or the callable, also looked up in the working directory, with literal keyword arguments if it
            needs any: ``torchvision.models:mobilenet_v2(num_classes=10)``.
        weights: file from ``torch.save`` with a state dict for the module; only tensors and plain values in it are
            unpickled.

    Raises:
        OptionError: the file or the callable does not exist or gives no model, or the weights do not fit it.
    """
    if name.endswith(".pt2"):
        return _load_program(name, weights)
    module_name, _, rest = name.partition(":")
    attribute, arguments = _read_call(name, rest)
    found = _find_attribute(module_name, attribute)
    if isinstance(found, nn.Module | ExportedProgram):
        model: Any = found
    else:
        try:
            model = found(**arguments)
        except TypeError as error:
            raise OptionError(f"cannot call {name!r}: {error}; give keyword arguments that it takes") from error
    if not isinstance(model, nn.Module | ExportedProgram):
        raise OptionError(f"{name!r} gave a {type(model).__name__}; name a callable that returns an nn.Module")
    if weights is not None:
        if isinstance(model, ExportedProgram):
            raise OptionError(f"{name!r} is an exported program with weights of its own; leave --weights out")
        _load_weights(model, weights)
    loaded: nn.Module | ExportedProgram = model
    return loaded


def load_samples(
    path: Path,
    *,
    limit: int,
    image_size: int = 224,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    resize: int | None = None,
    labels: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Load calibration samples from an ``.npz`` file or a folder of images.

    Args:
        path: ``.npz`` file with inputs under ``x``, ``images``, ``inputs`` or ``data`` and, optionally, labels under
            ``y``, ``labels`` or ``targets``; it is never unpickled. Or a folder, which is searched recursively. If
            every image is in one of at least two subfolders, these are numbered by name and give the labels, as in
            torchvision's ``ImageFolder``.
        limit: largest number of samples, evenly spread over the data.
        image_size: side of the square that is cropped at the centre.
        mean: means of the channels, for values from 0 to 1; three for colour images, one for grey images.
        std: standard deviations of the channels, likewise.
        resize: short side of the image before the crop; None means 8/7 of ``image_size``.
        labels: whether to read labels.

    Raises:
        CalibrationDataError: there are no readable samples at the path.
    """
    if path.is_dir():
        return load_images(path, limit=limit, image_size=image_size, mean=mean, std=std, resize=resize, labels=labels)
    if path.suffix != ".npz" or not path.is_file():
        raise CalibrationDataError(f"DATA is {str(path)!r}; give an .npz file or a folder of images that exists")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise CalibrationDataError(
            f"cannot read {str(path)!r} ({error}); save plain arrays with numpy.savez"
        ) from error
    inputs = next((arrays[key] for key in _INPUT_KEYS if key in arrays), None)
    if inputs is None or inputs.ndim == 0:
        raise CalibrationDataError(
            f"{str(path)!r} holds {', '.join(map(repr, arrays)) or 'nothing'}; inputs must be under one of the names "
            f"{', '.join(_INPUT_KEYS)}; save them under one with numpy.savez"
        )
    rows = spread_rows(len(inputs), limit)
    held = next((arrays[key] for key in _LABEL_KEYS if key in arrays and labels), None)
    if held is not None and len(held) != len(inputs):
        raise CalibrationDataError(
            f"{str(path)!r} holds {len(inputs)} inputs and {len(held)} labels; save one label for every input"
        )
    found = None if held is None else torch.from_numpy(held[rows])
    chosen = torch.from_numpy(np.ascontiguousarray(inputs[rows]))
    return chosen.float() if chosen.dtype == torch.float64 else chosen, found


def _load_program(name: str, weights: Path | None) -> ExportedProgram:
    if not Path(name).is_file():
        raise OptionError(f"no file {name!r}; save one with torch.export.save(program, 'model.pt2')")
    if weights is not None:
        raise OptionError(f"{name!r} is an exported program with weights of its own; leave --weights out")
    try:
        refuse_code(Path(name).read_bytes())
        return load_quietly(name)
    except Exception as error:
        raise OptionError(
            f"{name!r} is not an exported program that this torch can load: {error}; save one with torch.export.save, "
            "or load a file that you trust in a callable of your own, package.module:callable"
        ) from error


def _read_call(name: str, text: str) -> tuple[str, dict[str, Any]]:
    """Path and arguments of ``path.to.callable`` or ``path.to.callable(key=literal)``; nothing is evaluated."""
    advice = "give an exported .pt2 file, or package.module:callable, with literal keyword arguments if it needs any"
    if not text:
        raise OptionError(f"MODEL is {name!r}; {advice}")
    if "(" not in text:
        return text, {}
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(given.arg is None for given in call.keywords):
            raise ValueError("not a call with keyword arguments")
        return ast.unparse(call.func), {str(given.arg): ast.literal_eval(given.value) for given in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise OptionError(f"MODEL is {name!r}, which cannot be read ({error}); {advice}") from error


def _find_attribute(module_name: str, attribute: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:  # not on the path of an installed command
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise OptionError(
            f"cannot import {module_name!r} ({error}); install it, put it on PYTHONPATH, or run this in its folder"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise OptionError(
                f"{module_name!r} has no {part!r}; give another name, nearest: {nearest_names(part, dir(found))}"
            )
        found = getattr(found, part)
    return found


def _load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict: plain, under a checkpoint's ``state_dict`` or ``model`` key, or of ``DataParallel``."""
    try:
        held: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OptionError(f"cannot read --weights {str(path)!r}: {error.strerror}; give a file that exists") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise OptionError(
            f"--weights {str(path)!r} holds more than tensors, or is damaged ({reason}); "
            "save it with torch.save(model.state_dict(), path)"
        ) from error
    for key in ("state_dict", "model"):
        held = held[key] if isinstance(held, dict) and isinstance(held.get(key), dict) else held
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise OptionError(f"--weights {str(path)!r} is not a state dict; save one with torch.save(model.state_dict())")
    if held and all(str(key).startswith("module.") for key in held):
        held = {key.removeprefix("module."): value for key, value in held.items()}
    try:
        model.load_state_dict(held)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 400 else f"{reason[:400]} ..."
        raise OptionError(
            f"--weights {str(path)!r} do not fit the model: {reason}; give the arguments that the model was trained "
            "with, such as 'torchvision.models:resnet18(num_classes=10)'"
        ) from error

"""What the command line reads: models from files or Python callables, samples from arrays or image folders."""

from __future__ import annotations

import importlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.export import ExportedProgram

from infoq_fx.errors import CalibrationDataError, OptionError, nearest_names

__all__ = ["load_images", "load_model", "load_samples"]

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}
_INPUT_KEYS = ("x", "images", "inputs", "data")
_LABEL_KEYS = ("y", "labels", "targets")


def load_model(name: str) -> nn.Module | ExportedProgram:
    """A model from an exported ``.pt2`` file, or from ``package.module:callable`` that returns a module.

    Raises:
        OptionError: no such file or callable, or it holds no model.
    """
    if name.endswith(".pt2"):
        if not Path(name).is_file():
            raise OptionError(f"no file {name!r}; save one with torch.export.save(program, 'model.pt2')")
        try:
            return torch.export.load(name)
        except Exception as error:
            raise OptionError(f"{name!r} is no exported program that this torch reads: {error}") from error
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise OptionError(f"MODEL is {name!r}; give an exported .pt2 file or package.module:callable")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise OptionError(f"cannot import {module_name!r} ({error}); is it installed, or on PYTHONPATH?") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise OptionError(f"{module_name!r} has no {part!r}; nearest: {nearest_names(part, dir(found))}")
        found = getattr(found, part)
    model = found if isinstance(found, nn.Module | ExportedProgram) else found()
    if not isinstance(model, nn.Module | ExportedProgram):
        raise OptionError(f"{name!r} gave a {type(model).__name__}; it must return an nn.Module")
    return model


def load_samples(
    path: Path,
    *,
    limit: int,
    image_size: int = 224,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> tuple[Tensor, Tensor | None]:
    """Calibration samples from an ``.npz`` file or a folder of images.

    Args:
        path: ``.npz`` with inputs under ``x``, ``images``, ``inputs`` or ``data`` and, if there are any, labels
            under ``y``, ``labels`` or ``targets``; nothing in it is ever unpickled. Or a folder, searched with all
            below it; its images carry no labels.
        limit: at most so many samples, evenly spread over what there is.
        image_size: images are resized so that the short side is 8/7 of it, then cropped at the centre.
        mean: of the three channels, for values from 0 to 1.
        std: likewise.

    Raises:
        CalibrationDataError: nothing readable at the path.
    """
    if path.is_dir():
        return load_images(path, limit=limit, image_size=image_size, mean=mean, std=std), None
    if path.suffix != ".npz" or not path.is_file():
        raise CalibrationDataError(f"DATA is {str(path)!r}; give an .npz file or a folder of images that exists")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            arrays = {key: held[key] for key in held.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise CalibrationDataError(
            f"cannot read {str(path)!r} ({error}); save plain arrays with numpy.savez"
        ) from error
    inputs = next((arrays[key] for key in _INPUT_KEYS if key in arrays), None)
    if inputs is None or inputs.ndim == 0:
        raise CalibrationDataError(
            f"{str(path)!r} holds {', '.join(map(repr, arrays)) or 'nothing'}; inputs must be under one of "
            f"{', '.join(_INPUT_KEYS)}"
        )
    rows = _spread(len(inputs), limit)
    labels = next((torch.from_numpy(arrays[key][rows]) for key in _LABEL_KEYS if key in arrays), None)
    chosen = torch.from_numpy(np.ascontiguousarray(inputs[rows]))
    return chosen.float() if chosen.dtype == torch.float64 else chosen, labels


def load_images(folder: Path, *, limit: int, image_size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images of a folder and all below it, float32 ``[samples, 3, image_size, image_size]``, in path order.

    Raises:
        CalibrationDataError: no image, or one that cannot be read.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGE_SUFFIXES)
    if not files:
        kinds = ", ".join(sorted(_IMAGE_SUFFIXES))
        raise CalibrationDataError(f"no image in {str(folder)!r} or below it; looked for {kinds}")
    images = [_read_image(files[row], image_size) for row in _spread(len(files), limit)]
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (torch.stack(images) - shift) / scale


def _read_image(path: Path, size: int) -> Tensor:
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise CalibrationDataError(f"cannot read the image {str(path)!r} ({error}); remove it or mend it") from error
    ratio = size * 8 / 7 / min(image.size)
    width, height = (max(size, round(side * ratio)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def _spread(count: int, limit: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64)) if count else np.arange(0)

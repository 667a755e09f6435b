"""Loads calibration images from a folder, preprocessed as for torchvision's ImageNet models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from infoq_fx.errors import CalibrationDataError, OptionError

__all__ = ["load_images", "spread_rows"]


def load_images(
    folder: Path,
    *,
    limit: int,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    resize: int | None = None,
    labels: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Read the images of a folder recursively, float32 ``[samples, channels, image_size, image_size]``.

    If every image is in one of at least two subfolders, these are the classes, numbered as by torchvision's
    ``ImageFolder``. Arguments are those of :func:`infoq_fx.cli.model_files.load_samples`; labels are int64
    ``[samples]``.

    Raises:
        CalibrationDataError: there is no image, or one cannot be read.
        OptionError: mean and std are not for one or three channels, or images are resized to less than the crop.
    """
    if len(mean) != len(std) or len(mean) not in (1, 3) or min(std) <= 0:
        raise OptionError(
            f"mean has {len(mean)} values and std {len(std)}; give one (grey) or three (colour) each, std above 0"
        )
    if resize is not None and resize < image_size:
        raise OptionError(f"resize={resize} is below image_size={image_size}; give the short side before the crop")
    samples = _list_samples(folder)
    if not samples:
        kinds = ", ".join(IMG_EXTENSIONS)
        raise CalibrationDataError(f"no image in {str(folder)!r} or below it; give a folder with any of {kinds}")
    chosen = [samples[row] for row in spread_rows(len(samples), limit)]
    side = max(image_size, round(image_size * 8 / 7)) if resize is None else resize
    steps = [v2.Resize(side), v2.CenterCrop(image_size), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    transform = v2.Compose([*steps, v2.Normalize(list(mean), list(std))])
    images = [_read_image(path, transform, "L" if len(mean) == 1 else "RGB") for path, _ in chosen]
    numbers = [number for _, number in chosen if number is not None]
    return torch.stack(images), torch.tensor(numbers) if labels and numbers else None


def spread_rows(count: int, limit: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return at most ``limit`` indices below ``count``, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64)) if count else np.arange(0)


def _list_samples(folder: Path) -> list[tuple[Path, int | None]]:
    """Every image with its class, or None if the subfolders are not classes."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    parts = [path.relative_to(folder).parts for path in files]
    if any(len(part) == 1 for part in parts) or len({part[0] for part in parts}) < 2:
        return [(path, None) for path in files]
    return [(Path(path), number) for path, number in ImageFolder(folder, allow_empty=True).samples]


def _read_image(path: Path, transform: v2.Transform, mode: str) -> Tensor:
    try:
        with Image.open(path) as opened:
            image = opened.convert(mode)
    except (UnidentifiedImageError, OSError) as error:
        raise CalibrationDataError(f"cannot read the image {str(path)!r} ({error}); remove it or replace it") from error
    pixels: Tensor = transform(image)
    return pixels.as_subclass(Tensor)

"""Augmentation: more training inputs from few, which the float model labels as it does any others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from infoq_fx.errors import OptionError
from infoq_fx.runtime.digest import name_function

__all__ = ["Augment", "augment_images", "find_augment", "name_augment"]

Augment: TypeAlias = Callable[[Mapping[str, Tensor], torch.Generator], Mapping[str, Tensor]]
"""A function from a batch's inputs by name and a seeded generator to inputs of the same form."""

_SMALLEST_AREA = 0.25  # of a crop
_MOST_STRETCH = 4 / 3  # of a crop's aspect ratio
_MIXED, _PASTED = 1 / 3, 1 / 3  # shares of the images that are mixed with another, and that get a patch of it
_SMALLEST_SIDE = 8  # pixels; smaller maps are no images


def augment_images(inputs: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Crop, flip and mix the images of a batch at random; all inputs of two dimensions of space change alike.

    Each image is a crop of a quarter to all of its area, resized bilinearly, and is mirrored with probability 0.5.
    Then a third of them are mixed with another image of the batch, and a third get a rectangle of it. There are no
    labels to mix: the float model says what such an image is.

    Args:
        inputs: by name; floating-point ``[samples, channels, height, width]`` of at least 8 pixels a side are images.
        generator: on the CPU.

    Raises:
        OptionError: no input is an image.

    Reference:
        Szegedy et al., arXiv 1409.4842, Section 6 (crops); Zhang et al., "mixup", arXiv 1710.09412; Yun et al.,
        "CutMix", arXiv 1905.04899; Beyer et al., "Knowledge distillation: A good teacher is patient and consistent",
        arXiv 2106.05237, for teacher and student that see the same crops and mixes.
    """
    images = {name: x for name, x in inputs.items() if _is_image(x)}
    if not images:
        found = ", ".join(f"{name!r} {list(x.shape[1:])}" for name, x in inputs.items())
        raise OptionError(
            f"augment='images' found no image [channels, height, width] of at least {_SMALLEST_SIDE} pixels among the "
            f"inputs {found}; give a function (inputs, generator) -> inputs, or None"
        )
    count = next(iter(images.values())).shape[0]
    transforms = _draw_crops(count, generator)
    others = torch.randperm(count, generator=generator)
    shares, boxes = _draw_mixes(count, generator)
    changed = dict(inputs)
    for name, x in images.items():
        grid = functional.affine_grid(transforms.to(x), list(x.shape), align_corners=False)
        cropped = functional.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
        weight = _weigh_pixels(shares, boxes, x.shape[2], x.shape[3]).to(x)
        changed[name] = (cropped * weight + cropped[others.to(x.device)] * (1 - weight)).contiguous()
    return changed


def find_augment(augment: Any, label_weight: float) -> Augment | None:
    """Return the function behind an option: ``None``, ``"images"`` or a function of the user's own.

    Raises:
        OptionError: it is something else, or labels are asked for, which no longer fit.
    """
    if augment is None:
        return None
    if label_weight > 0:
        raise OptionError(
            f"augment={augment!r} changes the inputs, which the labels of label_weight={label_weight:g} no longer fit; "
            "give label_weight=0, or a loader that augments both"
        )
    if augment == "images":
        return augment_images
    if not callable(augment):
        raise OptionError(f"augment={augment!r}; give 'images', a function (inputs, generator) -> inputs, or None")
    found: Augment = augment
    return found


def name_augment(augment: Augment | None) -> str:
    """Return what tells an augmentation from others in the digest of a call."""
    return "none" if augment is None else name_function(augment)


def _is_image(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_floating_point() and min(x.shape[2:]) >= _SMALLEST_SIDE


def _draw_crops(count: int, generator: torch.Generator) -> Tensor:
    """Affine maps ``[samples, 2, 3]`` from the output's coordinates, -1 to 1, to those of the input."""
    area, stretch, *places = torch.rand(4, count, generator=generator).unbind()
    side = (_SMALLEST_AREA + (1 - _SMALLEST_AREA) * area).sqrt()
    aspect = torch.exp((2 * stretch - 1) * math.log(_MOST_STRETCH) / 2)
    width, height = (side * aspect).clamp(max=1), (side / aspect).clamp(max=1)
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    zero = torch.zeros(count)
    x_shift, y_shift = ((2 * place - 1) * (1 - size) for place, size in zip(places, (width, height), strict=True))
    rows = [torch.stack([width * mirror, zero, x_shift], 1), torch.stack([zero, height, y_shift], 1)]
    return torch.stack(rows, 1)


def _draw_mixes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The share of each image in its mix ``[samples]``, and the rectangle of the other ``[samples, 4]``, 0 to 1."""
    kind, share, *box = torch.rand(6, count, generator=generator).unbind()
    is_mixed, is_pasted = kind < _MIXED, (kind >= _MIXED) & (kind < _MIXED + _PASTED)
    shares = torch.where(is_mixed, 0.5 + 0.5 * share, torch.ones(count))
    width, height = (torch.where(is_pasted, 0.2 + 0.5 * size, torch.zeros(count)) for size in box[:2])
    left, top = (place * (1 - size) for place, size in zip(box[2:], (width, height), strict=True))
    return shares, torch.stack([left, top, left + width, top + height], 1)


def _weigh_pixels(shares: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """The weight of each image's own pixels, ``[samples, 1, height, width]``."""
    y, x = ((torch.arange(size) + 0.5) / size for size in (height, width))
    left, top, right, bottom = boxes[:, :, None].unbind(1)
    inside = ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None, :]
    return torch.where(inside, 0.0, shares[:, None, None])[:, None]

"""Containers, which say how an ONNX file stores integers, and targets, which say which containers a runtime runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from infoq_fx.errors import unknown_name_error

__all__ = ["CONTAINERS", "DEFAULT_TARGET", "TARGETS", "Container", "Target", "find_container", "find_target"]


@dataclass(frozen=True)
class Container:
    """How an ONNX file stores integers.

    Args:
        name: its public name.
        weight_widths: bit-widths of the integer types that weights are stored in, ascending; a weight is stored in
            the first that fits its bit-width.
        opset_version: of the file; the first with these types.
        ir_version: of the file.
    """

    name: str
    weight_widths: tuple[int, ...]
    opset_version: int
    ir_version: int

    @property
    def is_packed(self) -> bool:
        """Whether some weights take less than a byte."""
        return self.weight_widths[0] < 8

    def stored_bits(self, bits: int) -> int:
        """Return the bits that each weight of a bit-width takes in the file."""
        return next(width for width in self.weight_widths if width >= bits)


@dataclass(frozen=True)
class Target:
    """A runtime, and what it needs from a file.

    Args:
        name: its public name.
        containers: those that it loads and computes correctly, the one with the widest support and fastest kernels
            first.
        shifts_full_weights: weights that use all of 8 bits are stored as uint8 around zero point 128 instead of int8.
            onnxruntime multiplies uint8 by int8 with saturation on x86 processors without VNNI; with it, and in
            OpenVINO, shifted weights are only slower (MobileNetV2: 1.6 times).
        quantizes_before_parameters: also quantize a convolution's output where it is concatenated with a parameter
            (patches with the class token of a vision transformer). OpenVINO 2026.4 then adds the first channel's bias
            to all channels; without that quantizer the convolution computes in integers and returns floats.
    """

    name: str
    containers: tuple[str, ...]
    shifts_full_weights: bool
    quantizes_before_parameters: bool


_CONTAINERS = (
    Container("int8", (8,), 18, 8),
    Container("packed", (4, 8), 21, 10),
    Container("int2", (2, 4, 8), 25, 13),
)
_TARGETS = (
    Target("onnxruntime", ("int8", "packed"), shifts_full_weights=False, quantizes_before_parameters=True),
    Target("onnxruntime-avx2", ("int8", "packed"), shifts_full_weights=True, quantizes_before_parameters=True),
    Target("openvino", ("int8", "packed"), shifts_full_weights=False, quantizes_before_parameters=False),
)

CONTAINERS: Mapping[str, Container] = {container.name: container for container in _CONTAINERS}
"""Containers by name: ``int8`` for the widest support and the fastest kernels, ``packed`` for the smallest file that
runs, and ``int2``, which stock runtimes do not run yet."""
TARGETS: Mapping[str, Target] = {target.name: target for target in _TARGETS}
"""Runtimes that files are tested with, by name; ``onnxruntime-avx2`` is onnxruntime on x86 processors without VNNI."""
DEFAULT_TARGET = "onnxruntime"


def find_container(name: str) -> Container:
    """Return a container by its name.

    Raises:
        OptionError: there is no container of this name.
    """
    if name not in CONTAINERS:
        raise unknown_name_error("container", name, CONTAINERS)
    return CONTAINERS[name]


def find_target(name: str) -> Target:
    """Return a target by its name.

    Raises:
        OptionError: there is no target of this name.
    """
    if name not in TARGETS:
        raise unknown_name_error("target", name, TARGETS)
    return TARGETS[name]

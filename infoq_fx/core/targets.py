"""Containers, which say how an ONNX file stores integers, and targets, which say which containers a runtime runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from infoq_fx.errors import unknown_name_error

__all__ = [
    "CHAIN_BYTES",
    "CONTAINERS",
    "DEFAULT_TARGET",
    "IR_VERSION",
    "LEVELS_BYTES",
    "MIRROR_BYTES",
    "MIRROR_CHAIN_BYTES",
    "NODE_BYTES",
    "OPSET_VERSION",
    "TARGETS",
    "Container",
    "Target",
    "find_container",
    "find_target",
]


OPSET_VERSION, IR_VERSION = 18, 8  # of every file

CHAIN_BYTES = 300
"""Bytes of the operators that unpack the weights of one bit-width in container ``exact``."""
NODE_BYTES = 40
"""Bytes of those of one weight."""
LEVELS_BYTES = 60
"""Bytes of those of its codebook, without the levels."""
MIRROR_CHAIN_BYTES = 250
"""Bytes of the operators that unpack the mirrored channels of all weights."""
MIRROR_BYTES = 30
"""Bytes of those of its mirrored channels, without a bit for each channel."""


@dataclass(frozen=True)
class Container:
    """How an ONNX file stores integers.

    Args:
        name: its public name.
        is_packed: weights of fewer than 8 bits take the bits that they have, and the file has the operators that
            unpack them; otherwise every weight takes a byte.
    """

    name: str
    is_packed: bool

    def stored_bits(self, bits: int) -> int:
        """Return the bits that each weight of a bit-width takes in the file."""
        return bits if self.is_packed else max(8, bits)


@dataclass(frozen=True)
class Target:
    """A runtime, and what it needs from a file.

    Args:
        name: its public name.
        containers: those that it loads and computes correctly, the smallest first; none for QONNX, whose files hold
            floats and say in ``Quant`` nodes how many bits they need.
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


_CONTAINERS = (Container("exact", is_packed=True), Container("int8", is_packed=False))
_TARGETS = (
    Target("onnxruntime", ("exact", "int8"), shifts_full_weights=False, quantizes_before_parameters=True),
    Target("onnxruntime-avx2", ("exact", "int8"), shifts_full_weights=True, quantizes_before_parameters=True),
    Target("openvino", ("exact", "int8"), shifts_full_weights=False, quantizes_before_parameters=False),
    Target("qonnx", (), shifts_full_weights=False, quantizes_before_parameters=True),
)

CONTAINERS: Mapping[str, Container] = {container.name: container for container in _CONTAINERS}
"""Containers by name: ``exact`` for runtimes that compute constants as they load, ``int8`` for those that do not."""
TARGETS: Mapping[str, Target] = {target.name: target for target in _TARGETS}
"""Runtimes that files are tested with, by name; ``onnxruntime-avx2`` is onnxruntime on x86 processors without VNNI,
``qonnx`` the format that FINN and hls4ml read."""
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

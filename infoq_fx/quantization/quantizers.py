"""The leaf modules of a prepared graph: quantizers and observers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from infoq_fx.quantization import numerics
from infoq_fx.types import BASELINE_BITS, CODEBOOK_BITS, QParams, QuantSite, QuantSpec

__all__ = ["Observe", "Quantizer", "spec_of"]


class Quantizer(nn.Module):
    """Fake quantization of one site at a bit-width that can be changed between runs.

    Before ``set_qparams`` it returns its input. ``bits`` is the bit-width that ``forward`` uses. ``noise`` is an
    activation's mean squared error at the bit-widths of calibration, relative to the mean square of its values, and
    ``peak`` the largest distance of a value from their mean in standard deviations.
    """

    def __init__(self, site: QuantSite) -> None:
        super().__init__()
        self.site = site
        self.bits = site.bits[0] if len(site.bits) == 1 else BASELINE_BITS
        self.calibrated_bits: tuple[int, ...] = ()
        self.noise: Mapping[int, float] = {}
        self.peak = 0.0

    def set_qparams(self, qparams: Mapping[int, QParams], device: torch.device) -> None:
        """Store scale, zero point and levels of every bit-width as buffers."""
        for bits, chosen in qparams.items():
            self.register_buffer(f"scale_{bits}", chosen.scale.to(device))
            self.register_buffer(f"zero_point_{bits}", chosen.zero_point.to(device))
            if chosen.levels is not None:
                self.register_buffer(f"levels_{bits}", chosen.levels.to(device))
        self.calibrated_bits = tuple(sorted(qparams))

    def qparams_at(self, bits: int) -> QParams:
        """Return the calibrated qparams of one bit-width."""
        spec = spec_of(self.site, bits)
        levels = self.get_buffer(f"levels_{bits}") if spec.has_codebook else None
        return QParams(spec, self.get_buffer(f"scale_{bits}"), self.get_buffer(f"zero_point_{bits}"), levels)

    def quantize_at(
        self,
        x: Tensor,
        bits: int,
        *,
        addend: Tensor | None = None,
        clip: tuple[float, float] = (-math.inf, math.inf),
    ) -> Tensor:
        """Fake quantize ``x`` at ``bits`` instead of ``self.bits``; see :func:`numerics.fake_quantize`."""
        return numerics.fake_quantize(x, self.qparams_at(bits), addend=addend, clip=clip)

    def forward(self, x: Tensor) -> Tensor:
        """Fake quantize ``x`` (any shape for an activation, the weight's for a weight) at ``self.bits``."""
        return self.quantize_at(x, self.bits) if self.calibrated_bits else x

    def extra_repr(self) -> str:
        """Return site and bit-width for the printed module."""
        return f"{self.site.name}, bits={self.bits}"


class Observe(nn.Module):
    """Identity module at which activations can be read; ``names`` are all the names of the tensor."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` unchanged."""
        return x

    def extra_repr(self) -> str:
        """Return the names for the printed module."""
        return ", ".join(self.names)


def spec_of(site: QuantSite, bits: int) -> QuantSpec:
    """Return how a site is quantized at a bit-width: weights symmetric per channel, activations affine per tensor."""
    is_weight = site.kind == "weight"
    levels = site.levels if is_weight and bits <= CODEBOOK_BITS else "uniform"
    axis = site.channel_axis if is_weight else None
    return QuantSpec(
        bits=bits,
        symmetric=is_weight,
        channel_axis=axis,
        has_codebook=levels == "codebook",
        has_signs=levels == "mirrored",
    )

"""The leaf modules put into a prepared graph, and the custom ops they become in the quantized one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from infoq_fx import numerics
from infoq_fx.spec import BASELINE_BITS, QParams, QuantSite, QuantSpec

__all__ = ["Observe", "Quantizer", "dequantize_op", "quantize_dequantize_op", "spec_of"]


class Quantizer(nn.Module):
    """Fake quantization of one site at a bit-width that can be changed between runs.

    Before ``set_qparams`` it passes its input through. ``bits`` is the bit-width that ``forward`` uses.
    """

    def __init__(self, site: QuantSite) -> None:
        super().__init__()
        self.site = site
        self.bits = site.bits[0] if len(site.bits) == 1 else BASELINE_BITS
        self.calibrated_bits: tuple[int, ...] = ()

    def set_qparams(self, qparams: Mapping[int, QParams], device: torch.device) -> None:
        """Keep scale and zero point of every bit-width, as buffers that follow ``.to(device)``."""
        for bits, chosen in qparams.items():
            self.register_buffer(f"scale_{bits}", chosen.scale.to(device))
            self.register_buffer(f"zero_point_{bits}", chosen.zero_point.to(device))
        self.calibrated_bits = tuple(sorted(qparams))

    def qparams_at(self, bits: int) -> QParams:
        """The calibrated qparams of one bit-width."""
        return QParams(
            spec_of(self.site, bits), self.get_buffer(f"scale_{bits}"), self.get_buffer(f"zero_point_{bits}")
        )

    def quantize_at(
        self,
        x: Tensor,
        bits: int,
        *,
        addend: Tensor | None = None,
        clip: tuple[float, float] = (-math.inf, math.inf),
    ) -> Tensor:
        """Fake quantize ``x`` at ``bits``, whatever the module's own setting; see :func:`numerics.fake_quantize`."""
        return numerics.fake_quantize(x, self.qparams_at(bits), addend=addend, clip=clip)

    def forward(self, x: Tensor) -> Tensor:
        """Fake quantize ``x`` (any shape for an activation, the weight's for a weight) at ``self.bits``."""
        return self.quantize_at(x, self.bits) if self.calibrated_bits else x

    def extra_repr(self) -> str:
        """Site and bit-width, as they show in a printed module."""
        return f"{self.site.name}, bits={self.bits}"


class Observe(nn.Module):
    """A place where activations can be read; it changes nothing. ``names`` are all the names it answers to."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` itself."""
        return x

    def extra_repr(self) -> str:
        """The names, as they show in a printed module."""
        return ", ".join(self.names)


def spec_of(site: QuantSite, bits: int) -> QuantSpec:
    """How a site is quantized at a bit-width: weights symmetric per channel, activations affine per tensor."""
    is_weight = site.kind == "weight"
    return QuantSpec(bits=bits, symmetric=is_weight, channel_axis=site.channel_axis if is_weight else None)


# Site and bit-width travel as arguments: a graph keeps them through pickle, deepcopy and torch.export.
_LIBRARY = torch.library.Library("infoq_fx", "DEF")
_LIBRARY.define(
    "quantize_dequantize(Tensor x, float scale, int zero_point, int bits, str site) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "dequantize(Tensor q, Tensor scale, int axis, int bits, str site) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_LIBRARY, "quantize_dequantize", "CompositeExplicitAutograd")
def _quantize_dequantize(x: Tensor, scale: float, zero_point: int, bits: int, site: str) -> Tensor:
    spec = QuantSpec(bits=bits, symmetric=False)
    as_tensors = x.new_tensor(scale), x.new_tensor(zero_point, dtype=torch.int32)
    result = numerics.fake_quantize(x, QParams(spec, *as_tensors))
    # Compilers rely on the memory layout that the fake kernel below promises.
    promised = torch.empty_like(x, device="meta").stride()
    return result if result.stride() == promised else torch.empty_like(x, dtype=result.dtype).copy_(result)


@torch.library.impl(_LIBRARY, "dequantize", "CompositeExplicitAutograd")
def _dequantize(q: Tensor, scale: Tensor, axis: int, bits: int, site: str) -> Tensor:
    shape = [1] * q.ndim
    shape[axis] = -1
    return q.to(scale.dtype) * scale.reshape(shape)


@torch.library.register_fake("infoq_fx::quantize_dequantize", lib=_LIBRARY)
def _quantize_dequantize_fake(x: Tensor, scale: float, zero_point: int, bits: int, site: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("infoq_fx::dequantize", lib=_LIBRARY)
def _dequantize_fake(q: Tensor, scale: Tensor, axis: int, bits: int, site: str) -> Tensor:
    return torch.empty_like(q, dtype=scale.dtype)


quantize_dequantize_op = torch.ops.infoq_fx.quantize_dequantize.default
dequantize_op = torch.ops.infoq_fx.dequantize.default

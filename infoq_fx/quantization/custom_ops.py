"""The custom ops of a quantized graph: ``infoq_fx.quantize_dequantize`` and ``infoq_fx.dequantize``."""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor

from infoq_fx.quantization import numerics
from infoq_fx.types import QParams, QuantSpec

__all__ = ["decompose_in_inductor", "dequantize_op", "quantize_dequantize_op"]


# Site and bit-width are arguments because a graph keeps those through pickle, deepcopy and torch.export.
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
    y = numerics.fake_quantize(x, QParams(spec, *as_tensors))
    # Traced graphs contain views that rely on the strides of the fake kernel, and attention chooses its kernel by them.
    promised = torch.empty_like(x, device="meta").stride()
    return y if y.stride() == promised else torch.empty_like(x, dtype=y.dtype).copy_(y)


@torch.library.impl(_LIBRARY, "dequantize", "CompositeExplicitAutograd")
def _dequantize(q: Tensor, scale: Tensor, axis: int, bits: int, site: str) -> Tensor:
    shape = [1] * q.ndim
    shape[axis] = -1
    return q.to(scale.dtype) * scale.reshape(shape)


@torch.library.register_fake("infoq_fx::quantize_dequantize", lib=_LIBRARY)
def _quantize_dequantize_fake(x: Tensor, scale: float, zero_point: int, bits: int, site: str) -> Tensor:
    _decompose_once_in_use()
    return torch.empty_like(x)


@torch.library.register_fake("infoq_fx::dequantize", lib=_LIBRARY)
def _dequantize_fake(q: Tensor, scale: Tensor, axis: int, bits: int, site: str) -> Tensor:
    _decompose_once_in_use()
    return torch.empty_like(q, dtype=scale.dtype)


quantize_dequantize_op = torch.ops.infoq_fx.quantize_dequantize.default


dequantize_op = torch.ops.infoq_fx.dequantize.default


@functools.cache
def decompose_in_inductor() -> None:
    """Let Inductor fuse the ops into the surrounding loops instead of treating them as opaque calls.

    Importing Inductor takes seconds, so this is done only when something is compiled, at an op's first trace.
    """
    from torch._inductor import decomposition

    decomposition.register_decomposition([quantize_dequantize_op])(_decompose_quantize_dequantize)
    decomposition.register_decomposition([dequantize_op])(_dequantize)
    decomposition.fast_random_decomps.cache_clear()  # it caches a copy of the table at the first compilation


def _decompose_once_in_use() -> None:
    if "torch._inductor" in sys.modules:
        decompose_in_inductor()


def _decompose_quantize_dequantize(x: Tensor, scale: float, zero_point: int, bits: int, site: str) -> Tensor:
    q = torch.clamp(torch.round(x / scale) + zero_point, 0, (1 << bits) - 1)
    return (q - zero_point) * scale

"""Convolutions and linear layers over integers with oneDNN, where processors multiply 8-bit values faster than floats.

oneDNN's integer sums are exact. So are sums over fake quantized floats, whose scales have few significant bits, and
both give the same values. This fails on processors whose 8-bit products saturate (x86 without VNNI): a trial
of each kind decides. oneDNN is also wrong for some shapes on some processors (patches of 4 x 4 from 32 channels with
AMX), so that the first result of every shape is compared with that of floats, for two samples.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from infoq_fx.quantization import numerics
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.quantization.quantizers import Quantizer
from infoq_fx.types import QParams

__all__ = [
    "IntegerWeight",
    "QuantizedTensor",
    "can_convolve_integers",
    "can_multiply_integers",
    "compute_layer",
    "find_integer_nodes",
    "quantize_activation",
    "quantize_weight",
]

_CONVOLUTION, _LINEAR = torch.ops.aten.conv2d.default, torch.ops.aten.linear.default
_TOLERANCE = 1e-4
_COMPARED = 2  # samples
_IS_RIGHT: dict[Any, bool] = {}  # whether oneDNN's result was right, by options and shapes


@dataclass(frozen=True)
class QuantizedTensor:
    """An activation as integers: ``q`` is uint8, the real values are ``(q - zero_point) * scale``."""

    q: Tensor
    scale: float
    zero_point: int

    def dequantize(self) -> Tensor:
        """Return the real values, float32."""
        return (self.q.float() - self.zero_point) * self.scale


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as int8 with a scale per channel; ``packed`` caches oneDNN's layouts of it by the layer's options."""

    q: Tensor
    scale: Tensor
    packed: dict[Any, Tensor] = field(default_factory=dict)


def find_integer_nodes(prepared: PreparedModel) -> frozenset[fx.Node]:
    """Find the convolutions and linear layers that can run over integers, and the quantizers that feed only these.

    Both operands must come from quantizers, the input's affine and the weight's per output channel. Kinds of layers
    that the processor cannot run (:func:`can_convolve_integers`, :func:`can_multiply_integers`) are left out.
    """
    if prepared.device.type != "cpu" or not can_convolve_integers():
        return frozenset()
    kinds = {node: module.site.kind for node, module in prepared.quantizer_nodes() if _is_plain(module)}
    layers = {
        node
        for node in prepared.graph_module.graph.nodes
        if (_is_convolution(node) or _is_linear(node))
        and [kinds.get(operand) for operand in node.args[:2]] == ["activation", "weight"]
    }
    feeding = {node for node in kinds if all(user in layers for user in node.users)}
    layers = {node for node in layers if node.args[0] in feeding and node.args[1] in feeding}
    feeding = {node for node in feeding if all(user in layers for user in node.users)}
    return frozenset(layers | feeding)


def quantize_activation(
    x: Tensor, qparams: QParams, *, addend: Tensor | None = None, clip: tuple[float, float] = (-math.inf, math.inf)
) -> QuantizedTensor:
    """Quantize an activation to integers, with the arguments of :func:`numerics.fake_quantize`."""
    q = numerics.quantize_in_one_pass(x, qparams, addend=addend, clip=clip)
    return QuantizedTensor(q, float(qparams.scale.detach()), int(qparams.zero_point))


def quantize_weight(weight: Tensor, qparams: QParams) -> IntegerWeight:
    """Quantize a weight to integers as :func:`numerics.quantize` does; oneDNN takes positive scales."""
    q, scale = numerics.quantize(weight, qparams), qparams.scale.detach()
    if qparams.spec.has_signs:
        sign = scale.sign().to(torch.int8)
        q, scale = q * sign.reshape(-1, *[1] * (q.ndim - 1)), scale.abs()
    return IntegerWeight(q, scale)


def compute_layer(
    node: fx.Node, x: QuantizedTensor | Tensor, weight: IntegerWeight | Tensor, bias: Tensor | None
) -> Tensor:
    """Compute a convolution, channels last, or a linear layer: float32. It runs over integers if both operands are."""
    if isinstance(x, Tensor) or isinstance(weight, Tensor):
        return _compute_floats(node, x, weight, bias)
    shape = _options(node), x.q.shape, weight.q.shape
    if _IS_RIGHT.get(shape, True):
        found = _compute_integers(node, x, weight, bias)
        if shape not in _IS_RIGHT:
            is_batch = x.q.ndim >= weight.q.ndim  # a vector, or an image, may come without samples
            first = slice(_COMPARED if is_batch else None)
            expected = _compute_floats(node, replace(x, q=x.q[first]), weight, bias)
            difference = (found[first] - expected).abs().max()
            _IS_RIGHT[shape] = bool(difference <= _TOLERANCE * expected.abs().max())
        if _IS_RIGHT[shape]:
            return found
    return _compute_floats(node, x, weight, bias)


def _compute_floats(
    node: fx.Node, x: QuantizedTensor | Tensor, weight: IntegerWeight | Tensor, bias: Tensor | None
) -> Tensor:
    real_x = x if isinstance(x, Tensor) else x.dequantize()
    if isinstance(weight, IntegerWeight):
        weight = weight.q.float() * weight.scale.reshape(-1, *[1] * (weight.q.ndim - 1))
    if node.target is _LINEAR:
        return functional.linear(real_x, weight, bias)
    stride, padding, dilation, groups = _options(node)
    real_x = real_x.contiguous(memory_format=torch.channels_last)
    return functional.conv2d(real_x, weight, bias, stride, padding, dilation, groups)


def _compute_integers(node: fx.Node, x: QuantizedTensor, weight: IntegerWeight, bias: Tensor | None) -> Tensor:
    compute = _multiply_integers if node.target is _LINEAR else _convolve_integers
    return compute(node, x, weight, bias)


def _multiply_integers(_: fx.Node, x: QuantizedTensor, weight: IntegerWeight, bias: Tensor | None) -> Tensor:
    if "linear" not in weight.packed:
        weight.packed["linear"] = torch.ops.onednn.qlinear_prepack(weight.q, None)
    rows, no_shift = x.q.reshape(-1, x.q.shape[-1]).contiguous(), torch.zeros(len(weight.scale), dtype=torch.int8)
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        rows, x.scale, x.zero_point, weight.packed["linear"], weight.scale, no_shift, bias,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return y.reshape(*x.q.shape[:-1], -1)


def _convolve_integers(node: fx.Node, x: QuantizedTensor, weight: IntegerWeight, bias: Tensor | None) -> Tensor:
    stride, padding, dilation, groups = _options(node)
    key = x.scale, x.zero_point, stride, padding, dilation, groups, x.q.shape[1:]
    if key not in weight.packed:
        weight.packed[key] = torch.ops.onednn.qconv_prepack(
            weight.q, weight.scale, x.scale, x.zero_point, stride, padding, dilation, groups, list(x.q.shape)
        )
    q = x.q.contiguous(memory_format=torch.channels_last)
    no_shift = torch.zeros(len(weight.scale), dtype=torch.int8)
    y: Tensor = torch.ops.onednn.qconv2d_pointwise(
        q, x.scale, x.zero_point, weight.packed[key], weight.scale, no_shift, bias, stride, padding, dilation, groups,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return y


@functools.lru_cache(maxsize=1)
def can_convolve_integers() -> bool:
    """Return whether oneDNN convolves 8-bit integers exactly here, tried on values that saturate elsewhere."""
    return _is_exact(_CONVOLUTION, (1, 32, 6, 6), (32, 32, 3, 3), (1, 32, 4, 4))


@functools.lru_cache(maxsize=1)
def can_multiply_integers() -> bool:
    """Return whether oneDNN's linear layers are exact here, tried in the same way."""
    return _is_exact(_LINEAR, (4, 288), (32, 288), (4, 32))


def _is_exact(
    target: Any, input_shape: tuple[int, ...], weight_shape: tuple[int, ...], output_shape: tuple[int, ...]
) -> bool:
    q = torch.full(input_shape, 255, dtype=torch.uint8)
    channels, *others = weight_shape
    values = torch.tensor([127, -128], dtype=torch.int8).repeat(channels // 2)
    weight = values.reshape(-1, *[1] * len(others)).expand(weight_shape)
    try:
        graph = fx.Graph()
        node = graph.call_function(target, (graph.placeholder("x"), graph.placeholder("w")))
        with torch.inference_mode():
            weight_and_scale = IntegerWeight(weight.contiguous(), torch.ones(channels))
            found = _compute_integers(node, QuantizedTensor(q, 1.0, 3), weight_and_scale, None)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    expected = values.float().reshape(-1, *[1] * (len(output_shape) - 2)) * (255 - 3) * math.prod(others)
    return bool(torch.equal(found, expected.expand(output_shape)))


def _is_plain(quantizer: Quantizer) -> bool:
    return quantizer.site.kind == "activation" or quantizer.site.channel_axis == 0


def _is_convolution(node: fx.Node) -> bool:
    if node.target is not _CONVOLUTION or len(node.args) < 2 or node.kwargs:
        return False
    return not any(isinstance(value, fx.Node) for option in _options(node)[:3] for value in option)


def _is_linear(node: fx.Node) -> bool:
    return node.target is _LINEAR and len(node.args) >= 2 and not node.kwargs and can_multiply_integers()


def _options(node: fx.Node) -> tuple[Any, ...]:
    """Stride, padding, dilation and groups of a convolution node; nothing of a linear layer."""
    if node.target is _LINEAR:
        return ()
    given: list[Any] = [*node.args[3:]]
    stride, padding, dilation, groups = given + [1, 0, 1, 1][len(given) :]
    return _pair(stride), _pair(padding), _pair(dilation), groups


def _pair(value: Any) -> tuple[Any, Any]:
    first, *others = value if isinstance(value, list | tuple) else [value]
    return first, others[0] if others else first

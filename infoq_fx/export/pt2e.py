"""A quantizer for torchao's PT2E flow, used by ExecuTorch and Inductor, that applies an allocation; needs torchao."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from infoq_fx.conversion.quantized import QuantizedModule, allocation_of, find_wide_weights
from infoq_fx.errors import MissingExtraError, OptionError, UnsupportedModelError, nearest_names
from infoq_fx.graph.clamps import CLAMPS, read_bounds, set_bounds
from infoq_fx.graph.layer_forms.building import arguments_of
from infoq_fx.graph.layer_forms.normal_form import LAYER_FORMS
from infoq_fx.graph.layers import LAYER_OPS, RECURRENT, RECURRENT_OPS, is_call, read_tensor
from infoq_fx.graph.operands import Placement
from infoq_fx.graph.passes.pass_manager import run_passes
from infoq_fx.graph.sites import find_sites
from infoq_fx.quantization import numerics
from infoq_fx.quantization.custom_ops import dequantize_op, quantize_dequantize_op
from infoq_fx.quantization.quantizers import spec_of
from infoq_fx.quantization.weight_qparams import choose_weight_qparams
from infoq_fx.types import FLOAT16_BITS, MAX_BITS, Allocation, check_bits

_TORCH_LOG = logging.getLogger("torch.utils._pytree")


def _is_of_others(record: logging.LogRecord) -> bool:
    """Whether a line is not what torch logs as torchao, not its user, registers an Enum."""
    return "is an Enum subclass" not in str(record.msg)


_TORCH_LOG.addFilter(_is_of_others)
try:
    from torchao.quantization.pt2e.observer import HistogramObserver, PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantizer import (
        FixedQParamsQuantizationSpec,
        QuantizationAnnotation,
        QuantizationSpec,
        QuantizationSpecBase,
        Quantizer,
    )
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY
except ImportError as missing:
    raise MissingExtraError(f'InfoqQuantizer needs torchao ({missing}): pip install "infoq-fx[torchao]"') from missing
finally:
    _TORCH_LOG.removeFilter(_is_of_others)

__all__ = ["InfoqQuantizer"]

_ATEN = torch.ops.aten
_OUT_OF_PLACE = {
    _ATEN.add_.Tensor: _ATEN.add.Tensor,
    _ATEN.relu_.default: _ATEN.relu.default,
    _ATEN.hardtanh_.default: _ATEN.hardtanh.default,
    _ATEN.clamp_.default: _ATEN.clamp.default,
    _ATEN.relu6_.default: _ATEN.relu6.default,
}
_FIXED_OUTPUT = ".output"  # part of the names of sites with fixed bits


class InfoqQuantizer(Quantizer):  # type: ignore[misc]  # torchao carries no types
    """Annotates every site of an allocation: ``prepare_pt2e(exported_module, InfoqQuantizer(allocation))``.

    Weights are int8 within the range of their bits (at 4 bits from -8 to 7), symmetric per output channel, with the
    scales of least squared error, as elsewhere in this package. Activations are affine per tensor, observed by a
    histogram. Biases, and layers that the allocation does not contain, stay in float. Weights of a quantized module
    with codebooks or mirrored ranges are declared to have 8 bits, which hold them, and a warning says so: kernels of
    fewer bits need ``quantize(..., levels="uniform")``.

    Args:
        source: bit-widths by site name; or a quantized module, whose weights (recovered ones included), biases and
            ranges are then used: the model that torchao converts computes the same as that module.
        activation_dtype: of the integers, ``torch.int8`` (ExecuTorch) or ``torch.uint8`` (Inductor on x86).
        output_bits: if given, the output of a layer that is followed by no site (a classifier) is quantized to this
            many bits; integer kernels of ExecuTorch's XNNPACK require 8.
        convolution_bits: if given, the weights of convolutions are declared to have this many bits, though their
            integers stay within the range of their own bits: XNNPACK requires 8, and has 4 bits for linear layers only.

    Raises:
        OptionError: an argument cannot be used. ``prepare_pt2e`` raises it for an allocation of another model.
    """

    def __init__(
        self,
        source: Allocation | QuantizedModule,
        *,
        activation_dtype: torch.dtype = torch.int8,
        output_bits: int | None = None,
        convolution_bits: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(source, Allocation | QuantizedModule):
            raise OptionError(
                f"InfoqQuantizer() got a {type(source).__name__}; give an Allocation or what quantize() returned"
            )
        if activation_dtype not in (torch.int8, torch.uint8):
            raise OptionError(f"activation_dtype is {activation_dtype}; give torch.int8 or torch.uint8")
        self.allocation = source if isinstance(source, Allocation) else allocation_of(source)
        self._known = _Known({}, {}, ()) if isinstance(source, Allocation) else _read_quantized(source)
        if self._known.wide_weights:
            logging.getLogger(__name__).warning(
                "%d weights have codebooks or mirrored ranges and are declared to have 8 bits; for kernels of fewer "
                'bits quantize with levels="uniform"',
                len(self._known.wide_weights),
            )
        for name, option in (("output_bits", output_bits), ("convolution_bits", convolution_bits)):
            if option is not None:
                check_bits(option, name)
        self._is_signed = activation_dtype == torch.int8
        self._output_bits, self._convolution_bits = output_bits, convolution_bits
        self._observed: dict[int, QuantizationSpecBase] = {}

    def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
        """Bring the graph into the form that sites are found in, and set the quantized module's weights.

        In-place operations become out-of-place ones if that is safe; recurrent layers, bags of embeddings and products
        with parameters are written as when the allocation was made.
        """
        run_passes(model, LAYER_FORMS)
        for node in model.graph.nodes:
            if node.target in _OUT_OF_PLACE and len(node.args[0].users) == 1:
                node.target = _OUT_OF_PLACE[node.target]
            op = LAYER_OPS.get(node.target)
            for weight in _weights_of(node):
                layer = self._known.layers.get(str(getattr(weight, "target", None)))
                if layer is None:
                    continue
                _put(model, weight, layer.weight)
                bias = None if op is None else op.bias_of(node)
                if layer.bias is not None and isinstance(bias, fx.Node) and bias.op == "get_attr":
                    _put(model, bias, layer.bias)
        if self._known.layers:
            _take_bounds(model, self._known.bounds)
        model.recompile()
        return model

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Annotate every edge into a layer, and every tensor that integer kernels need, with the bits of its site.

        Tensors in float (16 bits) are left alone.
        """
        bits = self.allocation.bits
        plan = find_sites(model, _example_inputs(model), bits=(MAX_BITS,), activation_bits=(MAX_BITS,))
        self._check({placement.site.name for placement in plan.placements})
        known = _match_ranges(plan.placements, self._known.activations)
        for placement in plan.placements:
            site = placement.site
            if bits.get(site.name) == FLOAT16_BITS or (site.is_searched and site.name not in bits):
                continue
            if site.kind == "weight":
                spec = self._weight_spec(model, placement)
            else:
                spec = self._activation_spec(bits.get(site.name, MAX_BITS), known.get(placement.node))
            for user in placement.users:
                _annotation(user).input_qspec_map[placement.node] = spec
        if self._output_bits is not None:
            self._annotate_outputs(model)
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Do nothing; ``annotate`` raises an error for whatever cannot be annotated."""

    def _check(self, sites: set[str]) -> None:
        chosen = [name for name in self.allocation.bits if _FIXED_OUTPUT not in name]
        missing = [name for name in chosen if name not in sites]
        if missing:
            raise OptionError(
                f"{len(missing)} of {len(chosen)} sites of the allocation are not in this model, as {missing[0]!r}; "
                f"give one of this model; nearest there: {nearest_names(missing[0], sites)}"
            )

    def _weight_spec(self, model: fx.GraphModule, placement: Placement) -> QuantizationSpecBase:
        site = placement.site
        spec = declared = spec_of(site, self.allocation.bits[site.name])
        layer = self._known.layers.get(site.name)
        if site.name in self._known.wide_weights:
            spec = declared = replace(spec, bits=MAX_BITS)
        weight = read_tensor(model, placement.node)
        qparams = choose_weight_qparams(weight, spec)
        if layer is not None:
            qparams = replace(qparams, scale=layer.scale.abs())
        op = LAYER_OPS.get(placement.users[0].target)
        if self._convolution_bits is not None and op is not None and op.is_convolution:
            declared = replace(spec, bits=max(spec.bits, self._convolution_bits))
            # Clip here, since the declared range no longer does.
            _put(model, placement.node, numerics.fake_quantize(weight, qparams))
        return QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=_FixedPerChannelObserver.with_args(scale=qparams.scale),
            quant_min=declared.quant_min,
            quant_max=declared.quant_max,
            qscheme=torch.per_channel_symmetric,
            ch_axis=site.channel_axis,
        )

    def _activation_spec(self, bits: int, known: tuple[float, int] | None) -> QuantizationSpecBase:
        shift = 1 << (bits - 1) if self._is_signed else 0
        options: dict[str, Any] = {
            "dtype": torch.int8 if self._is_signed else torch.uint8,
            "quant_min": -shift,
            "quant_max": (1 << bits) - 1 - shift,
            "qscheme": torch.per_tensor_affine,
        }
        if known is not None:
            scale, zero_point = known
            return FixedQParamsQuantizationSpec(scale=scale, zero_point=zero_point - shift, **options)
        if bits not in self._observed:  # one spec object per bit-width, so that readers of a tensor share an observer
            observer = HistogramObserver.with_args(eps=2**-12)
            self._observed[bits] = QuantizationSpec(observer_or_fake_quant_ctr=observer, **options)
        return self._observed[bits]

    def _annotate_outputs(self, model: fx.GraphModule) -> None:
        assert self._output_bits is not None
        for node in model.graph.nodes:
            is_layer = node.target in LAYER_OPS and Q_ANNOTATION_KEY in node.meta
            read = [Q_ANNOTATION_KEY in u.meta and node in u.meta[Q_ANNOTATION_KEY].input_qspec_map for u in node.users]
            activated = any(user.target in _OUT_OF_PLACE.values() for user in node.users)
            if is_layer and not any(read) and not activated:
                _annotation(node).output_qspec = self._activation_spec(self._output_bits, None)


class _FixedPerChannelObserver(PerChannelMinMaxObserver):  # type: ignore[misc]
    """An observer that returns known scales ``[channels]``.

    torchao passes the channel axis only to classes that have "PerChannel" in their name.
    """

    def __init__(self, *, scale: Tensor, **options: Any) -> None:
        super().__init__(**options)
        self._scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self._scale, torch.zeros_like(self._scale, dtype=torch.int64)


@dataclass(frozen=True)
class _Layer:
    """Dequantized weight and bias of a quantized layer, and the weight's scales."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class _Known:
    """Layers by weight site, (scale, zero point) of unsigned activations by site, bounds of clamps in graph order.

    ``wide_weights`` are the sites of weights that need 8 bits.

    The weights contain factors from scale equalization, which the bounds of clamps between them must include.
    """

    layers: Mapping[str, _Layer]
    activations: Mapping[str, tuple[float, int]]
    bounds: Sequence[tuple[Any, Any]]
    wide_weights: Sequence[str] = ()


def _read_quantized(quantized: QuantizedModule) -> _Known:
    layers, activations = {}, {}
    for node in quantized.graph.nodes:
        op, arguments = LAYER_OPS.get(node.target), node.args
        if node.target is quantize_dequantize_op:
            activations[str(arguments[4])] = float(arguments[1]), int(arguments[2])
        for weight in _weights_of(node):
            if is_call(weight, dequantize_op):
                layers[str(weight.args[4])] = _Layer(
                    _dequantized(quantized, weight),
                    read_tensor(quantized, weight.args[1]),
                    None if op is None else _bias(quantized, op.bias_of(node)),
                )
    bounds = [read_bounds(node) for node in quantized.graph.nodes if node.target in CLAMPS]
    return _Known(layers, activations, bounds, find_wide_weights(quantized))


def _weights_of(node: fx.Node) -> list[Any]:
    """The operands in the places of weights: one of a layer, all parameters of a recurrent one."""
    op, arguments = LAYER_OPS.get(node.target), arguments_of(node)
    if node.target in RECURRENT_OPS:
        return list(arguments[RECURRENT.weight])
    return [] if op is None else [arguments[op.weight]]


def _take_bounds(model: fx.GraphModule, bounds: Sequence[tuple[Any, Any]]) -> None:
    clamps = [node for node in model.graph.nodes if node.target in CLAMPS]
    if len(clamps) != len(bounds):
        raise OptionError(
            f"{len(clamps)} clamps are in this model, {len(bounds)} in the quantized module; "
            "prepare the model that it was made from"
        )
    for node, (low, high) in zip(clamps, bounds, strict=True):
        if (low, high) != read_bounds(node):
            set_bounds(node, low, high)


def _match_ranges(
    placements: Iterable[Placement], ranges: Mapping[str, tuple[float, int]]
) -> dict[fx.Node, tuple[float, int]]:
    """Known ranges by node. Names that contain a node's number are compared without it if that is unambiguous."""
    ours, theirs = [p for p in placements if p.site.kind == "activation"], Counter(map(_without_number, ranges))
    plain = {_without_number(name): found for name, found in ranges.items() if theirs[_without_number(name)] == 1}
    counts = Counter(_without_number(p.site.name) for p in ours)
    matched = {}
    for placement in ours:
        name = _without_number(placement.site.name)
        if placement.site.name in ranges:
            matched[placement.node] = ranges[placement.site.name]
        elif name in plain and counts[name] == 1:
            matched.setdefault(placement.node, plain[name])
    return matched


def _without_number(name: str) -> str:
    return re.sub(r"_\d*(?=\.output)", "", name)


def _bias(quantized: QuantizedModule, bias: Any) -> Tensor | None:
    if not isinstance(bias, fx.Node):
        return None
    return _dequantized(quantized, bias) if bias.target is dequantize_op else read_tensor(quantized, bias)


def _dequantized(quantized: QuantizedModule, node: fx.Node) -> Tensor:
    arguments: Any = node.args
    source, scale, *rest = arguments
    value: Tensor = dequantize_op(read_tensor(quantized, source), read_tensor(quantized, scale), *rest)
    return value


def _put(model: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    """Replace a parameter; the model that was exported keeps its own."""
    owner_path, _, name = str(node.target).rpartition(".")
    owner = model.get_submodule(owner_path)
    held = read_tensor(model, node)
    if held.shape != value.shape:
        raise OptionError(
            f"{node.target!r} is {list(held.shape)} here, {list(value.shape)} in the quantized module; "
            "prepare the model that it was made from"
        )
    if name in dict(owner.named_buffers(recurse=False)):
        owner.register_buffer(name, value.to(held.device))
    else:
        setattr(owner, name, nn.Parameter(value.to(held.device), requires_grad=False))


def _annotation(node: fx.Node) -> Any:
    return node.meta.setdefault(Q_ANNOTATION_KEY, QuantizationAnnotation(_annotated=True))


def _example_inputs(model: fx.GraphModule) -> dict[str, Tensor]:
    """Zeros in the shapes that the model was exported with; the run only records shapes."""
    examples = {}
    for node in model.graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            raise UnsupportedModelError(f"input {node.target!r} has no shape: export the model with torch.export first")
        sizes = [size if isinstance(size, int) else int(size.node.hint or 2) for size in value.shape]
        examples[str(node.target)] = torch.zeros(sizes, dtype=value.dtype, device=value.device)
    return examples

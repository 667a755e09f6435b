"""Converts a quantized module to a trainable one and back."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from infoq_fx.conversion.quantized import Provenance, QuantizedModule, provenance_of, wrap_quantized
from infoq_fx.errors import OptionError
from infoq_fx.finetuning.trainable import LearnedStepQuantizer, make_trainable, usable_step
from infoq_fx.graph.layers import LAYER_OPS, free_path, read_tensor, write_tensor
from infoq_fx.graph.passes.quantize_biases import fit_weight_scale
from infoq_fx.graph.program.graph_interpreter import GraphInterpreter
from infoq_fx.quantization.codebooks import bias_multiple, read_codebook
from infoq_fx.quantization.custom_ops import dequantize_op, quantize_dequantize_op
from infoq_fx.quantization.histogram import range_bits, scale_significant_bits, significant_bits_of
from infoq_fx.quantization.numerics import quantize
from infoq_fx.quantization.quantizers import spec_of
from infoq_fx.quantization.weight_qparams import choose_weight_qparams
from infoq_fx.types import FLOAT16_BITS, FLOAT_BITS, QParams, QuantSite

__all__ = ["BiasQuantizer", "TrainableModule", "to_quantized", "to_trainable"]

_META_KEY = "infoq_trainable"
_FLOAT_TWIN = re.compile(r"(.*)_float(_\d+)*")  # what conversion calls a weight for its readers in float


@dataclass(frozen=True)
class _Origin:
    """The quantized module that a trainable one was made from; immutable, so that copies share it."""

    quantized: QuantizedModule
    provenance: Provenance

    def __deepcopy__(self, memo: dict[int, Any]) -> _Origin:
        return self


class TrainableModule(fx.GraphModule):
    """A quantized graph with float parameters and learned step sizes; pickle and deepcopy keep its origin."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        build, arguments = super().__reduce__()
        return _rebuild, (build, arguments, self.meta[_META_KEY])


class BiasQuantizer(nn.Module):
    """Rounds a bias as its layer's accumulator does, to multiples of the input's step size times the weight's.

    The bias's gradient passes straight through; the step sizes get no gradient from it. ``multiple`` is relative to the
    parameters ``scale`` of both, see :class:`LearnedStepQuantizer`.
    """

    def __init__(self, name: str, input_digits: int | None, weight_digits: int | None, multiple: float = 1) -> None:
        super().__init__()
        self.name, self.multiple = name, multiple
        self._input_digits, self._weight_digits = input_digits, weight_digits

    def forward(
        self, bias: Tensor, input_scale: Tensor, input_smallest: Tensor, weight_scale: Tensor, weight_smallest: Tensor
    ) -> Tensor:
        """Round ``bias [channels]`` by the learned step sizes of its layer's input ``[]`` and weight ``[channels]``."""
        input_step = usable_step(input_scale.detach(), input_smallest, self._input_digits)
        step = usable_step(weight_scale.detach(), weight_smallest, self._weight_digits) * input_step * self.multiple
        return torch.round(bias.detach() / step) * step + (bias - bias.detach())

    def extra_repr(self) -> str:
        """Return the bias's path for the printed module."""
        return self.name


def to_trainable(quantized: nn.Module) -> TrainableModule:
    """Convert a quantized module to a trainable one, for :func:`infoq_fx.finetune` or a training loop of your own.

    Weights and biases are float parameters under their own paths, quantized in each forward pass by step sizes that
    are parameters too (LSQ). Float parameters stay float and are trained as well. Zero points are fixed. Step sizes
    are rounded to as few significant bits as exported files have, and biases to multiples of the accumulator's unit:
    the trained model is the exported one. Before the first update it computes the same as the quantized module.

    It works with any optimizer and with ``torch.compile``, and keeps what :func:`to_quantized` needs through
    deepcopy, pickle and a state dict.

    Args:
        quantized: what :func:`infoq_fx.quantize` or :func:`infoq_fx.convert` returned, or a copy of it, or a module
            loaded from a file. It is not changed.

    Raises:
        OptionError: the module is not a quantized module.

    Reference:
        "Learned Step Size Quantization", arXiv 1902.08153.
    """
    provenance = provenance_of(quantized)
    if not isinstance(quantized, QuantizedModule) or provenance is None:
        found = type(quantized).__name__
        raise OptionError(f"to_trainable() got a {found}; pass what quantize(), convert() or to_quantized() returned")
    with torch.inference_mode(False), torch.enable_grad():
        origin = _Origin(copy.deepcopy(quantized), provenance)
        draft, shapes = copy.deepcopy(quantized), _sample_shapes(quantized, provenance)
        for learn in (_learn_activation, _learn_weight, _learn_bias):
            for node in list(draft.graph.nodes):
                learn(draft, node, shapes)
        weights = {node.args[0].target for node in origin.quantized.graph.nodes if _is_weight(node)}
        targets = {str(node.target) for node in draft.graph.nodes if node.op == "get_attr"}
        module = _wrap(draft, origin)
        named = {target: _FLOAT_TWIN.fullmatch(target) for target in targets}
        make_trainable(module, {target for target, twin in named.items() if twin and twin[1] in weights})
    return module


def to_quantized(trained: nn.Module) -> QuantizedModule:
    """Convert a trained module to a quantized one: new integers, scales and biases, same bit-widths and graph.

    Args:
        trained: what :func:`to_trainable` returned, trained in any way; also compiled or wrapped for several devices.
            It is not changed.

    Returns:
        The quantized module, on the device of the parameters.

    Raises:
        OptionError: the module is of another kind, or a parameter is NaN or infinite.
    """
    found = trained
    while not isinstance(found, TrainableModule):
        inner = getattr(found, "_orig_mod", getattr(found, "module", None))
        if not isinstance(inner, nn.Module):
            raise OptionError(f"to_quantized() got a {type(trained).__name__}; pass what to_trainable() returned")
        found = inner
    for name, parameter in found.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise OptionError(
                f"parameter {name!r} holds NaN or infinity: the training diverged; lower its learning rate, clip its "
                "gradients, or go back to an earlier state"
            )
    with torch.inference_mode(False), torch.no_grad():
        return _write_back(found)


def _wrap(graph_module: fx.GraphModule, origin: _Origin) -> TrainableModule:
    module = TrainableModule(graph_module, graph_module.graph, class_name="TrainableModule")
    module.meta[_META_KEY] = origin
    return module


def _rebuild(build: Callable[..., fx.GraphModule], arguments: tuple[Any, ...], origin: _Origin) -> TrainableModule:
    return _wrap(build(*arguments), origin)


def _is_weight(node: fx.Node) -> bool:
    return node.target is dequantize_op and bool(node.args[3] != FLOAT_BITS)


class _ShapeRecorder(GraphInterpreter):
    """Runs the graph and records the shape of every quantized activation, by site."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is quantize_dequantize_op:
            self.shapes[args[4]] = tuple(args[0].shape)
        return super().call_function(target, args, kwargs)


def _sample_shapes(quantized: QuantizedModule, provenance: Provenance) -> dict[str, tuple[int, ...]]:
    """Shapes of every activation for one sample; for tensors without a batch dimension only the size matters."""
    device = _device_of(quantized)
    recorder = _ShapeRecorder(quantized)
    with torch.no_grad():
        recorder.run(*(x.to(device) for x in provenance.example_inputs.values()))
    samples = next((x.shape[0] for x in provenance.example_inputs.values() if x.ndim), 1)
    return {
        site: shape[1:] if shape[:1] == (samples,) else (max(1, math.prod(shape) // samples),)
        for site, shape in recorder.shapes.items()
    }


def _device_of(quantized: QuantizedModule) -> torch.device:
    return next((tensor.device for tensor in quantized.buffers()), torch.device("cpu"))


def _replace(draft: fx.GraphModule, node: fx.Node, name: str, module: nn.Module, operands: tuple[fx.Node, ...]) -> None:
    path = free_path(draft, f"quantizers.{name}.quantizer")
    draft.add_submodule(path, module)
    with draft.graph.inserting_before(node):
        learned = draft.graph.call_module(path, operands)
    learned.meta = {key: value for key, value in node.meta.items() if key == "val"}
    node.replace_all_uses_with(learned)
    draft.graph.erase_node(node)


def _learn_activation(draft: QuantizedModule, node: fx.Node, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if node.target is not quantize_dequantize_op:
        return
    arguments: Any = node.args
    source, scale, zero_point, bits, name = arguments
    site, device = QuantSite(name, "activation", shapes[name], (bits,)), _device_of(draft)
    step = torch.tensor(scale, dtype=torch.float32, device=device)
    qparams = QParams(spec_of(site, bits), step, torch.tensor(zero_point, dtype=torch.int32, device=device))
    # A power of two stays one, so that integer kernels are exact.
    digits = 1 if significant_bits_of(scale) == 1 else scale_significant_bits(bits, is_weight=False)
    learned = LearnedStepQuantizer(site, qparams, digits)
    _replace(draft, node, name, learned, (source,))


def _learn_weight(draft: QuantizedModule, node: fx.Node, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if not _is_weight(node):
        return
    arguments: Any = node.args
    source, scale_node, axis, bits, name = arguments
    integers, scale = read_tensor(draft, source), read_tensor(draft, scale_node)
    site = QuantSite(name, "weight", tuple(integers.shape), (bits,), axis)
    levels = read_codebook(integers, bits)
    spec = replace(spec_of(site, bits), has_codebook=levels is not None)
    qparams = QParams(spec, scale, torch.zeros_like(scale, dtype=torch.int32), levels)
    write_tensor(draft, str(source.target), dequantize_op(integers, scale, axis, bits, name))
    if qparams.spec.is_float:
        node.replace_all_uses_with(source)
        draft.graph.erase_node(node)
        return
    terms, width = max(1, integers.numel() // integers.shape[axis]), range_bits(qparams.spec)
    digits = scale_significant_bits(width, is_weight=True, terms=terms, of_input=_digits_met(draft, node))
    _replace(draft, node, name, LearnedStepQuantizer(site, qparams, digits), (source,))


def _digits_met(draft: QuantizedModule, node: fx.Node) -> int | None:
    """Significant bits that the scales of a weight's inputs may have; None if an input is not quantized."""
    most = 0
    for layer in node.users:
        source: Any = layer.args[LAYER_OPS[layer.target].source] if layer.target in LAYER_OPS else None
        is_module = source is not None and source.op == "call_module"
        module = draft.get_submodule(str(source.target)) if is_module else None
        if not isinstance(module, LearnedStepQuantizer) or module.significant_bits is None:
            return None
        most = max(most, module.significant_bits)
    return most


def _learn_bias(draft: QuantizedModule, node: fx.Node, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if node.target is not dequantize_op:
        return
    arguments: Any = node.args
    source, scale, *rest = arguments
    target = str(source.target)
    write_tensor(draft, target, dequantize_op(read_tensor(draft, source), read_tensor(draft, scale), *rest))
    (layer,) = node.users
    op, operands, digits = LAYER_OPS[layer.target], [source], []
    for operand in (layer.args[op.source], layer.args[op.weight]):
        assert isinstance(operand, fx.Node)
        quantizer = draft.get_submodule(str(operand.target))
        assert isinstance(quantizer, LearnedStepQuantizer)
        digits.append(quantizer.significant_bits)
        # Those of the weight, the last one, remain.
        multiple = bias_multiple(quantizer.qparams().levels, quantizer.spec.bits) / quantizer.level_unit
        with draft.graph.inserting_before(node):
            operands += [draft.graph.get_attr(f"{operand.target}.{name}") for name in ("scale", "smallest")]
    _replace(draft, node, target, BiasQuantizer(target, digits[0], digits[1], multiple), tuple(operands))


def _write_back(trained: TrainableModule) -> QuantizedModule:
    origin: _Origin = trained.meta[_META_KEY]
    result = copy.deepcopy(origin.quantized)
    quantizers = [found for found in trained.modules() if isinstance(found, LearnedStepQuantizer)]
    learned = {found.site.name: found.qparams() for found in quantizers}
    values = {name: parameter.detach().float() for name, parameter in trained.named_parameters()}
    device = next(iter(values.values())).device
    result.to(device)
    # Activations first: the scale of a bias, and sometimes that of a weight, depends on its layer's input.
    for node in result.graph.nodes:
        if node.target is quantize_dequantize_op:
            found = learned[str(node.args[4])]
            node.args = (node.args[0], float(found.scale), int(found.zero_point), *node.args[3:])
    for node in result.graph.nodes:
        if _is_weight(node) and node.args[3] == FLOAT16_BITS:
            _write_float16(result, node, values)
        elif _is_weight(node):
            _write_weight(result, node, learned[str(node.args[4])], values)
    quantized = {node.args[0].target for node in result.graph.nodes if node.target is dequantize_op}
    for node in result.graph.nodes:
        if node.op == "get_attr" and node.target in values and node.target not in quantized:
            _write_float(result, str(node.target), values[str(node.target)])
    result.recompile()
    examples = {name: x.to(device) for name, x in origin.provenance.example_inputs.items()}
    return wrap_quantized(result, replace(origin.provenance, example_inputs=examples))


def _write_weight(result: QuantizedModule, node: fx.Node, qparams: QParams, values: Mapping[str, Tensor]) -> None:
    """Integers and scales of a weight, and of the biases of its layers."""
    source, scale_node = (str(operand.target) for operand in node.all_input_nodes)
    scale, biases = qparams.scale, []
    for layer in node.users:
        op = LAYER_OPS.get(layer.target)
        if op is None:
            continue  # a recurrent layer, whose biases are in float
        bias, operand = op.bias_of(layer), layer.args[op.source]
        if isinstance(bias, fx.Node) and bias.target is dequantize_op and isinstance(operand, fx.Node):
            constants: Any = operand.args
            input_scale, targets = constants[1], [str(x.target) for x in bias.all_input_nodes]
            biases.append((input_scale, targets))
    # Channels of zeros keep the step sizes that they were trained with.
    scale = fit_weight_scale(scale, [(values[bias_target], step) for step, (bias_target, _) in biases])
    write_tensor(result, source, quantize(values[source], replace(qparams, scale=scale)))
    write_tensor(result, scale_node, scale)
    for input_scale, (bias_target, step_target) in biases:
        step, multiple = scale * input_scale, bias_multiple(qparams.levels, qparams.spec.bits)
        integers = torch.round(values[bias_target].double() / (multiple * step.double())).to(torch.int32) * multiple
        write_tensor(result, bias_target, integers)
        write_tensor(result, step_target, step)


def _write_float16(result: QuantizedModule, node: fx.Node, values: Mapping[str, Tensor]) -> None:
    arguments: Any = node.args
    source, _, axis, bits, name = arguments
    value = values[str(source.target)]
    site = QuantSite(name, "weight", tuple(value.shape), (bits,), axis)
    qparams = choose_weight_qparams(value, spec_of(site, bits))
    write_tensor(result, str(source.target), quantize(value, qparams))
    write_tensor(result, str(arguments[1].target), qparams.scale)


def _write_float(result: QuantizedModule, target: str, value: Tensor) -> None:
    path, _, name = target.rpartition(".")
    owner = result.get_submodule(path)
    if isinstance(getattr(owner, name), nn.Parameter):
        owner.register_parameter(name, nn.Parameter(value.clone(), requires_grad=False))
    else:
        owner.register_buffer(name, value.clone())

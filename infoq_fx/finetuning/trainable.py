"""Makes trainable copies of a prepared model: in float, or with learned step sizes at its sites.

The prepared model is not changed. Quantizers and parameters keep their paths, so that trained values can be copied
back.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from infoq_fx.core.jit import jit
from infoq_fx.errors import OptionError, unknown_name_error
from infoq_fx.graph.layers import LAYER_OPS, RECURRENT_OPS, read_tensor
from infoq_fx.quantization.codebooks import find_places
from infoq_fx.quantization.numerics import flat_view, keep_size
from infoq_fx.quantization.pointwise import fake_quantize_flat
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.quantization.quantizers import Observe, Quantizer
from infoq_fx.types import LARGEST_LEVEL, QParams, QuantSite

__all__ = [
    "LearnedStepQuantizer",
    "copy_with",
    "float_copy",
    "make_trainable",
    "trainable_copy",
    "usable_levels",
    "usable_step",
    "weights_by_site",
]

_SMALLEST_SHARE = 2.0**-10


class LearnedStepQuantizer(nn.Module):
    """Fake quantization of one site at one bit-width with a learned step size (LSQ).

    The step size ``scale`` is the only parameter, per channel or per tensor as in the qparams; the zero point is fixed.
    Its gradient is divided by sqrt(N * Q_P), with N the number of values that share a step size (of one sample, for an
    activation) and Q_P the number of levels above zero. The input's gradient passes straight through inside the range.
    A step size is never used below 1/1024 of its initial value, so that it keeps its sign and can grow again.

    The levels of a codebook are a second parameter, ``levels [n]``, in units of ``level_unit``; they are used rounded
    to integers. The gradient of a level is that of all values rounded to it, divided like that of the step size. The
    parameter ``scale`` is then the step size times ``level_unit``, about the distance of two neighbouring levels: one
    learning rate suits both kinds of quantizers.

    Args:
        site: of the quantizer.
        qparams: initial values; all channels have the same zero point.
        significant_bits: the step size is rounded to this many bits, with a straight-through gradient; see
            :func:`infoq_fx.quantization.histogram.scale_significant_bits`. None does not round it.

    Reference:
        "Learned Step Size Quantization", arXiv 1902.08153, Eq. 1 to 5 and Section 2.2; levels that are learned for a
        whole layer are those of "LQ-Nets", arXiv 1807.10029, there as sums of a basis and by least squares.
    """

    zero_point: Tensor
    smallest: Tensor

    def __init__(self, site: QuantSite, qparams: QParams, significant_bits: int | None = None) -> None:
        super().__init__()
        self.site, self.spec, self.significant_bits = site, qparams.spec, significant_bits
        has_levels = qparams.levels is not None
        self.level_unit = choose_level_unit(len(qparams.levels)) if has_levels else 1.0  # type: ignore[arg-type]
        scale = self.level_unit * qparams.scale.detach()
        self.scale = nn.Parameter(scale)
        self.register_buffer("zero_point", qparams.zero_point.detach().clone())
        self.register_buffer("smallest", _SMALLEST_SHARE * scale)
        levels = None if qparams.levels is None else qparams.levels.detach().to(torch.float32) / self.level_unit
        self.levels = None if levels is None else nn.Parameter(levels)
        self._read_zero_point()
        self.gradient_scale = 1 / math.sqrt(max(1, site.numel // scale.numel()) * max(1, self._limits[1]))

    def forward(self, x: Tensor) -> Tensor:
        """Fake quantize ``x`` (any shape for an activation, the weight's for a weight)."""
        if self.levels is not None:
            gap = usable_step(self.scale, self.smallest, self.significant_bits).detach()
            z: Tensor = _RoundToLevels.apply(
                x, self.scale, gap, self.levels, self.level_unit, self.gradient_scale, self.spec.channel_axis
            )
            return z
        y: Tensor = _FakeQuantize.apply(
            x,
            self.scale,
            self.smallest,
            self.significant_bits,
            self.gradient_scale,
            self.spec.channel_axis,
            *self._limits,
        )
        return y

    def qparams(self) -> QParams:
        """Return the qparams learned so far, detached."""
        scale = usable_step(self.scale.detach(), self.smallest, self.significant_bits) / self.level_unit
        levels = None if self.levels is None else usable_levels(self.level_unit * self.levels.detach()).to(torch.int8)
        return QParams(self.spec, scale, self.zero_point.clone(), levels)

    def extra_repr(self) -> str:
        """Return site and bit-width for the printed module."""
        return f"{self.site.name}, bits={self.spec.bits}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read_zero_point()

    def _read_zero_point(self) -> None:
        # Python numbers: operations with them take one pass, and no forward pass synchronizes with the device.
        zero_point = int(self.zero_point.flatten()[0])
        self._limits = self.spec.quant_min - zero_point, self.spec.quant_max - zero_point


def usable_step(scale: Tensor, smallest: Tensor, significant_bits: int | None) -> Tensor:
    """Return a learned step size as it is used: at least ``smallest`` in size, rounded to ``significant_bits``."""
    step = keep_size(scale, smallest).float()
    if significant_bits is None:
        return step
    # As numerics.shorten_scale, but on the bits of the float, with half as many operations.
    dropped = 24 - significant_bits
    return ((step.view(torch.int32) + (1 << (dropped - 1))) >> dropped << dropped).view(torch.float32)


def choose_level_unit(count: int) -> float:
    """Return the power of two nearest to the mean distance of ``count`` levels; it scales float numbers exactly."""
    return 2.0 ** round(math.log2(2 * LARGEST_LEVEL / max(1, count - 1)))


def usable_levels(levels: Tensor) -> Tensor:
    """Return learned levels as they are used: integers of the codebook's range, ascending."""
    return levels.round().clamp(-LARGEST_LEVEL, LARGEST_LEVEL).sort().values


def float_copy(prepared: PreparedModel) -> fx.GraphModule:
    """Return a trainable copy of the float model, without quantizers and observers."""
    return copy_with(prepared, lambda quantizer: None)


def trainable_copy(
    prepared: PreparedModel,
    bits: Mapping[str, int] | None = None,
    qparams: Mapping[str, QParams] | None = None,
) -> fx.GraphModule:
    """Return a trainable copy of the quantized model with learned step sizes at all sites.

    Before the first update it computes the same as the prepared model at these bit-widths.

    Args:
        prepared: calibrated.
        bits: bit-width by site; sites that are not named are at 8 bits.
        qparams: initial qparams of some sites, in place of the calibrated ones.

    Raises:
        OptionError: a site is unknown, or was not calibrated for its bit-width.
    """
    chosen, given = bits or {}, qparams or {}
    known = {quantizer.site.name: quantizer for _, quantizer in prepared.quantizer_nodes()}
    for name in [*chosen, *given]:
        if name not in known:
            raise unknown_name_error("site", name, known)

    def make(quantizer: Quantizer) -> nn.Module | None:
        site = quantizer.site
        if site.name in given:
            return LearnedStepQuantizer(site, given[site.name])
        width = chosen.get(site.name, site.baseline_bits)
        if width not in quantizer.calibrated_bits:
            raise OptionError(
                f"bits[{site.name!r}]={width}: it was calibrated for {quantizer.calibrated_bits}; take one of those, "
                "or give qparams for it"
            )
        qparams = quantizer.qparams_at(width)
        return None if qparams.spec.is_float else LearnedStepQuantizer(site, qparams)

    return copy_with(prepared, make)


def copy_with(prepared: PreparedModel, make: Callable[[Quantizer], nn.Module | None]) -> fx.GraphModule:
    """Return a copy whose quantizers are replaced by the result of ``make``, or removed if it is None.

    The parameters that the graph reads are trainable, and the weights and biases of its layers, which folding may have
    turned into buffers. Statistics and other constants are not trainable.
    """
    with torch.inference_mode(False), torch.enable_grad():
        module = copy.deepcopy(prepared.graph_module)
        for node in list(module.graph.nodes):
            if node.op == "call_module":
                _replace_module(module, node, make)
        module.delete_all_unused_submodules()
        module.graph.lint()
        module.recompile()
        make_trainable(module)
    return module


def make_trainable(module: fx.GraphModule, others: Iterable[str] = ()) -> None:
    """Turn the trainable tensors, see :func:`copy_with`, and ``others`` at these paths into parameters."""
    for name in _trainable_targets(module).union(others):
        _make_parameter(module, name)


def weights_by_site(prepared: PreparedModel, copied: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a copy by weight site, in graph order."""
    return {
        quantizer.site.name: copied.get_parameter(str(node.all_input_nodes[0].target))
        for node, quantizer in prepared.quantizer_nodes()
        if quantizer.site.kind == "weight"
    }


class _FakeQuantize(torch.autograd.Function):
    """:func:`infoq_fx.quantization.numerics.fake_quantize_ste` by the :func:`usable_step`, in few passes over memory.

    ``low, high`` limit ``round(x / step)``. The step's gradient is scaled, and passes straight through its limit and
    its rounding. On a CPU, forward and backward take one pass each, ten times as fast as with masks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Any,
        scale: Any,
        smallest: Any,
        significant_bits: int | None,
        gradient_scale: float,
        channel_axis: int | None,
        low: int,
        high: int,
    ) -> Any:
        step = usable_step(scale, smallest, significant_bits)
        if channel_axis is not None:
            step = step.reshape([-1 if axis == channel_axis else 1 for axis in range(x.ndim)])
        ctx.limits, ctx.shape, ctx.gradient_scale = (low, high), scale.shape, gradient_scale
        ctx.takes_kernels = _suits_kernels(x, step)
        if ctx.takes_kernels:
            x = _dense(x)
            y = torch.empty_like(x)
            fake_quantize_flat(flat_view(x), np.float32(step.item()), np.float32(low), np.float32(high), flat_view(y))
        else:
            y = (x / step).round_().clamp_(low, high).mul_(step)
        ctx.save_for_backward(x, step)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x, step), (low, high) = ctx.saved_tensors, ctx.limits
        if ctx.takes_kernels:
            grad = grads[0] if grads[0].stride() == x.stride() else torch.empty_like(x).copy_(grads[0])
            inside = torch.empty_like(x)
            limits = np.float32(step.item()), np.float32(low), np.float32(high)
            slope = torch.full_like(step, _pull_back(flat_view(grad), flat_view(x), *limits, flat_view(inside)))
        else:
            ratio = x / step
            inside = torch.ops.aten.hardtanh_backward(grads[0], ratio, low, high)
            slope = torch.round(ratio).clamp_(low, high).mul_(grads[0]).addcmul_(inside, ratio, value=-1)
            slope = slope.sum_to_size(step.shape).reshape(ctx.shape)
        return inside, slope * ctx.gradient_scale, None, None, None, None, None, None


class _RoundToLevels(torch.autograd.Function):
    """Rounds to the nearest of the :func:`usable_levels`; gradients as :class:`LearnedStepQuantizer` says.

    ``gap`` is the usable step size times ``unit``. Its gradient passes straight through its limit and its rounding to
    ``scale``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Any,
        scale: Any,
        gap: Any,
        levels: Any,
        unit: float,
        gradient_scale: float,
        channel_axis: int | None,
    ) -> Any:
        ctx.shape, ctx.unit, ctx.gradient_scale, step = scale.shape, unit, gradient_scale, gap / unit
        if channel_axis is not None:
            step = step.reshape([-1 if axis == channel_axis else 1 for axis in range(x.ndim)])
        used, order = (unit * levels).round().clamp(-LARGEST_LEVEL, LARGEST_LEVEL).sort()
        place = find_places(x / step, used)
        q = used[place]
        ctx.save_for_backward(x, step, q, order[place], used[[0, -1]])
        ctx.count = len(levels)
        return q * step

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, step, q, place, limits = ctx.saved_tensors
        ratio, grad = x / step, grads[0].contiguous()
        inside = grad * ((ratio > limits[0]) & (ratio < limits[1]))
        slope = (grad * q - inside * ratio).sum_to_size(step.shape).reshape(ctx.shape)
        by_level = grad.new_zeros(ctx.count).index_add_(0, place.flatten(), (grad * step).flatten())
        scaled = by_level * (ctx.unit * ctx.gradient_scale)
        return inside, slope * (ctx.gradient_scale / ctx.unit), None, scaled, None, None, None


def _pull_back(grad: Any, x: Any, step: Any, low: Any, high: Any, inside: Any) -> float:
    """Write the gradient of ``x`` into ``inside`` and return that of the step; all are flat, of one length."""
    total = 0.0
    for start in range(0, len(x), 1024):
        stop = min(start + 1024, len(x))
        g, values, out = grad[start:stop], x[start:stop], inside[start:stop]
        part = step * 0
        for i in range(stop - start):
            ratio = values[i] / step
            q = np.rint(ratio)
            q = low if q < low else q
            q = high if q > high else q
            passed = g[i] if ratio > low else step * 0
            passed = passed if ratio < high else step * 0
            out[i] = passed
            part += g[i] * q - passed * ratio
        total += part
    return total


# Sums within a block may be reordered, so that the compiler vectorizes them.
_pull_back = jit(_pull_back, fastmath={"reassoc"})


def _suits_kernels(x: Tensor, step: Tensor) -> bool:
    is_plain = type(x) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    return is_plain and step.ndim == 0 and x.device.type == "cpu" and x.dtype == torch.float32


def _dense(x: Tensor) -> Tensor:
    is_dense = x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x if is_dense else x.contiguous()


def _replace_module(module: fx.GraphModule, node: fx.Node, make: Callable[[Quantizer], nn.Module | None]) -> None:
    old = module.get_submodule(str(node.target))
    if not isinstance(old, Quantizer | Observe):
        return
    new = make(old) if isinstance(old, Quantizer) else None
    if new is None:
        node.replace_all_uses_with(node.all_input_nodes[0])
        module.graph.erase_node(node)
    else:
        module.set_submodule(str(node.target), new)


def _trainable_targets(module: fx.GraphModule) -> set[str]:
    found: set[str] = set()
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for node in module.graph.nodes:
        if node.op == "get_attr" and str(node.target) in parameters:
            found.add(str(node.target))
        op = LAYER_OPS.get(node.target)
        operands: Any = () if op is None else (node.args[op.weight], op.bias_of(node))
        for operand in node.args[2] if node.target in RECURRENT_OPS else operands:
            source = operand
            if isinstance(source, fx.Node) and source.op == "call_module":
                source = source.all_input_nodes[0]
            if isinstance(source, fx.Node) and source.op == "get_attr":
                found.add(str(source.target))
    return {name for name in found if read_tensor(module, name).is_floating_point()}


def _make_parameter(module: fx.GraphModule, target: str) -> None:
    path, _, name = target.rpartition(".")
    owner = module.get_submodule(path)
    value = read_tensor(module, target).clone()
    delattr(owner, name)
    owner.register_parameter(name, nn.Parameter(value))

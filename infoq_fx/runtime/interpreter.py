"""Interpreter of the prepared graph: the 8-bit baseline, given bit-widths, and one site perturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from infoq_fx.graph.float_interpreter import channels_last, read_weight
from infoq_fx.graph.program.graph_interpreter import GraphInterpreter
from infoq_fx.quantization.numerics import dequantize, fake_quantize
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.quantization.quantizers import Quantizer
from infoq_fx.runtime.integer_convolution import IntegerWeight, compute_layer, quantize_activation, quantize_weight
from infoq_fx.runtime.run_plan import RunPlan
from infoq_fx.types import QuantSite

__all__ = ["SiteInterpreter"]

ReadValue = Callable[[fx.Node, Any], None]


class SiteInterpreter(GraphInterpreter):
    """Runs plans over a prepared graph; every site is at its baseline's bit-width unless a run sets another.

    Quantized weights are kept as long as the interpreter and its forks exist: each (site, bit-width) is quantized
    once. An interpreter is for one thread; other threads use a :meth:`fork` of it.
    """

    def __init__(
        self,
        prepared: PreparedModel,
        integers: frozenset[fx.Node] = frozenset(),
        weights: dict[tuple[str, int], Tensor | IntegerWeight] | None = None,
    ) -> None:
        super().__init__(prepared.graph_module, garbage_collect_values=False)
        self._prepared, self._integers = prepared, integers
        self._quantizers = dict(prepared.quantizer_nodes())
        self._inputs: Mapping[str, Tensor] = {}
        self._bits: Mapping[str, int] = {}
        self._weights = {} if weights is None else weights

    def fork(self) -> SiteInterpreter:
        """Return another interpreter of the same model that shares the quantized weights."""
        return SiteInterpreter(self._prepared, self._integers, self._weights)

    def quantize_weights(self, sites: Iterable[QuantSite] = (), bits: Mapping[str, int] | None = None) -> None:
        """Quantize all weights at 8 bits or as ``bits`` says, and those of ``sites`` at all their candidates."""
        wanted = {site.name: site.bits for site in sites if site.kind == "weight"}
        given = bits or {}
        with torch.inference_mode():
            for node, module in self._quantizers.items():
                name = module.site.name
                if module.site.kind == "weight":
                    for width in {*wanted.get(name, ()), given.get(name, module.site.baseline_bits)}:
                        self._quantize_weight(node, module, width)

    def run_plan(
        self,
        plan: RunPlan,
        known: Mapping[fx.Node, Any],
        *,
        inputs: Mapping[str, Tensor] | None = None,
        bits: Mapping[str, int] | None = None,
        read: ReadValue | None = None,
        is_stopped: Callable[[], bool] | None = None,
    ) -> dict[fx.Node, Any]:
        """Run the nodes of a plan.

        Args:
            plan: from :func:`plan_whole_run` or :func:`plan_perturbed_run`.
            known: values of ``plan.boundary``, from the baseline run; empty for a whole run.
            inputs: the batch by input name, for a whole run.
            bits: bit-widths by site; sites that are not named are at 8 bits.
            read: called with every node and its value as it is computed, before anything is freed.
            is_stopped: called before every node; the run ends early if it returns True.

        Returns:
            The values that were not freed, by node.
        """
        self._inputs, self._bits = inputs or {}, bits or {}
        self.env = {node: known[node] for node in plan.boundary}
        with torch.inference_mode():
            for node in plan.nodes:
                if is_stopped is not None and is_stopped():
                    break
                value = self._compute(node, plan)
                self.env[node] = value
                if read is not None:
                    read(node, value)
                for freed in plan.freed_after.get(node, ()):
                    del self.env[freed]
        env, self.env = self.env, {}
        return env

    def _compute(self, node: fx.Node, plan: RunPlan) -> Any:
        if node in plan.repeats:
            return self.env[plan.repeats[node]]
        if node in plan.merged:
            module, merged = self._quantizers[node], plan.merged[node]
            first, *others = (self.env[source] for source in merged.sources)
            qparams, addend = module.qparams_at(self._bits_of(module)), others[0] if others else None
            is_integer = node in self._integers and not qparams.spec.is_float
            quantize = quantize_activation if is_integer else fake_quantize
            return quantize(first, qparams, addend=addend, clip=merged.clip)
        if node in self._quantizers:
            return self._quantize_weight(node, self._quantizers[node], self._bits_of(self._quantizers[node]))
        if node in self._integers:
            x, weight, *rest = node.args[:3]
            bias = self.env[rest[0]] if rest and isinstance(rest[0], fx.Node) else None
            return compute_layer(node, self.env[x], self.env[weight], bias)  # type: ignore[index]
        return self.run_node(node)

    def _quantize_weight(self, node: fx.Node, module: Quantizer, bits: int) -> Tensor | IntegerWeight:
        key = module.site.name, bits
        if key not in self._weights:
            weight, rounded = read_weight(self._prepared, node), self._prepared.rounded.get(key)
            found: Tensor | IntegerWeight
            if rounded is not None and node in self._integers:
                found = IntegerWeight(rounded.q, rounded.qparams.scale)
            elif rounded is not None:
                found = dequantize(rounded.q, rounded.qparams)
            elif node in self._integers and not module.qparams_at(bits).spec.is_float:
                found = quantize_weight(weight, module.qparams_at(bits))
            else:
                found = fake_quantize(weight, module.qparams_at(bits))
            self._weights[key] = found if isinstance(found, IntegerWeight) else channels_last(found)
        return self._weights[key]

    def _bits_of(self, module: Quantizer) -> int:
        return self._bits.get(module.site.name, module.site.baseline_bits)

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the batch's tensor of that name, images with channels last, which CPUs convolve 3 times faster."""
        return channels_last(self._inputs[target])

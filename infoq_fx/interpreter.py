"""Runs of the prepared graph: float for calibration, 8-bit baseline, and one site perturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from infoq_fx.data import CalibrationData
from infoq_fx.errors import CalibrationDataError
from infoq_fx.histogram import Histogram, choose_activation_qparams
from infoq_fx.numerics import choose_weight_qparams
from infoq_fx.prepared import PreparedModel
from infoq_fx.quantizers import Quantizer, spec_of
from infoq_fx.spec import BASELINE_BITS

__all__ = [
    "RunPlan",
    "SiteInterpreter",
    "baseline_logits",
    "calibrate",
    "class_logits",
    "first_output",
    "plan_baseline_run",
    "plan_perturbed_run",
    "predict",
    "read_weight",
]

_VIEWS = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default}

ReadValue = Callable[[fx.Node, Any], None]


@dataclass(frozen=True)
class RunPlan:
    """Which nodes a run computes, in order, and which values it frees behind each of them.

    ``boundary`` are the nodes whose values must be there already: of the baseline, for a perturbed run.
    """

    nodes: tuple[fx.Node, ...]
    boundary: frozenset[fx.Node]
    freed_after: Mapping[fx.Node, tuple[fx.Node, ...]]


def calibrate(prepared: PreparedModel, data: CalibrationData, *, batch_size: int) -> None:
    """Set the qparams of every quantizer for all its candidate bit-widths and for the baseline.

    Weights: the clip of least squared error, per output channel. Activations: one pass of the float model over
    the data fills a histogram a site, from which the clip of least squared error follows for every bit-width.

    Raises:
        CalibrationDataError: an activation is NaN or infinite; the message names the site.
    """
    histograms: dict[str, Histogram] = {}
    calibrator = _Calibrator(prepared, histograms)
    has_activations = any(module.site.kind == "activation" for _, module in prepared.quantizer_nodes())
    with torch.inference_mode():
        for batch in data.batches(batch_size) if has_activations else ():
            calibrator.run(*batch.values())
        for node, module in prepared.quantizer_nodes():
            site = module.site
            wanted = sorted({*site.bits, BASELINE_BITS})
            if site.kind == "weight":
                weight = read_weight(prepared, node)
                chosen = {b: choose_weight_qparams(weight, spec_of(site, b)) for b in wanted}
            else:
                found = histograms[site.name]
                chosen = {b: choose_activation_qparams(found, spec_of(site, b)) for b in wanted}
            device = next(iter(prepared.example_inputs.values())).device
            module.set_qparams(chosen, device)


def plan_baseline_run(prepared: PreparedModel, keep: Iterable[fx.Node]) -> RunPlan:
    """A whole run as far as the nodes to ``keep`` need it; their values stay, all others are freed."""
    kept = set(keep)
    return _plan(prepared, kept, kept, start=None)


def plan_perturbed_run(prepared: PreparedModel, site: str, observed: Iterable[fx.Node]) -> RunPlan:
    """What must run again for the ``observed`` nodes when one site's bit-width changes: no more.

    Only nodes downstream of the site's quantizer and upstream of an observed node are in the plan; it is empty
    where no observed node lies downstream.
    """
    start = next(node for node, module in prepared.quantizer_nodes() if module.site.name == site)
    return _plan(prepared, set(observed), set(), start=start)


class SiteInterpreter(fx.Interpreter):
    """Runs plans over a prepared graph; every site is at 8 bits but the one that is perturbed.

    Quantized weights are kept for as long as the interpreter lives: each (site, bit-width) is made once.
    """

    def __init__(self, prepared: PreparedModel) -> None:
        super().__init__(prepared.graph_module, garbage_collect_values=False)
        self._inputs: Mapping[str, Tensor] = {}
        self._perturbed: tuple[str, int] | None = None
        self._weights: dict[tuple[str, int], Tensor] = {}

    def run_plan(
        self,
        plan: RunPlan,
        known: Mapping[fx.Node, Any],
        *,
        inputs: Mapping[str, Tensor] | None = None,
        perturbed: tuple[str, int] | None = None,
        read: ReadValue | None = None,
    ) -> dict[fx.Node, Any]:
        """Run the nodes of a plan.

        Args:
            plan: from :func:`plan_baseline_run` or :func:`plan_perturbed_run`.
            known: values of ``plan.boundary``, from the baseline run; empty for the baseline itself.
            inputs: the batch by input name, for the baseline run.
            perturbed: (site, bit-width), for a perturbed run.
            read: called with every node and its value as it is computed, before anything is freed.

        Returns:
            The values that were not freed, by node.
        """
        self._inputs, self._perturbed = inputs or {}, perturbed
        self.env = {node: known[node] for node in plan.boundary}
        with torch.inference_mode():
            for node in plan.nodes:
                value = self.run_node(node)
                self.env[node] = value
                if read is not None:
                    read(node, value)
                for freed in plan.freed_after.get(node, ()):
                    del self.env[freed]
        env, self.env = self.env, {}
        return env

    def forget_weights(self, site: str) -> None:
        """Free the weights of a site at all bit-widths but the baseline's."""
        stale = [key for key in self._weights if key[0] == site and key[1] != BASELINE_BITS]
        for key in stale:
            del self._weights[key]

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The batch's tensor of that name; images with channels last, which CPUs convolve 3 times faster."""
        return _channels_last(self._inputs[target])

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The op itself; views become reshapes, since memory is laid out otherwise than at capture."""
        if target in _VIEWS:
            return args[0].reshape(args[1])
        return super().call_function(target, args, kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Quantizers run at the bit-width of this run; every other module as it is."""
        module = self.fetch_attr(target)
        if not isinstance(module, Quantizer):
            return super().call_module(target, args, kwargs)
        name = module.site.name
        bits = BASELINE_BITS
        if self._perturbed is not None and self._perturbed[0] == name:
            bits = self._perturbed[1]
        if module.site.kind == "activation":
            return module.quantize_at(args[0], bits)
        if (name, bits) not in self._weights:
            self._weights[name, bits] = _channels_last(module.quantize_at(args[0], bits))
        return self._weights[name, bits]


def predict(prepared: PreparedModel, data: CalibrationData, *, batch_size: int) -> Tensor:
    """The class with the largest logit for every sample, by the 8-bit baseline: int64 ``[samples]``.

    The logits are as :func:`class_logits` reads them from the first output.
    """
    return baseline_logits(prepared, data, batch_size=batch_size).argmax(1)


def baseline_logits(prepared: PreparedModel, data: CalibrationData, *, batch_size: int) -> Tensor:
    """The logits of the 8-bit baseline: float32 ``[samples, classes]``."""
    output = first_output(prepared)
    plan = plan_baseline_run(prepared, [output])
    interpreter = SiteInterpreter(prepared)
    runs = (interpreter.run_plan(plan, {}, inputs=batch)[output] for batch in data.batches(batch_size))
    return torch.cat([class_logits(logits) for logits in runs])


def class_logits(output: Tensor) -> Tensor:
    """A model's output as ``[samples, classes]``: token and pixel dimensions are averaged.

    Three dimensions are read as ``[samples, tokens, classes]``, four and more as ``[samples, classes, ...]``.
    """
    if output.ndim < 3:
        return output.float().reshape(output.shape[0], -1)
    return output.float().mean(1) if output.ndim == 3 else output.float().flatten(2).mean(2)


def first_output(prepared: PreparedModel) -> fx.Node:
    """The node of the model's first output."""
    output: fx.Node = next(iter(reversed(prepared.graph_module.graph.nodes)))
    return output.all_input_nodes[0]


class _Calibrator(fx.Interpreter):
    """Runs the float model and fills the histogram of every activation site."""

    def __init__(self, prepared: PreparedModel, histograms: dict[str, Histogram]) -> None:
        super().__init__(prepared.graph_module)
        self._histograms = histograms

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, Quantizer) and module.site.kind == "activation":
            name = module.site.name
            histogram = self._histograms.setdefault(name, Histogram())
            histogram.update(args[0])
            if not histogram.is_finite:
                raise CalibrationDataError(
                    f"the activation at {name!r} is NaN or infinite for a calibration batch: check the inputs' "
                    "normalisation and the checkpoint, or leave the layer before it in float with ignore=[...]"
                )
        return args[0] if isinstance(module, Quantizer) else super().call_module(target, args, kwargs)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def read_weight(prepared: PreparedModel, node: fx.Node) -> Tensor:
    """The float weight behind a weight's quantize node."""
    path, _, name = str(node.all_input_nodes[0].target).rpartition(".")
    weight: Tensor = getattr(prepared.graph_module.get_submodule(path), name)
    return weight.detach()


def _plan(prepared: PreparedModel, wanted: set[fx.Node], kept: set[fx.Node], start: fx.Node | None) -> RunPlan:
    nodes = [node for node in prepared.graph_module.graph.nodes if node.op != "output"]
    downstream = set(nodes) if start is None else _downstream(nodes, start)
    needed: set[fx.Node] = set()
    for node in reversed(nodes):
        if node in wanted or any(user in needed for user in node.users):
            needed.add(node)
    run = [node for node in nodes if node in downstream and node in needed]
    running = set(run)
    boundary = {source for node in run for source in node.all_input_nodes if source not in running}
    last_use: dict[fx.Node, fx.Node] = {}
    for node in run:
        last_use.update(dict.fromkeys((node, *node.all_input_nodes), node))
    freed: dict[fx.Node, list[fx.Node]] = {}
    for node, last in last_use.items():
        if node not in kept:
            freed.setdefault(last, []).append(node)
    return RunPlan(tuple(run), frozenset(boundary), {node: tuple(values) for node, values in freed.items()})


def _downstream(nodes: Iterable[fx.Node], start: fx.Node) -> set[fx.Node]:
    found = {start}
    for node in nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found

"""Plans a run of the prepared graph: which nodes to compute, in which order, and when to free their values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from infoq_fx.graph.clamps import constant_bounds
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.quantization.quantizers import Observe, Quantizer
from infoq_fx.types import FLOAT16_BITS

__all__ = ["MergedQuantizer", "RunPlan", "plan_perturbed_run", "plan_perturbed_runs", "plan_whole_run"]

_ATEN = torch.ops.aten
_UNLIMITED = (-math.inf, math.inf)
_BASELINE: Mapping[str, int] = {}


@dataclass(frozen=True)
class MergedQuantizer:
    """A quantizer fused with the pointwise operations before it: it reads the sum of ``sources``.

    ``clip`` is the range that the sum is limited to first, as by ReLU.
    """

    sources: tuple[fx.Node, ...]
    clip: tuple[float, float]


@dataclass(frozen=True)
class RunPlan:
    """The nodes that a run computes, in order, and the values that it frees after each of them.

    ``boundary`` are the nodes whose values must be known already: those of the baseline, for a perturbed run.
    ``merged`` are all activation quantizers of the run. ``repeats`` maps quantizers to an earlier one with the same
    input and the same qparams, whose value they reuse.
    """

    nodes: tuple[fx.Node, ...]
    boundary: frozenset[fx.Node]
    freed_after: Mapping[fx.Node, tuple[fx.Node, ...]]
    merged: Mapping[fx.Node, MergedQuantizer] = field(default_factory=dict)
    repeats: Mapping[fx.Node, fx.Node] = field(default_factory=dict)


def plan_whole_run(
    prepared: PreparedModel,
    keep: Iterable[fx.Node],
    integers: frozenset[fx.Node] = frozenset(),
    bits: Mapping[str, int] = _BASELINE,
) -> RunPlan:
    """Plan a run from the inputs to the nodes to ``keep``, whose values stay; all other values are freed.

    ``integers`` are the nodes that the interpreter runs over integers, the same in every plan of an interpreter.
    ``bits`` are the bit-widths of the run, by site; sites that are not named are at 8 bits.
    """
    kept = set(keep)
    return _plan(_read_graph(prepared), kept, kept, set(), integers, bits)


def plan_perturbed_run(
    prepared: PreparedModel,
    site: str,
    observed: Iterable[fx.Node],
    integers: frozenset[fx.Node] = frozenset(),
    keep: Iterable[fx.Node] = (),
) -> RunPlan:
    """Plan only what must run again for the ``observed`` nodes when one site's bit-width changes.

    Only nodes downstream of the site's quantizer and upstream of an observed node are in the plan; it is empty
    if no observed node is downstream. The run ends with the last observed node. Nodes to ``keep`` are observed too, and
    their values stay.
    """
    return plan_perturbed_runs(prepared, [site], observed, integers, keep)[site]


def plan_perturbed_runs(
    prepared: PreparedModel,
    sites: Iterable[str],
    observed: Iterable[fx.Node],
    integers: frozenset[fx.Node] = frozenset(),
    keep: Iterable[fx.Node] = (),
) -> dict[str, RunPlan]:
    """Plan the runs of several sites, by name, as :func:`plan_perturbed_run` does; the graph is read once."""
    graph, kept, plans = _read_graph(prepared), set(keep), {}
    wanted = set(observed) | kept
    for site in sites:
        moved = {site, *prepared.inventory.complete_floats({site: FLOAT16_BITS})}
        start = {node for node, module in graph.quantizers if module.site.name in moved}
        plans[site] = _plan(graph, wanted, kept, start, integers, _BASELINE)
    return plans


@dataclass(frozen=True)
class _Graph:
    """What plans are made of: the nodes in order, the quantizers, and which of them are fused with what."""

    nodes: tuple[fx.Node, ...]
    quantizers: tuple[tuple[fx.Node, Quantizer], ...]
    merged: Mapping[fx.Node, MergedQuantizer]


def _read_graph(prepared: PreparedModel) -> _Graph:
    nodes = tuple(node for node in prepared.graph_module.graph.nodes if node.op != "output")
    quantizers = tuple(prepared.quantizer_nodes())
    return _Graph(nodes, quantizers, _merge_quantizers(prepared, quantizers))


def _plan(
    graph: _Graph,
    wanted: set[fx.Node],
    kept: set[fx.Node],
    start: set[fx.Node],
    integers: frozenset[fx.Node],
    bits: Mapping[str, int],
) -> RunPlan:
    nodes, merged = graph.nodes, dict(graph.merged)
    repeats = _find_repeats(graph, start, integers, bits)
    needed = _find_needed(nodes, wanted, merged, repeats)
    # If the sum itself is needed too, the quantizer reads it instead of adding again.
    for node, quantizer in merged.items():
        total = _summed(quantizer, node)
        if total in needed:
            merged[node] = replace(quantizer, sources=(total,))
    downstream = _downstream(nodes, start) if start else set(nodes)
    run = [node for node in nodes if node in downstream and node in needed]
    running, last_use = set(run), dict[fx.Node, fx.Node]()
    boundary = {source for node in run for source in _inputs_of(node, merged, repeats) if source not in running}
    for node in run:
        last_use.update(dict.fromkeys((node, *_inputs_of(node, merged, repeats)), node))
    freed: dict[fx.Node, list[fx.Node]] = {}
    for node, last in last_use.items():
        if node not in kept:
            freed.setdefault(last, []).append(node)
    return RunPlan(
        nodes=tuple(run),
        boundary=frozenset(boundary),
        freed_after={node: tuple(values) for node, values in freed.items()},
        merged={node: merged[node] for node in run if node in merged},
        repeats={node: repeats[node] for node in run if node in repeats},
    )


def _find_needed(
    nodes: Sequence[fx.Node],
    wanted: set[fx.Node],
    merged: Mapping[fx.Node, MergedQuantizer],
    repeats: Mapping[fx.Node, fx.Node],
) -> set[fx.Node]:
    needed = set(wanted)
    for node in reversed(nodes):
        if node in needed:
            needed.update(_inputs_of(node, merged, repeats))
    return needed


def _downstream(nodes: Iterable[fx.Node], start: set[fx.Node]) -> set[fx.Node]:
    found = set(start)
    for node in nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _inputs_of(
    node: fx.Node, merged: Mapping[fx.Node, MergedQuantizer], repeats: Mapping[fx.Node, fx.Node]
) -> tuple[fx.Node, ...]:
    if node in repeats:
        return (repeats[node],)
    return merged[node].sources if node in merged else tuple(node.all_input_nodes)


def _merge_quantizers(
    prepared: PreparedModel, quantizers: Iterable[tuple[fx.Node, Quantizer]]
) -> dict[fx.Node, MergedQuantizer]:
    """Every activation quantizer fused with the clips and the addition before it; observers between are skipped."""
    merged = {}
    for node, quantizer in quantizers:
        if quantizer.site.kind != "activation":
            continue
        source, clip = node.all_input_nodes[0], _UNLIMITED
        while (step := _pass_through(prepared, source)) is not None:
            # clip(clip(x, a, b), low, high) is clip(x, ...) at the clipped limits.
            clip = (min(max(step[0], clip[0]), clip[1]), min(max(step[1], clip[0]), clip[1]))
            source = source.all_input_nodes[0]
        is_sum = source.target is _ATEN.add.Tensor and len(source.args) == 2 and not source.kwargs
        nodes = tuple(arg for arg in source.args if isinstance(arg, fx.Node)) if is_sum else ()
        merged[node] = MergedQuantizer(nodes if len(nodes) == 2 else (source,), clip)
    return merged


def _pass_through(prepared: PreparedModel, node: fx.Node) -> tuple[float, float] | None:
    """The limits that a node clips its input to; None for a node that does something else."""
    if node.op == "call_module":
        module = prepared.graph_module.get_submodule(str(node.target))
        return _UNLIMITED if isinstance(module, Observe) else None
    return constant_bounds(node)


def _summed(quantizer: MergedQuantizer, node: fx.Node) -> fx.Node | None:
    """The addition that a merged quantizer is fused with."""
    if len(quantizer.sources) < 2:
        return None
    above = node.all_input_nodes[0]
    while above.target is not _ATEN.add.Tensor:
        above = above.all_input_nodes[0]
    return above


def _find_repeats(
    graph: _Graph, perturbed: set[fx.Node], integers: frozenset[fx.Node], bits: Mapping[str, int]
) -> dict[fx.Node, fx.Node]:
    merged, repeats = graph.merged, {}
    first: dict[Any, tuple[fx.Node, Quantizer]] = {}
    for node, quantizer in graph.quantizers:
        if node not in merged or node in perturbed or not quantizer.calibrated_bits:
            continue
        key = merged[node].sources, merged[node].clip, node in integers
        found = first.setdefault(key, (node, quantizer))
        if found[0] is not node and _have_equal_qparams(found[1], quantizer, bits):
            repeats[node] = found[0]
    return repeats


def _have_equal_qparams(left: Quantizer, right: Quantizer, bits: Mapping[str, int]) -> bool:
    a, b = (q.qparams_at(bits.get(q.site.name, q.site.baseline_bits)) for q in (left, right))
    return a.spec == b.spec and torch.equal(a.scale, b.scale) and torch.equal(a.zero_point, b.zero_point)

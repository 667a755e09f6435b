"""Forward runs over all samples: the model at given bit-widths, and sites perturbed one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.memory import usual_bytes
from infoq_fx.core.threads import ThreadMap, thread_map
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.runtime.held_outputs import HeldLoss, HeldOutputs, OutputHolder
from infoq_fx.runtime.integer_convolution import find_integer_nodes
from infoq_fx.runtime.interpreter import ReadValue, SiteInterpreter
from infoq_fx.runtime.outputs import FloatOutputs, read_nodes
from infoq_fx.runtime.run_plan import plan_perturbed_run, plan_perturbed_runs, plan_whole_run
from infoq_fx.runtime.value_sizes import measure_peak_and_largest_bytes
from infoq_fx.types import QuantSite

__all__ = [
    "GRADIENT_BYTES",
    "MakeReader",
    "RunOptions",
    "bytes_per_sample",
    "choose_batch_size",
    "choose_gradient_bytes",
    "choose_perturbed_batch_size",
    "hold_float_outputs",
    "hold_outputs",
    "map_whole",
    "measure_lost_nats",
    "run_pairs",
    "run_perturbed",
    "run_whole",
]

GRADIENT_BYTES = 512 << 20
"""What a run may keep for gradients without a memory limit."""

_BATCH_BYTES = 256 << 20
_VALUE_BYTES = (
    24 << 20
)  # of one value; C libraries map larger blocks anew each time, which takes as long as to use them
_MAX_BATCH, _MAX_BATCH_OF_GPU = 64, 1024

_Result = TypeVar("_Result")

MakeReader = Callable[[tuple[str, int], int], ReadValue]
"""Makes the callback that reads the values of a run, from its (site, bit-width) and the batch's first sample index."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a measurement that do not change its result.

    ``threads`` is the number of threads to use. ``advance`` is called with progress in units of one (site, bit-width),
    in fractions. ``stop`` is set when the result is no longer needed. ``gradient_bytes`` is what a run may keep for
    gradients: larger batches run in parts, with the same gradients but for the order of sums.
    """

    threads: int = 1
    advance: Callable[[float], None] = field(default=lambda share: None)
    stop: threading.Event = field(default_factory=threading.Event)
    gradient_bytes: int = GRADIENT_BYTES


def hold_outputs(
    prepared: PreparedModel,
    data: CalibrationData,
    bits: Mapping[str, int] | None = None,
    *,
    batch_size: int | None = None,
    run_options: RunOptions | None = None,
) -> HeldOutputs:
    """Run all samples at given bit-widths and hold the outputs that are read.

    Args:
        prepared: calibrated.
        data: by the model's input names.
        bits: bit-width by site; sites that are not named, or all if None, are at 8 bits.
        batch_size: samples per run; None for that of :func:`choose_batch_size`.
        run_options: threads.
    """
    nodes, holder = read_nodes(prepared), OutputHolder(data.samples)

    def read(start: int, values: Mapping[fx.Node, Any]) -> None:
        holder.add(start, [values[node] for node in nodes])

    size = batch_size or choose_batch_size(prepared)
    run_whole(prepared, data, set(nodes), read, bits=bits, batch_size=size, run_options=run_options or RunOptions())
    return holder.finish()


def hold_float_outputs(
    prepared: PreparedModel, data: CalibrationData, *, batch_size: int, run_options: RunOptions | None = None
) -> HeldOutputs:
    """Run the float model over all samples and hold the outputs that are read."""
    given, holder = run_options or RunOptions(), OutputHolder(data.samples)

    def run(numbered: tuple[int, Mapping[str, Tensor]]) -> None:
        start, batch = numbered
        with torch.inference_mode():
            holder.add(start, FloatOutputs(prepared).run(*batch.values()))

    with thread_map(given.threads, given.stop) as spread:
        for _ in spread(run, _number_batches(data, batch_size)):
            pass
    return holder.finish()


def measure_lost_nats(
    prepared: PreparedModel,
    data: CalibrationData,
    bits: Mapping[str, int],
    loss: HeldLoss,
    *,
    batch_size: int,
    run_options: RunOptions,
) -> Tensor:
    """Measure what the model loses at given bit-widths against the float model, in nats, float64 ``[samples]``.

    Outputs are compared batch by batch and not held.

    Args:
        prepared: calibrated.
        data: by the model's input names.
        bits: bit-width by site; sites that are not named are at 8 bits.
        loss: compares outputs of the float model for the same samples with those of the run.
        batch_size: samples per run.
        run_options: threads.
    """
    nodes, nats = read_nodes(prepared), torch.zeros(data.samples, dtype=torch.float64)

    def read(start: int, values: Mapping[fx.Node, Any]) -> None:
        found = [values[node].detach().to("cpu", torch.float32) for node in nodes]
        nats[start : start + len(found[0])] = loss(start, found)

    run_whole(prepared, data, set(nodes), read, bits=bits, batch_size=batch_size, run_options=run_options)
    return nats


def run_whole(
    prepared: PreparedModel,
    data: CalibrationData,
    observed: Iterable[fx.Node],
    read: Callable[[int, Mapping[fx.Node, Any]], None],
    *,
    bits: Mapping[str, int] | None = None,
    batch_size: int,
    run_options: RunOptions,
) -> None:
    """Run all samples at given bit-widths.

    ``read`` is called with the index of a batch's first sample and the observed values. The first batch is read before
    any other starts; the others are read in any order, from several threads.
    """
    for _ in map_whole(prepared, data, observed, read, bits=bits, batch_size=batch_size, run_options=run_options):
        pass


def map_whole(
    prepared: PreparedModel,
    data: CalibrationData,
    observed: Iterable[fx.Node],
    read: Callable[[int, Mapping[fx.Node, Any]], _Result],
    *,
    bits: Mapping[str, int] | None = None,
    batch_size: int,
    run_options: RunOptions,
) -> Iterator[_Result]:
    """Run all samples as :func:`run_whole` does, and yield what ``read`` returns, in the order of the batches.

    Inputs of layers may be a :class:`infoq_fx.runtime.integer_convolution.QuantizedTensor`.
    """
    integers, given = find_integer_nodes(prepared), prepared.inventory.complete_floats(bits or {})
    interpreter = SiteInterpreter(prepared, integers)
    interpreter.quantize_weights(bits=given)
    own, plan = _ForkPerThread(interpreter), plan_whole_run(prepared, observed, integers, given)

    def run(numbered: tuple[int, Mapping[str, Tensor]]) -> _Result:
        start, batch = numbered
        return read(start, own().run_plan(plan, {}, inputs=batch, bits=given, is_stopped=run_options.stop.is_set))

    first, *others = _number_batches(data, batch_size)
    yield run(first)
    with thread_map(run_options.threads, run_options.stop) as spread:
        yield from spread(run, others)


def run_perturbed(
    prepared: PreparedModel,
    data: CalibrationData,
    sites: Sequence[QuantSite],
    observed: Iterable[fx.Node],
    make_reader: MakeReader,
    *,
    batch_size: int,
    run_options: RunOptions,
    spread: ThreadMap,
    share: float,
) -> None:
    """Run every site at each of its candidate bit-widths except 8, all others at 8 bits, up to the observed nodes.

    The outer loop is over batches and the inner one over sites, so that each batch of the baseline runs once.
    ``share`` is the part of a (site, bit-width) by which the progress bar advances for its run.
    """
    wanted, integers = set(observed), find_integer_nodes(prepared)
    plans = plan_perturbed_runs(prepared, [site.name for site in sites], wanted, integers)
    # Of the inventory: the given sites may have a part of their candidates, 16 alone for example.
    at_rest = {site.name: site.baseline_bits for site in prepared.inventory.sites}
    runs = [(site.name, bits) for site in sites for bits in site.bits if bits != at_rest[site.name]]
    if not runs:
        return
    boundary = set().union(*(plan.boundary for plan in plans.values()))
    base = prepared.inventory.complete_floats({})
    baseline_plan = plan_whole_run(prepared, boundary, integers, base)
    interpreter = SiteInterpreter(prepared, integers)
    interpreter.quantize_weights(sites)
    own = _ForkPerThread(interpreter)
    for start, batch in _number_batches(data, batch_size):
        known = interpreter.run_plan(baseline_plan, {}, inputs=batch, bits=base, is_stopped=run_options.stop.is_set)

        def perturb(run: tuple[str, int], start: int = start, known: Mapping[fx.Node, Any] = known) -> None:
            plan, read = plans[run[0]], make_reader(run, start)
            bits = prepared.inventory.complete_floats(dict([run]))
            own().run_plan(plan, known, bits=bits, read=read, is_stopped=run_options.stop.is_set)

        part = share * len(next(iter(batch.values()))) / data.samples
        for _ in spread(perturb, runs):
            run_options.advance(part)


def run_pairs(
    prepared: PreparedModel,
    data: CalibrationData,
    sites: Sequence[QuantSite],
    partners: Mapping[str, Sequence[QuantSite]],
    observed: Iterable[fx.Node],
    make_reader: Callable[[tuple[tuple[str, int], ...], int], ReadValue],
    *,
    batch_size: int,
    run_options: RunOptions,
    spread: ThreadMap,
) -> None:
    """Run every site at each of its candidates except 8, alone and with each partner at each of its own except 8.

    All other sites are at 8 bits. Each run of a pair starts at the partner, from the values of the run of the site
    alone. ``make_reader`` takes the (site, bit-width) of one or two sites and the batch's first sample index. The
    progress bar advances by 1 for each (site, bit-width) of ``sites``.
    """
    wanted, integers = set(observed), find_integer_nodes(prepared)
    others = {site.name: site for site in sites} | {site.name: site for found in partners.values() for site in found}
    plans = plan_perturbed_runs(prepared, others, wanted, integers)
    starts = {s.name: set[fx.Node]().union(*(plans[p.name].boundary for p in partners[s.name])) for s in sites}
    first = {s.name: plan_perturbed_run(prepared, s.name, wanted, integers, starts[s.name]) for s in sites}
    boundary = set().union(*(plan.boundary for plan in (*plans.values(), *first.values())))
    base = prepared.inventory.complete_floats({})
    baseline_plan = plan_whole_run(prepared, boundary, integers, base)
    interpreter = SiteInterpreter(prepared, integers)
    interpreter.quantize_weights(others.values())
    own = _ForkPerThread(interpreter)
    runs = [(site, bits) for site in sites for bits in site.bits if bits != site.baseline_bits]
    for start, batch in _number_batches(data, batch_size):
        known = interpreter.run_plan(baseline_plan, {}, inputs=batch, bits=base, is_stopped=run_options.stop.is_set)

        def perturb(run: tuple[QuantSite, int], start: int = start, known: Mapping[fx.Node, Any] = known) -> None:
            fork, is_stopped, (site, bits) = own(), run_options.stop.is_set, run
            read, given = make_reader(((site.name, bits),), start), {**base, site.name: bits}
            found = fork.run_plan(first[site.name], known, bits=given, read=read, is_stopped=is_stopped)
            for partner in partners[site.name]:
                values = {node: found.get(node, known[node]) for node in plans[partner.name].boundary}
                for width in partner.bits:
                    if width != partner.baseline_bits and not is_stopped():
                        pair = (site.name, bits), (partner.name, width)
                        read, both = make_reader(pair, start), {**given, partner.name: width}
                        fork.run_plan(plans[partner.name], values, bits=both, read=read, is_stopped=is_stopped)

        part = len(next(iter(batch.values()))) / data.samples
        for _ in spread(perturb, runs):
            run_options.advance(part)


def choose_batch_size(prepared: PreparedModel, memory_limit: int | None = None) -> int:
    """Return the batch size of whole runs: about 256 MiB are alive at once, or a quarter of the limit if that is less.

    On a CPU, no value is larger than 24 MiB. With a limit of 1 GiB or more the size is the same on every machine.
    """
    return prepared.batch_size or _fit(prepared, 0, memory_limit)


def choose_perturbed_batch_size(prepared: PreparedModel, memory_limit: int | None = None) -> int:
    """Return the batch size of :func:`run_perturbed`, which holds the values of all sites, like that of whole runs."""
    return prepared.batch_size or _fit(prepared, bytes_per_sample(prepared), memory_limit)


def choose_gradient_bytes(memory_limit: int | None, device: torch.device) -> int:
    """Return ``RunOptions.gradient_bytes``: 512 MiB, on a GPU an eighth of its memory, or half of a lower limit."""
    usual = usual_bytes(device, GRADIENT_BYTES)
    return usual if memory_limit is None else min(usual, memory_limit // 2)


def _fit(prepared: PreparedModel, held_per_sample: int, memory_limit: int | None) -> int:
    usual = usual_bytes(prepared.device, _BATCH_BYTES)
    share = usual if memory_limit is None else min(usual, memory_limit // 4)
    peak, largest = measure_peak_and_largest_bytes(prepared)
    most = share // max(1, held_per_sample or peak)
    if prepared.device.type == "cpu":
        most = min(most, _VALUE_BYTES // max(1, largest))
    return max(2, min(_MAX_BATCH_OF_GPU if prepared.device.type == "cuda" else _MAX_BATCH, most))


def bytes_per_sample(prepared: PreparedModel) -> int:
    """Estimate the memory in bytes that the values of all activation sites take for one sample."""
    per_sample = 4 * sum(site.numel for site in prepared.inventory.sites if site.kind == "activation")
    if per_sample == 0:
        per_sample = 8 * max(operation.macs for operation in prepared.inventory.operations) // 100
    return per_sample


class _ForkPerThread:
    """Gives each thread its own fork of an interpreter."""

    def __init__(self, interpreter: SiteInterpreter) -> None:
        self._interpreter, self._local = interpreter, threading.local()

    def __call__(self) -> SiteInterpreter:
        if not hasattr(self._local, "fork"):
            self._local.fork = self._interpreter.fork()
        fork: SiteInterpreter = self._local.fork
        return fork


def _number_batches(data: CalibrationData, batch_size: int) -> list[tuple[int, Mapping[str, Tensor]]]:
    return list(zip(range(0, data.samples, batch_size), data.batches(batch_size), strict=True))

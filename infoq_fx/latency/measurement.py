"""Times the layers of a prepared model in a runtime: in integers and in float, as they run in the whole file."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import onnx
import onnxruntime

from infoq_fx.conversion.conversion import convert_prepared
from infoq_fx.core.option_checks import check_count
from infoq_fx.core.targets import DEFAULT_TARGET, find_target
from infoq_fx.errors import OptionError
from infoq_fx.export.qdq_onnx.exporter import export_onnx
from infoq_fx.latency.latency_cost import FileLatency, LatencyCost
from infoq_fx.latency.layer_nodes import (
    drop_quantization,
    find_optimized_owners,
    find_owners,
    find_shared,
    tag_nodes,
)
from infoq_fx.latency.sessions import (
    EMPTY_FEED,
    open_empty_session,
    open_session,
    optimized_path,
    read_profile,
    take_turns,
)
from infoq_fx.quantization.prepared import PreparedModel, check_prepared
from infoq_fx.types import BASELINE_BITS, Allocation, Inventory

__all__ = ["Timing", "add_up", "measure_latency", "split_layers"]

_TIMED = ("onnxruntime", "onnxruntime-avx2")
_INTEGERS, _WEIGHT_ONLY, _FLOAT = "integers", "weights in integers, activations in float", "float"
_MIXED = "every second quarter in float"
_QUARTERS = 4
_DECIMALS = 4  # of milliseconds: the integer program is fast with few digits


@dataclass(frozen=True)
class Timing:
    """What was measured of one file: median latencies in milliseconds.

    ``nodes_ms`` are of each node by its name, as the profiler counts them; ``owners`` the operation that each node
    belongs to, and ``shared`` all operations of a node that computes several, by that one. ``whole_ms`` is of a run
    without the profiler.
    """

    whole_ms: float
    nodes_ms: Mapping[str, float] = field(default_factory=dict)
    owners: Mapping[str, str | None] = field(default_factory=dict)
    shared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def measure_latency(
    prepared: PreparedModel, target: str = DEFAULT_TARGET, threads: int = 1, *, runs: int = 60
) -> LatencyCost:
    """Time every layer of a model in a runtime, in integers and in float, as a cost for budgets.

    ``infoq_fx.COSTS["latency_ms"] = infoq_fx.measure_latency(prepared)`` lets ``Budget(costs={"latency_ms": 4.0})``
    limit the latency of one run on one sample.

    The layers are timed where they run: in the whole exported file at 8 bits, with all that the runtime fuses, and in
    the same file without quantization, of activations alone and of weights too. All are run in turns, with the
    runtime's profiler and without it, and medians are taken. What the profiler adds to each node is subtracted, so that
    the layers of a file and the rest add up to its latency without the profiler. The values are those of this machine:
    run it on the device that the model is for, or on a similar one, and save the result.

    The sum takes a layer to be as fast as in a file of its own kind: it misses conversions between integers and floats
    where layers of both kinds meet. ``files`` of the result has the latency of a file with such layers beside its sum.

    Args:
        prepared: calibrated; it is not changed.
        target: of :data:`infoq_fx.TARGETS`, one that onnxruntime runs.
        threads: that the runtime uses. The time of one thread is that of the processor, which other programs hardly
            change; that of several is wall time.
        runs: of each file, in five turns.

    Raises:
        OptionError: an argument is invalid, the model has no multiplication, or there is no runtime to time the target
            in.
        ExportError: the file cannot be written.
    """
    check_prepared(prepared, "measure_latency")
    check_count("threads", threads, 1)
    check_count("runs", runs, 1)
    if find_target(target).name not in _TIMED:
        raise OptionError(
            f"target {target!r} has no runtime that layers are timed in; give one of {_TIMED}, or load latencies that "
            "were measured elsewhere by infoq_fx.load_latency"
        )
    if not prepared.inventory.operations:
        raise OptionError("the model multiplies nothing; give one with a convolution, linear layer or matrix product")
    with tempfile.TemporaryDirectory() as folder:
        files, owners, shared = _write_files(prepared, target, Path(folder))
        idle, timings = _time_files(files, owners, prepared, threads, runs)
        timings = {name: replace(timing, shared=shared) for name, timing in timings.items()}
    runtime = f"onnxruntime {onnxruntime.__version__}"
    made = add_up(prepared.inventory, idle, timings[_INTEGERS], timings[_WEIGHT_ONLY], timings[_FLOAT])
    made = replace(made, target=target, runtime=runtime, threads=threads)
    return replace(made, files=_compare(made, prepared.inventory, timings))


def add_up(inventory: Inventory, idle_ms: float, integers: Timing, weight_only: Timing, floats: Timing) -> LatencyCost:
    """Make the table of latencies from the timings of the three files.

    The latency of a run is that of an empty graph, ``idle_ms``, and of the nodes; the profiler adds the same to every
    node, which makes up the difference to the latency without it. The rest is that of the integer file. The time of a
    node that computes several operations is divided by their multiply-accumulates.
    """
    sums = [_sum_by_operation(timing, idle_ms, inventory) for timing in (integers, weight_only, floats)]
    rest = max(integers.whole_ms - sum(sums[0].values()), 0.0)
    tables = [{name: round(value, _DECIMALS) for name, value in found.items()} for found in sums]
    return LatencyCost(
        target=DEFAULT_TARGET,
        runtime="",
        threads=1,
        integer_ms=tables[0],
        weight_only_ms=tables[1],
        float_ms=tables[2],
        rest_ms=round(rest, _DECIMALS),
    )


def split_layers(inventory: Inventory, shared: Mapping[str, tuple[str, ...]]) -> set[str | None]:
    """Return the operations of every second quarter of the model; those of one node stay together."""
    names = [operation.name for operation in inventory.operations]
    chosen = {name for index, name in enumerate(names) if index * _QUARTERS // len(names) % 2}
    for first, others in shared.items():
        chosen = chosen | set(others) if first in chosen else chosen - set(others)
    return set(chosen)


def _sum_by_operation(timing: Timing, idle_ms: float, inventory: Inventory) -> dict[str, float]:
    added = _find_added(list(timing.nodes_ms.values()), timing.whole_ms - idle_ms)
    macs = {operation.name: operation.macs for operation in inventory.operations}
    found = dict.fromkeys(macs, 0.0)
    for name, value in timing.nodes_ms.items():
        owner = timing.owners.get(name)
        if owner is not None:
            together = timing.shared.get(owner, (owner,))
            total = sum(macs[each] for each in together)
            for each in together:
                found[each] += max(value - added, 0.0) * (macs[each] / total if total else 1 / len(together))
    return found


def _find_added(values: list[float], total: float) -> float:
    """What the profiler adds to each node: without it, and with none below 0, the nodes take ``total``."""
    held = sorted(values)
    while held and held[0] < (added := (sum(held) - max(total, 0.0)) / len(held)):
        held = [value for value in held if value >= added]
    return (sum(held) - max(total, 0.0)) / len(held) if held else 0.0


def _compare(cost: LatencyCost, inventory: Inventory, timings: Mapping[str, Timing]) -> tuple[FileLatency, ...]:
    """The measured latency of each file beside the sum of its layers."""
    in_float = split_layers(inventory, timings[_INTEGERS].shared)
    sums = {
        _INTEGERS: sum(cost.integer_ms.values()),
        _WEIGHT_ONLY: sum(cost.weight_only_ms.values()),
        _FLOAT: sum(cost.float_ms.values()),
        _MIXED: sum((cost.float_ms if name in in_float else cost.integer_ms)[name] for name in cost.integer_ms),
    }
    return tuple(
        FileLatency(name, round(timing.whole_ms, _DECIMALS), round(sums[name] + cost.rest_ms, _DECIMALS))
        for name, timing in timings.items()
    )


def _write_files(
    prepared: PreparedModel, target: str, folder: Path
) -> tuple[dict[str, Path], list[str | None], dict[str, tuple[str, ...]]]:
    """The file at 8 bits and those with layers in float, the operation of each node, and those that share a node."""
    bits = {site.name: BASELINE_BITS for site in prepared.inventory.sites}
    quantized = convert_prepared(prepared, Allocation(bits=bits), None)
    path = export_onnx(quantized, folder / "integers.onnx", container="int8", target=target)
    model = onnx.load(path)
    owners, shared = find_owners(model.graph, prepared.inventory), find_shared(model.graph, prepared.inventory)
    tag_nodes(model.graph)
    every: set[str | None] = {None, *owners}
    in_float = {_INTEGERS: set(), _WEIGHT_ONLY: every, _FLOAT: every, _MIXED: split_layers(prepared.inventory, shared)}
    files = {}
    for index, (name, layers) in enumerate(in_float.items()):
        made = onnx.ModelProto()
        made.CopyFrom(model)
        drop_quantization(made, owners, layers, keep_weights=name == _WEIGHT_ONLY)
        files[name] = folder / f"file{index}.onnx"
        onnx.save(made, files[name])
    return files, owners, shared


def _time_files(
    files: Mapping[str, Path], owners: Sequence[str | None], prepared: PreparedModel, threads: int, runs: int
) -> tuple[float, dict[str, Timing]]:
    """The latency of an empty graph, and the timings of all files, which run in turns."""
    given = prepared.form.file_inputs(prepared.example_inputs)
    feeds = {name: x.detach().cpu().numpy() for name, x in given.items()}
    if prepared.batch_size is None:
        feeds = {name: x[:1] for name, x in feeds.items()}
    plain = {name: open_session(path, threads) for name, path in files.items()}
    profiled = {
        name: open_session(files[name], threads, is_profiled=True) for name in (_INTEGERS, _WEIGHT_ONLY, _FLOAT)
    }
    calls = {name: partial(session.run, None, feeds) for name, session in plain.items()}
    calls |= {f"{name}, profiled": partial(session.run, None, feeds) for name, session in profiled.items()}
    idle = "an empty graph"
    calls[idle] = partial(open_empty_session(threads).run, None, EMPTY_FEED)
    spent = take_turns(calls, runs, time.thread_time if threads == 1 else time.perf_counter)
    timings = {name: Timing(spent[name]) for name in plain}
    for name, session in profiled.items():
        nodes = read_profile(json.loads(Path(session.end_profiling()).read_text()))
        graph = onnx.load(optimized_path(files[name]), load_external_data=False).graph
        timings[name] = Timing(spent[name], nodes, find_optimized_owners(graph, owners))
    return spent[idle], timings

"""Runs files in onnxruntime: sessions with and without its profiler, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from infoq_fx.core.targets import IR_VERSION, OPSET_VERSION

__all__ = ["EMPTY_FEED", "open_empty_session", "open_session", "optimized_path", "read_profile", "take_turns"]

EMPTY_FEED: Mapping[str, Any] = {"x": np.zeros(1, np.float32)}
_TURNS = 5
_WARM_UP = 3  # first runs of each turn, which are not timed
_KERNEL = "_kernel_time"


def open_session(path: Path, threads: int, *, is_profiled: bool = False) -> Any:
    """Open a file in onnxruntime; with the profiler, also write the graph that it runs to :func:`optimized_path`."""
    options = _make_options(threads)
    if is_profiled:
        options.enable_profiling, options.profile_file_prefix = True, str(path.with_suffix(""))
        options.optimized_model_filepath = str(optimized_path(path))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def open_empty_session(threads: int) -> Any:
    """Open a graph that copies ``EMPTY_FEED``, which takes what every run takes besides its nodes."""
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "empty", [x], [y])
    opset = onnx.helper.make_opsetid("", OPSET_VERSION)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(model.SerializeToString(), _make_options(threads), providers=providers)


def optimized_path(path: Path) -> Path:
    """Return where the graph that the runtime makes of a file is written."""
    return path.with_suffix(".optimized.onnx")


def take_turns(calls: Mapping[str, Callable[[], Any]], runs: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return the median time of each call in milliseconds, over at least ``runs`` of each in five turns."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_TURNS):
        for name, call in calls.items():
            for run in range(_WARM_UP + -(-runs // _TURNS)):
                start = clock()
                call()
                if run >= _WARM_UP:
                    spent[name].append(1e3 * (clock() - start))
    return {name: statistics.median(found) for name, found in spent.items()}


def read_profile(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the median time of each node in one run, in milliseconds, from onnxruntime's profile in microseconds."""
    spent: dict[str, list[float]] = {}
    runs = 0
    for event in events:
        name = str(event.get("name"))
        runs += name == "model_run"
        if event.get("cat") == "Node" and name.endswith(_KERNEL):
            spent.setdefault(name.removesuffix(_KERNEL), []).append(float(event["dur"]))
    # A node in a loop runs several times in one run of the model.
    return {name: statistics.median(found) * len(found) / max(runs, 1) / 1e3 for name, found in spent.items()}


def _make_options(threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    return options

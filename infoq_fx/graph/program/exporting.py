"""Calls ``torch.export``: one call at a time in a process, with dynamic axes, and without torch's warnings."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch._guards import tracing
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from infoq_fx.graph.program.recurrent_shapes import inferring_recurrent_shapes

__all__ = ["ExampleInputs", "FreeAxes", "export_quietly", "exporting", "load_quietly"]

ExampleInputs = Sequence[Tensor] | Mapping[str, Tensor]
FreeAxes = Mapping[str | int, Sequence[int]]
"""Axes that stay free besides the first, by an input's name, or by its position where inputs are positional."""

# torch.export is not made for threads: it swaps a module's parameters while it runs.
_LOCK = threading.RLock()
_LOGGERS = (
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch.onnx._internal.exporter._core",
    "onnx_ir.passes.common.initializer_deduplication",
)


class _WithoutFastPath(TorchFunctionMode):
    """Does nothing; while it is active in a thread, torch's encoder layers do not take their fused path there.

    That path would hide the linear layers. The switch that torch has for it is one for all threads.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """Let one thread at a time trace a model; torch's warnings and messages about it stay inside.

    What Dynamo is tracing meanwhile, if it calls this as a backend, does not see it: it would take the sizes that are
    found here for its own. Garbage is not collected: of a trace's many small objects that takes a fifth of the time.
    """
    thread = threading.get_ident()

    def is_of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    with _LOCK, _without_collection(), tracing(None), warnings.catch_warnings(), inferring_recurrent_shapes():
        warnings.simplefilter("ignore")
        loggers = [logging.getLogger(name) for name in _LOGGERS]
        for logger in loggers:
            logger.addFilter(is_of_others)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(is_of_others)


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def load_quietly(source: str | IO[bytes]) -> ExportedProgram:
    """Run ``torch.export.load`` on a file without the warnings of torch's own that come with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.load(source)


def export_quietly(
    module: nn.Module,
    example_inputs: ExampleInputs,
    free_axes: FreeAxes | None = None,
    *,
    is_batch_free: bool = True,
) -> ExportedProgram:
    """Call ``torch.export`` with a dynamic first dimension on every input that has one.

    Args:
        module: any module that ``torch.export`` takes.
        example_inputs: at least two samples, by position or by name.
        free_axes: further axes that are dynamic where the exporter finds that they can be.
        is_batch_free: whether the first dimension is dynamic; else it has the example's size.
    """
    axes, first = free_axes or {}, (0,) if is_batch_free else ()

    def shape_of(key: str | int, x: Tensor) -> dict[int, Any] | None:
        return dict.fromkeys((*first, *axes.get(key, ())), torch.export.Dim.AUTO) if x.ndim else None

    if isinstance(example_inputs, Mapping):
        args: tuple[Tensor, ...] = ()
        kwargs: dict[str, Tensor] = dict(example_inputs)
        shapes: Any = {name: shape_of(name, x) for name, x in kwargs.items()}
    else:
        args, kwargs = tuple(example_inputs), {}
        shapes = _group_open(module, [shape_of(index, x) for index, x in enumerate(args)])
    if any(isinstance(part, nn.LSTM) and part.proj_size for part in module.modules()):
        _warn_of_projections_once()
    with exporting(), _WithoutFastPath():
        return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)


@functools.cache
def _warn_of_projections_once() -> None:
    """Let torch warn here, unseen, that an LSTM with a projection is not for oneDNN; it does so once in a process."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        nn.LSTM(1, 2, proj_size=1)(torch.zeros(1, 1, 1))


def _group_open(module: nn.Module, shapes: list[Any]) -> tuple[Any, ...]:
    """The shapes as ``torch.export`` asks for them: those of ``*xs`` in one tuple."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    first = next((i for i, x in enumerate(parameters) if x.kind is x.VAR_POSITIONAL), len(shapes))
    return tuple(shapes) if first >= len(shapes) else (*shapes[:first], tuple(shapes[first:]))

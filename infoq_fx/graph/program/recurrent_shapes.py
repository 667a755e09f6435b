"""Infers the shapes of recurrent layers, which torch finds by running all steps, a tenth of a second each."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch._decomp import decomposition_table

from infoq_fx.graph.layers import RECURRENT_OPS

__all__ = ["infer_recurrent", "inferring_recurrent_shapes"]


def infer_recurrent(
    source: Tensor,
    state: Tensor | Sequence[Tensor],
    parameters: Sequence[Tensor],
    has_biases: bool,
    levels: int,
    dropout: float,
    is_training: bool,
    is_bidirectional: bool,
    is_batch_first: bool,
) -> tuple[Tensor, ...]:
    """Return tensors of the shapes and strides of a recurrent layer's results; arguments are those of its operator."""
    states = (state,) if isinstance(state, Tensor) else tuple(state)
    width = states[0].shape[-1] * (2 if is_bidirectional else 1)
    steps, samples = (source.shape[1], source.shape[0]) if is_batch_first else source.shape[:2]
    output = source.new_empty((steps, samples, width))
    return (output.transpose(0, 1) if is_batch_first else output, *(x.new_empty(x.shape) for x in states))


@contextlib.contextmanager
def inferring_recurrent_shapes() -> Iterator[None]:
    """Let torch infer recurrent layers as :func:`infer_recurrent` does, in this thread."""
    thread = threading.get_ident()

    def choose(known: Any) -> Any:
        def infer(*args: Any, **kwargs: Any) -> Any:
            return (infer_recurrent if threading.get_ident() == thread else known)(*args, **kwargs)

        return infer

    # torch asks the one or the other, depending on what traces.
    kernels = [(operation, key, known) for operation in RECURRENT_OPS for key, known in operation.py_kernels.items()]
    table = {operation: decomposition_table[operation] for operation in RECURRENT_OPS}
    try:
        for operation, key, known in kernels:
            _set_kernel(operation, key, choose(known))
        decomposition_table.update({operation: choose(known) for operation, known in table.items()})
        yield
    finally:
        decomposition_table.update(table)
        for operation, key, known in kernels:
            _set_kernel(operation, key, known)


def _set_kernel(operation: Any, key: Any, kernel: Any) -> None:
    operation.py_kernels[key] = kernel
    operation._dispatch_cache.clear()

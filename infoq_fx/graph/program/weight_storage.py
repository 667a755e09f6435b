"""Where the weights of a graph are: in memory, or mapped from disk if they are large."""

from __future__ import annotations

import copy
import gc

import torch
from torch import Tensor, fx, nn

from infoq_fx.core.memory import copy_to_disk, return_free_memory
from infoq_fx.graph.layers import write_tensor

__all__ = ["copy_graph_module", "move_to_disk"]

_LARGE_BYTES = 1 << 20  # of a tensor
_WORTH_A_FILE_BYTES = 64 << 20  # of all large tensors together


def move_to_disk(graph_module: fx.GraphModule) -> None:
    """Map large parameters and buffers of the CPU from disk, in place, where they take 64 MiB or more together.

    Without room on the disk they stay in memory.
    """
    copies = _copy_large(graph_module)
    if not copies:
        return
    for name, x in _tensors_of(graph_module):
        if id(x) in copies:
            write_tensor(graph_module, name, copies[id(x)])
    gc.collect()  # earlier copies of the graph are in reference cycles
    return_free_memory()


def copy_graph_module(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return a deep copy; large tensors of it are mapped from disk where they take 64 MiB or more together."""
    with torch.inference_mode(False), torch.no_grad():
        known = {id(x): x for _, x in _tensors_of(graph_module)}
        copies = {
            key: nn.Parameter(x, known[key].requires_grad) if isinstance(known[key], nn.Parameter) else x
            for key, x in _copy_large(graph_module).items()
        }
        return copy.deepcopy(graph_module, copies)


def _copy_large(graph_module: fx.GraphModule) -> dict[int, Tensor]:
    """Copies of large tensors on disk, by the ids of the tensors; none if all are small."""
    tensors = {
        id(x): x for _, x in _tensors_of(graph_module) if x.device.type == "cpu" and _bytes_of(x) >= _LARGE_BYTES
    }
    if sum(map(_bytes_of, tensors.values())) < _WORTH_A_FILE_BYTES:
        return {}
    with torch.inference_mode(False):
        return dict(zip(tensors, copy_to_disk(list(tensors.values())), strict=True))


def _tensors_of(graph_module: fx.GraphModule) -> list[tuple[str, Tensor]]:
    parameters = graph_module.named_parameters(remove_duplicate=False)
    return [*parameters, *graph_module.named_buffers(remove_duplicate=False)]


def _bytes_of(x: Tensor) -> int:
    return x.numel() * x.element_size()

"""A hash of everything that determines the result of a run, used as a cache key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.version import __version__
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.types import Plain

__all__ = ["digest_run", "name_function"]


def digest_run(
    prepared: PreparedModel,
    data: CalibrationData | None,
    settings: Mapping[str, Plain],
    *,
    batch_size: int,
    bits: Mapping[str, int] | None = None,
) -> str:
    """Return a hash of everything that determines measurements, except the site and its bit-width.

    It covers the versions of the package and of torch, the graph, all its weights, the qparams of the baseline, the
    data and the settings of the criterion, and the batch size, which affects the last bits of some sums. With ``bits``,
    by site, the qparams at these bit-widths are included too.
    """
    device = prepared.device.type
    parts: list[str | Tensor] = [__version__, torch.__version__, device, str(batch_size)]
    parts.append(json.dumps(dict(settings), sort_keys=True))
    parts += [repr(prepared.readings), name_function(prepared.loss_function)]
    for node in prepared.graph_module.graph.nodes:
        parts.append(f"{node.op} {node.name} {node.target} {node.args} {node.kwargs}")
    quantizers = [quantizer for _, quantizer in prepared.quantizer_nodes()]
    of_quantizers = {id(buffer) for quantizer in quantizers for buffer in quantizer.buffers()}
    for name, tensor in prepared.graph_module.state_dict(keep_vars=True).items():
        if id(tensor) not in of_quantizers:
            parts += [name, tensor]
    for quantizer in quantizers:
        name = quantizer.site.name
        base = quantizer.site.baseline_bits
        for width in [base, *([] if bits is None else [bits.get(name, base)])]:
            qparams = quantizer.qparams_at(width)
            parts += [name, qparams.scale, qparams.zero_point]
    for name, tensor in data.inputs.items() if data is not None else ():
        parts += [name, tensor]
    parts.append("no labels" if data is None or data.labels is None else data.labels)
    return _digest(parts)


def name_function(function: Callable[..., Any] | None) -> str:
    """Return the name of a user's function, with its code: another function of the same name is another one."""
    if function is None:
        return "no function"
    code = getattr(function, "__code__", None)
    content = b"" if code is None else code.co_code + repr(code.co_consts).encode()
    return f"{getattr(function, '__qualname__', type(function).__qualname__)} {hashlib.blake2b(content).hexdigest()}"


def _digest(parts: Iterable[str | Tensor]) -> str:
    """Hash every part after its length or shape, so that parts cannot run together."""
    found = hashlib.blake2b(digest_size=20)
    for part in parts:
        if isinstance(part, str):
            text = part.encode()
            found.update(b"text %d " % len(text) + text)
        else:
            found.update(f"{part.dtype} {list(part.shape)} ".encode())
            found.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()

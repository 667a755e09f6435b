"""A hash of everything that determines the result of a run, used as a cache key."""

from __future__ import annotations

import functools
import hashlib
import json
import secrets
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.version import __version__
from infoq_fx.quantization.codebooks import CODEBOOK_VERSION
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.types import Plain

__all__ = ["digest_run", "name_function"]

_DEEPEST = 8  # values within values of a function
_PROCESS = secrets.token_bytes(8)


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
        levels = quantizer.site.levels
        parts.append("uniform" if levels == "uniform" else f"{levels} {CODEBOOK_VERSION}")
        parts += [f"follows {quantizer.site.follows}"] if quantizer.site.follows else []
        base = quantizer.site.baseline_bits
        for width in [base, *([] if bits is None else [bits.get(name, base)])]:
            qparams = quantizer.qparams_at(width)
            parts += [name, qparams.scale, qparams.zero_point]
            parts += [] if qparams.levels is None else [qparams.levels]
    for name, tensor in data.inputs.items() if data is not None else ():
        parts += [name, tensor]
    parts.append("no labels" if data is None or data.labels is None else data.labels)
    return _digest(parts)


def name_function(function: Callable[..., Any] | None) -> str:
    """Return the name of a user's function with a hash of its code and of all values that it holds.

    Another function of the same name, or the same one with other values, has another name. A function that holds a
    value that cannot be told from others has another name in every process, so that nothing is reused for it.
    """
    if function is None:
        return "no function"
    found = hashlib.blake2b(digest_size=20)
    for part in _describe_value(function):
        found.update(part)
    return f"{getattr(function, '__qualname__', type(function).__qualname__)} {found.hexdigest()}"


def _describe_value(value: Any, depth: int = 0) -> Iterator[bytes]:
    """Bytes that differ where values differ: of code, closures, bound values, attributes, collections and tensors."""
    yield f"{type(value).__module__}.{type(value).__qualname__} ".encode()
    inner: list[Any] | None = None
    if isinstance(value, functools.partial):
        inner = [value.func, value.args, value.keywords]
    elif isinstance(value, types.MethodType):
        inner = [value.__func__, value.__self__]
    elif isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        inner = [value.__qualname__, value.__code__, cells, value.__defaults__, value.__kwdefaults__]
    elif isinstance(value, types.CodeType):
        yield value.co_code
        inner = [*value.co_names, *value.co_consts]
    elif isinstance(value, Tensor):
        yield f"{value.dtype} {list(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return
    elif isinstance(value, Mapping):
        inner = [x for pair in value.items() for x in pair]
    elif isinstance(value, list | tuple):
        inner = list(value)
    elif isinstance(value, str | bytes | int | float | None | types.BuiltinFunctionType | type):
        yield repr(value).encode()
        return
    elif hasattr(value, "__dict__") and not isinstance(value, types.ModuleType):
        inner = [vars(value)]
    if inner is None or depth >= _DEEPEST:  # known in this process only
        yield _PROCESS + str(id(value)).encode()
        return
    for one in inner:
        yield from _describe_value(one, depth + 1)


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

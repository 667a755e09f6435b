"""Quantization where PyTorch's own flows expect it: a pass for FX pass managers, a backend for torch.compile."""

from __future__ import annotations

import dataclasses
import glob
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from infoq_fx.api import convert, prepare, quantize, recover
from infoq_fx.capture import export_quietly
from infoq_fx.data import read_data
from infoq_fx.errors import OptionError, UnsupportedModelError, unknown_name_error
from infoq_fx.passes.annotate_bits import read_bits
from infoq_fx.passes.layers import module_path
from infoq_fx.prepared import PreparedModel
from infoq_fx.quantized import QuantizedModule
from infoq_fx.quantizers import decompose_in_inductor
from infoq_fx.spec import MAX_BITS, Allocation, Budget

__all__ = ["InfoqPass", "backend"]

# What an allocation leaves to be chosen.
_ALLOCATION_OPTIONS = ("calibration_data", "example_inputs", "recovery", "device", "cache_dir", "progress")
_FIXED_OUTPUT = ".output"  # is in the names of sites that no allocation chooses
# How Dynamo calls the tensors of modules: L['self']._modules['head']._parameters['weight']
_MODULE_TENSOR = re.compile(r"(?P<root>.*?)(?P<path>(?:\._modules\['[^']+'\])*\._(?:parameters|buffers)\['[^']+'\])")
_PATH_PART = re.compile(r"\['([^']+)'\]")

CompiledGraph = Callable[..., Any]
Compiler = Callable[[fx.GraphModule, Sequence[Any]], CompiledGraph]


class InfoqPass(PassBase):
    """Quantization as a pass: ``PassManager([InfoqPass(3.0, calibration_data=loader)])(graph_module)``.

    A graph that is quantized already is returned as it is, so that a manager with several ``steps`` comes to an end.

    Args:
        target: mean weight bit-width, a :class:`infoq_fx.Budget`, or an :class:`infoq_fx.Allocation` found before.
        calibration_data: see :func:`infoq_fx.quantize`.
        options: those of :func:`infoq_fx.quantize`; with an allocation only ``example_inputs``, ``recovery``,
            ``device``, ``cache_dir`` and ``progress``.

    Raises:
        OptionError: an argument cannot be used. Errors of the run are those of :func:`infoq_fx.quantize`; a manager
            wraps them and keeps them as the cause.
    """

    def __init__(self, target: float | Budget | Allocation, calibration_data: Any = None, **options: Any) -> None:
        _check_options("InfoqPass", target, options)
        self._target, self._options = target, {"calibration_data": calibration_data, **options}

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """The quantized module of a float graph, traced or exported; the float graph stays as it was."""
        if read_bits(graph_module.graph):
            return PassResult(graph_module, False)
        return PassResult(_quantize(graph_module, self._target, self._options), True)


def backend(
    target: float | Budget | Allocation,
    calibration_data: Any = None,
    *,
    inner: str | Compiler = "inductor",
    **options: Any,
) -> Compiler:
    """A backend: ``torch.compile(model, backend=infoq_fx.backend(allocation, loader), fullgraph=True)``.

    The first call of the compiled model quantizes the graph that Dynamo captured and hands it on to ``inner``; sites
    bear the names that :func:`infoq_fx.quantize` gives them. A recompilation for another batch size takes the same
    quantized graph where Dynamo captured the same one.

    Args:
        target: mean weight bit-width, a :class:`infoq_fx.Budget`, or an :class:`infoq_fx.Allocation` found before.
        calibration_data: see :func:`infoq_fx.quantize`; without it the batch of the first call, with a warning.
        inner: what compiles the quantized graph: the name of a backend or a backend itself.
        options: see :class:`InfoqPass`; the device is that of the model.

    Returns:
        For ``torch.compile``, which raises what goes wrong as its ``BackendCompilerFailed`` with the error below as
        ``inner_exception``.

    Raises:
        OptionError: an argument cannot be used, or an allocation of another model.
        UnsupportedModelError: the model is in training mode, or Dynamo captured only a part of it.
        CalibrationDataError: the data cannot be used.
    """
    _check_options("backend", target, options)
    if "device" in options:
        raise OptionError("backend() takes no device: move the model, which runs where its parameters are")
    compile_inner, finished = _find_backend(inner), list[_Finished]()

    def compile_graph(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> CompiledGraph:
        graph = _read_dynamo_graph(graph_module, example_inputs)
        quantized = next((done.quantized for done in finished if done.graph.equals(graph)), None)
        if quantized is None:
            quantized = _quantize_captured(graph, example_inputs, target, calibration_data, options)
            finished[:] = [_Finished(graph, quantized)]
        compiled = compile_inner(quantized, [example_inputs[i] for i in graph.inputs])
        return lambda *args: compiled(*(args[i] for i in graph.inputs))

    return compile_graph


def _check_options(face: str, target: Any, options: Mapping[str, Any]) -> None:
    if isinstance(target, bool) or not isinstance(target, int | float | Budget | Allocation):
        found = type(target).__name__
        raise OptionError(f"{face}() got a {found} as its target; give a mean bit-width, a Budget or an Allocation")
    known = [name for name in inspect.signature(quantize).parameters if name not in ("model", "budget")]
    known = list(_ALLOCATION_OPTIONS) if isinstance(target, Allocation) else known
    for name in options:
        if name not in known:
            kind = "an allocation" if isinstance(target, Allocation) else "a budget"
            raise unknown_name_error(f"option of {face}() with {kind}", name, known)


def _quantize(
    model: nn.Module | ExportedProgram, target: float | Budget | Allocation, options: Mapping[str, Any]
) -> QuantizedModule:
    if isinstance(target, Allocation):
        return _quantize_by(model, target, **options)
    return quantize(model, target, **options)


def _quantize_by(
    model: nn.Module | ExportedProgram,
    allocation: Allocation,
    *,
    calibration_data: Any = None,
    example_inputs: Any = None,
    recovery: Any = "fast",
    device: torch.device | str = "cpu",
    cache_dir: Any = None,
    progress: bool = True,
) -> QuantizedModule:
    """Calibrate at an allocation's own bit-widths, recover, convert; layers that it does not know stay in float."""
    data = None if calibration_data is None else read_data(calibration_data)
    examples = example_inputs if data is None else data.example_inputs
    draft = prepare(model, example_inputs=examples, bits=MAX_BITS, activation_bits=None, device=device)
    weights = {site.name for site in draft.inventory.sites}
    known = {glob.escape(name): allocation.bits[name] for name in weights if name in allocation.bits}
    if not known:
        raise OptionError(
            f"the allocation has no layer of this model; its sites are {_shorten(allocation.bits)}, "
            f"the model's {_shorten(weights)}; give one that was found for this model"
        )
    prepared = prepare(
        model,
        data,
        example_inputs=example_inputs,
        bits=MAX_BITS,
        activation_bits=sorted({bits for name, bits in allocation.bits.items() if name not in weights}) or None,
        ignore=[glob.escape(name.rpartition(".")[0] or name) for name in weights if name not in allocation.bits],
        pin=known,
        device=device,
    )
    fitted = _fit_allocation(allocation, prepared)
    if data is not None:
        prepared = recover(prepared, fitted, data, recovery, cache_dir=cache_dir, progress=progress)
    return convert(prepared, fitted)


def _fit_allocation(allocation: Allocation, prepared: PreparedModel) -> Allocation:
    """The allocation for the sites of this capture; those that no allocation chooses may have other names in it."""
    sites = {site.name: site for site in prepared.inventory.sites}
    missing = [name for name in allocation.bits if name not in sites and _FIXED_OUTPUT not in name]
    if missing:
        raise UnsupportedModelError(
            f"{len(missing)} of {len(allocation.bits)} sites of the allocation are not in the captured graph: "
            f"{_shorten(missing)}; if torch.compile broke the model into parts, use fullgraph=True to see where"
        )
    bits = {name: site.bits[0] for name, site in sites.items() if not site.is_searched}
    return dataclasses.replace(allocation, bits=bits | {n: b for n, b in allocation.bits.items() if n in sites})


def _shorten(names: Iterable[str], count: int = 3) -> str:
    held = sorted(names)
    return ", ".join(map(repr, held[:count])) + (f" and {len(held) - count} more" if len(held) > count else "")


def _find_backend(inner: str | Compiler) -> Compiler:
    if callable(inner):
        return inner
    known = torch.compiler.list_backends(exclude_tags=())
    if inner not in known:
        raise unknown_name_error("backend of torch.compile", str(inner), known)
    from torch._dynamo import lookup_backend

    decompose_in_inductor()

    found: Any = lookup_backend(inner)
    compiler: Compiler = found
    return compiler


@dataclass(frozen=True)
class _DynamoGraph:
    """What Dynamo captured, with its tensors under the user's own paths again.

    ``inputs`` are the positions of the user's tensors among the arguments that Dynamo passes; ``versions`` tell the
    model's tensors, by path, from others and from what they were before a change in place.
    """

    module: fx.GraphModule
    inputs: tuple[int, ...]
    versions: Mapping[str, tuple[int, int]]

    def equals(self, other: _DynamoGraph) -> bool:
        """Whether both compute the same from the same tensors."""
        return self.versions == other.versions and self.module.code == other.module.code


@dataclass(frozen=True)
class _Finished:
    graph: _DynamoGraph
    quantized: QuantizedModule


def _read_dynamo_graph(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> _DynamoGraph:
    """Parameters, which Dynamo passes as inputs, become attributes; sizes, passed too, are read from the inputs."""
    graph, copies, taken = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, fx.Node]()
    tensors, inputs, sizes = dict[str, Tensor](), list[int](), dict[fx.Node, str]()
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    sources = {node: _source_of(node) for node in placeholders}
    root = _root_of(sources.values())
    for index, (node, example) in enumerate(zip(placeholders, example_inputs, strict=True)):
        source = sources[node]
        if not isinstance(example, Tensor):
            sizes[node] = source
        elif source.startswith((f"{root}.", "G[")):
            found = _MODULE_TENSOR.fullmatch(source)
            path = ".".join(_PATH_PART.findall(found["path"])) if found else node.name
            tensors[path] = example
            copies[node] = graph.get_attr(path)
        else:
            inputs.append(index)
            copies[node] = taken[source] = graph.placeholder("_".join(re.findall(r"\w+", source.removeprefix("L"))))
    for node, source in sizes.items():
        tensor, _, dimension = source.rpartition(".size()")
        if node.users and tensor not in taken:
            raise UnsupportedModelError(f"the captured graph takes a number, {source}; give the model tensors alone")
        if node.users:
            copies[node] = graph.call_method("size", (taken[tensor], int(dimension.strip("[]"))))
    for node in graph_module.graph.nodes:
        if node.op != "placeholder":
            _refuse_training(node)
            copies[node] = graph.node_copy(node, copies.__getitem__)
            stack = node.meta.get("nn_module_stack") or {}
            within = {key: (path.removeprefix(root).removeprefix("."), kind) for key, (path, kind) in stack.items()}
            copies[node].meta["nn_module_stack"] = within
    if not inputs:
        raise UnsupportedModelError(
            "the captured graph takes no tensor, as torch.compile broke the model into parts; use fullgraph=True"
        )
    held = {**dict(graph_module.named_parameters()), **dict(graph_module.named_buffers()), **tensors}
    versions = {path: (id(tensor), tensor._version) for path, tensor in tensors.items()}
    return _DynamoGraph(fx.GraphModule(held, graph), tuple(inputs), versions)


def _root_of(sources: Iterable[str]) -> str:
    """Where the model itself is found: ``L['self']``, or ``G['model']`` where a function calls it."""
    roots = sorted({found["root"] for source in sources if (found := _MODULE_TENSOR.fullmatch(source))})
    if len(roots) > 1:
        raise UnsupportedModelError(
            f"the compiled function calls {len(roots)} models, {_shorten(roots)}: compile each by itself, "
            "or put them into one module"
        )
    if not roots:
        raise UnsupportedModelError(
            "no layer to quantize: the captured graph has no parameters; compile the whole model"
        )
    return roots[0]


def _source_of(node: fx.Node) -> str:
    """Where Dynamo found an input."""
    argument = node.meta.get("grapharg")
    if argument is None:
        raise OptionError("backend() serves torch.compile alone; use quantize() or InfoqPass for other graphs")
    name = argument.source.name
    return str(name() if callable(name) else name)


def _refuse_training(node: fx.Node) -> None:
    if node.op != "call_function" or not inspect.isfunction(node.target):
        return
    signature = inspect.signature(node.target)
    if "training" in signature.parameters and signature.bind(*node.args, **node.kwargs).arguments.get("training"):
        raise UnsupportedModelError(
            f"the model is in training mode at {module_path(node) or node.name!r}: call model.eval() first"
        )


def _quantize_captured(
    graph: _DynamoGraph,
    example_inputs: Sequence[Any],
    target: float | Budget | Allocation,
    calibration_data: Any,
    options: Mapping[str, Any],
) -> QuantizedModule:
    examples = tuple(example_inputs[i].detach().clone() for i in graph.inputs)
    try:
        program = export_quietly(graph.module, examples)
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        raise UnsupportedModelError(
            f"torch.export cannot take the graph that Dynamo captured: {reason}; quantize() the model itself"
        ) from error
    chosen = {"calibration_data": calibration_data, "device": examples[0].device, **options}
    if calibration_data is None and isinstance(target, Allocation):
        warnings.warn(
            "no calibration data: the ranges of activations are those of the first batch alone; give backend() about "
            "1,000 samples",
            stacklevel=2,
        )
        chosen |= {"calibration_data": [(examples, None)], "recovery": options.get("recovery", "none")}
    return _quantize(program, target, chosen)

"""A backend for ``torch.compile`` that quantizes the graph that Dynamo captured."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from infoq_fx.conversion.quantized import QuantizedModule
from infoq_fx.errors import OptionError, UnsupportedModelError, unknown_name_error
from infoq_fx.export.quantize_target import check_options, quantize_target, shorten_names
from infoq_fx.graph.layers import module_path
from infoq_fx.graph.program.exporting import export_quietly
from infoq_fx.quantization.custom_ops import decompose_in_inductor
from infoq_fx.types import Allocation, Budget

__all__ = ["CompiledGraph", "Compiler", "backend"]


# Dynamo's names for the tensors of modules: L['self']._modules['head']._parameters['weight']
_MODULE_TENSOR = re.compile(r"(?P<root>.*?)(?P<path>(?:\._modules\['[^']+'\])*\._(?:parameters|buffers)\['[^']+'\])")


_PATH_PART = re.compile(r"\['([^']+)'\]")


CompiledGraph = Callable[..., Any]


Compiler = Callable[[fx.GraphModule, Sequence[Any]], CompiledGraph]


def backend(
    target: float | Budget | Allocation,
    calibration_data: Any = None,
    *,
    inner: str | Compiler = "inductor",
    **options: Any,
) -> Compiler:
    """Make a quantizing backend for ``torch.compile(model, backend=infoq_fx.backend(allocation, loader))``.

    Use it with ``fullgraph=True``, so that Dynamo captures the whole model.
    The first call of the compiled model quantizes the graph that Dynamo captured and passes it to ``inner``; sites
    have the names that :func:`infoq_fx.quantize` gives them. A recompilation for another batch size reuses the
    quantized graph if Dynamo captured the same one.

    Args:
        target: mean weight bit-width, a :class:`infoq_fx.Budget`, or an existing :class:`infoq_fx.Allocation`.
        calibration_data: see :func:`infoq_fx.quantize`; without it the batch of the first call, with a warning.
        inner: the backend that compiles the quantized graph, or its name.
        options: see :class:`infoq_fx.InfoqPass`; the device is that of the model.

    Returns:
        A backend for ``torch.compile``, which raises errors as ``BackendCompilerFailed`` with the error below as
        ``inner_exception``.

    Raises:
        OptionError: an argument cannot be used, or the allocation is of another model.
        UnsupportedModelError: the model is in training mode, or Dynamo captured only a part of it.
        CalibrationDataError: the data cannot be used.
    """
    check_options("backend", target, options)
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
    """A graph that Dynamo captured, with its tensors under the user's module paths.

    ``inputs`` are the positions of the user's tensors among the arguments that Dynamo passes. ``versions`` identify
    the model's tensors, by path, and change when a tensor is modified in place.
    """

    module: fx.GraphModule
    inputs: tuple[int, ...]
    versions: Mapping[str, tuple[int, int]]

    def equals(self, other: _DynamoGraph) -> bool:
        """Return whether both graphs compute the same from the same tensors."""
        return self.versions == other.versions and self.module.code == other.module.code


@dataclass(frozen=True)
class _Finished:
    graph: _DynamoGraph
    quantized: QuantizedModule


def _read_dynamo_graph(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> _DynamoGraph:
    """Turn parameters, which Dynamo passes as inputs, into attributes, and read sizes, passed too, from the inputs."""
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
            within = {key: (_module_path(path.removeprefix(root)), kind) for key, (path, kind) in stack.items()}
            copies[node].meta["nn_module_stack"] = within
    if not inputs:
        raise UnsupportedModelError(
            "the captured graph takes no tensor, as torch.compile broke the model into parts; use fullgraph=True"
        )
    held = {**dict(graph_module.named_parameters()), **dict(graph_module.named_buffers()), **tensors}
    versions = {path: (id(tensor), tensor._version) for path, tensor in tensors.items()}
    return _DynamoGraph(fx.GraphModule(held, graph), tuple(inputs), versions)


def _module_path(path: str) -> str:
    """A module's own path; torch before 2.13 writes it as ``._modules['stem']._modules['1']``."""
    return ".".join(_PATH_PART.findall(path)) if "._modules[" in path else path.removeprefix(".")


def _root_of(sources: Iterable[str]) -> str:
    """Dynamo's name of the model itself: ``L['self']``, or ``G['model']`` if a function calls it."""
    roots = sorted({found["root"] for source in sources if (found := _MODULE_TENSOR.fullmatch(source))})
    if len(roots) > 1:
        raise UnsupportedModelError(
            f"the compiled function calls {len(roots)} models, {shorten_names(roots)}: compile each by itself, "
            "or put them into one module"
        )
    if not roots:
        raise UnsupportedModelError(
            "no layer to quantize: the captured graph has no parameters; compile the whole model"
        )
    return roots[0]


def _source_of(node: fx.Node) -> str:
    """Dynamo's name of an input."""
    argument = node.meta.get("grapharg")
    if argument is None:
        raise OptionError("backend() works with torch.compile only; use quantize() or InfoqPass for other graphs")
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
            f"torch.export cannot export the graph that Dynamo captured: {reason}; quantize() the model itself"
        ) from error
    chosen = {"calibration_data": calibration_data, "device": examples[0].device, **options}
    if calibration_data is None and isinstance(target, Allocation):
        warnings.warn(
            "no calibration data: the ranges of activations are those of the first batch alone; give backend() about "
            "1,000 samples",
            stacklevel=2,
        )
        chosen |= {"calibration_data": [(examples, None)], "recovery": options.get("recovery", "none")}
    return quantize_target(program, target, chosen)

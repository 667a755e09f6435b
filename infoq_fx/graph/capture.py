"""Captures a model in normal form: the functional ATen graph of ``torch.export``, batch first."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from infoq_fx.errors import CalibrationDataError, UnsupportedModelError

__all__ = ["BufferTracer", "CapturedModel", "capture", "export_quietly", "flatten_program", "load_quietly"]

_TORCH_FOLDER = str(Path(torch.__file__).parent)
# A view is valid only for the memory layout at capture; quantized values and channels-last images have others.
_VIEWS = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default}


@dataclass(frozen=True)
class CapturedModel:
    """A model in normal form, the result of :func:`capture`.

    ``graph_module`` takes the model's tensor inputs by position or by name, holds copies of its parameters under
    their own paths, and has fake tensors with shapes in ``node.meta["val"]``. ``batch_size`` is None if the
    first dimension of every input is dynamic, else the size that the graph is fixed to.
    """

    graph_module: fx.GraphModule
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    batch_size: int | None


class BufferTracer(fx.Tracer):
    """Tracer that records reads of buffers as nodes.

    Unpickling a graph module traces it again, which would otherwise constant-fold its integer weights.
    """

    proxy_buffer_attributes = True


def capture(
    model: nn.Module | ExportedProgram,
    example_inputs: Sequence[Tensor] | Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
) -> CapturedModel:
    """Capture a model for inference; the model itself is not changed.

    Args:
        model: an ``nn.Module`` (an ``fx.GraphModule`` too), in any mode, or an ``ExportedProgram``.
        example_inputs: one batch of at least two samples, positional or by name, each ``[samples, ...]``.
        device: of the captured copy.

    Returns:
        The functional graph without dropout; views become reshapes, and batch norms are still separate nodes.

    Raises:
        UnsupportedModelError: torch cannot export the model; the message names the module and torch's reason.
        CalibrationDataError: the model itself rejects the example inputs.
    """
    program = model if isinstance(model, ExportedProgram) else _export_module(model, example_inputs)
    _refuse_training_graph(program)
    program = _decompose(program)
    graph_module, input_names, output_names = flatten_program(program, torch.device(device))
    batch_size = _fixed_batch_size(graph_module)
    if batch_size is None:
        _check_inputs(graph_module, input_names, _move(example_inputs, torch.device(device)))
    if batch_size is not None:
        logging.getLogger(__name__).info("the graph is fixed to batches of %d", batch_size)
    return CapturedModel(graph_module, input_names, output_names, batch_size)


def load_quietly(source: str | IO[bytes]) -> ExportedProgram:
    """Run ``torch.export.load`` on a file without the warnings of torch's own that come with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.load(source)


def export_quietly(module: nn.Module, example_inputs: Sequence[Tensor] | Mapping[str, Tensor]) -> ExportedProgram:
    """Call ``torch.export`` with a dynamic first dimension on every input that has one.

    Args:
        module: any module that ``torch.export`` takes.
        example_inputs: at least two samples, by position or by name.
    """
    free = torch.export.Dim.AUTO
    if isinstance(example_inputs, Mapping):
        args: tuple[Tensor, ...] = ()
        kwargs: dict[str, Tensor] = dict(example_inputs)
        shapes: Any = {name: {0: free} if x.ndim else None for name, x in kwargs.items()}
    else:
        args, kwargs = tuple(example_inputs), {}
        shapes = tuple({0: free} if x.ndim else None for x in args)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused encoder layer would hide the linear layers
    try:
        return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def flatten_program(
    program: ExportedProgram, device: torch.device
) -> tuple[fx.GraphModule, tuple[str, ...], tuple[str, ...]]:
    """Turn a program into a graph module that holds its tensors under their own paths.

    Args:
        program: functional; its tensors are copied.
        device: of the copies.

    Returns:
        The graph module, the names of its inputs and the names of its outputs.

    Raises:
        UnsupportedModelError: an input is not a tensor, or the program changes state while it runs.
    """
    if any(_device_of(tensor) != device for tensor in program.state_dict.values()):
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    signature = program.graph_signature
    lifted: dict[str, str] = {}
    input_names = []
    for spec in signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            lifted[spec.arg.name] = str(spec.target)
        elif spec.kind is InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument):
            input_names.append(spec.arg.name)
        elif not isinstance(spec.arg, ConstantArgument):
            raise UnsupportedModelError(f"input {spec.arg.name!r} is a {spec.kind.name}; give the model tensors alone")
    for out in signature.output_specs:
        if out.kind is not OutputKind.USER_OUTPUT:
            raise UnsupportedModelError(
                f"the model changes {out.target!r} while it runs ({out.kind.name}); quantize a stateless model"
            )
    graph, output_names = _copy_graph(program, lifted, set(input_names))
    held = {target: _copy_tensor(program, target, device) for target in lifted.values()}
    graph_module = fx.GraphModule(held, graph, class_name="CapturedModel")
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return graph_module, tuple(input_names), output_names


def _export_module(model: nn.Module, example_inputs: Sequence[Tensor] | Mapping[str, Tensor]) -> ExportedProgram:
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise UnsupportedModelError("the model's parameters are on the meta device: load their values first")
    home = tensors[0].device if tensors else torch.device("cpu")
    at_home = _in_signature_order(model, _move(example_inputs, home))
    with _inference_mode_of(model):
        try:
            return export_quietly(model, at_home)
        except Exception as error:
            place = _place_in_model(error.__traceback__, model)
            _raise_if_inputs_rejected(model, at_home)
            raise UnsupportedModelError(
                f"torch.export cannot capture {type(model).__name__}: {place}: {_first_lines(error)}; "
                "rewrite that part without data-dependent Python control flow, or quantize a submodule"
            ) from error


def _in_signature_order(
    model: nn.Module, inputs: Sequence[Tensor] | Mapping[str, Tensor]
) -> Sequence[Tensor] | Mapping[str, Tensor]:
    if not isinstance(inputs, Mapping):
        return inputs
    order = [name for name in inspect.signature(model.forward).parameters if name in inputs]
    return {name: inputs[name] for name in dict.fromkeys([*order, *inputs])}


def _check_inputs(
    graph_module: fx.GraphModule,
    input_names: Sequence[str],
    example_inputs: Sequence[Tensor] | Mapping[str, Tensor],
) -> None:
    # Fake tensors accept dtypes that real kernels reject.
    if isinstance(example_inputs, Mapping):
        if set(example_inputs) != set(input_names):
            return
        example_inputs = [example_inputs[name] for name in input_names]
    _raise_if_inputs_rejected(graph_module, example_inputs)


def _raise_if_inputs_rejected(model: nn.Module, example_inputs: Sequence[Tensor] | Mapping[str, Tensor]) -> None:
    named = isinstance(example_inputs, Mapping)
    args = () if named else example_inputs
    kwargs = example_inputs if isinstance(example_inputs, Mapping) else {}
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        shown = [*args, *kwargs.values()]
        found = ", ".join(f"{x.dtype} {list(x.shape)}" for x in shown)
        raise CalibrationDataError(
            f"the model rejects a calibration batch of {found}: {_first_lines(error)}; "
            "give inputs of the shape and dtype that the model's forward takes"
        ) from error


@contextlib.contextmanager
def _inference_mode_of(model: nn.Module) -> Iterator[None]:
    # Flags are set one by one: eval() and train() may be overridden, and submodules may differ in mode.
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _place_in_model(traceback: TracebackType | None, model: nn.Module) -> str:
    paths = {id(module): path for path, module in model.named_modules()}
    place = "in its forward"
    while traceback is not None:
        frame = traceback.tb_frame
        owner = frame.f_locals.get("self")
        if id(owner) in paths and not frame.f_code.co_filename.startswith(_TORCH_FOLDER):
            path = paths[id(owner)] or type(model).__name__
            place = f"in {path!r} ({Path(frame.f_code.co_filename).name}:{traceback.tb_lineno})"
        traceback = traceback.tb_next
    return place


def _first_lines(error: BaseException, limit: int = 400) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + " ..."


def _refuse_training_graph(program: ExportedProgram) -> None:
    batch_norm, dropout = torch.ops.aten.batch_norm.default, torch.ops.aten.dropout.default
    for node in program.graph.nodes:
        trains = (node.target is batch_norm and node.args[5]) or (node.target is dropout and node.args[2])
        if trains:
            raise UnsupportedModelError(
                f"the program was exported in training mode ({node.name}): call model.eval() before torch.export"
            )


def _decompose(program: ExportedProgram) -> ExportedProgram:
    try:
        # An empty table makes the graph functional without decomposing conv2d, linear and attention.
        functional: ExportedProgram = program.run_decompositions({})
        return functional
    except Exception as error:
        raise UnsupportedModelError(
            f"torch.export cannot make the graph functional: {_first_lines(error)}; "
            "rewrite the in-place parts of the model"
        ) from error


def _copy_graph(
    program: ExportedProgram, lifted: Mapping[str, str], input_names: set[str]
) -> tuple[fx.Graph, tuple[str, ...]]:
    graph = fx.Graph(tracer_cls=BufferTracer)
    copies: dict[fx.Node, fx.Node] = {}
    output_names: tuple[str, ...] = ()
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in lifted:
            copies[node] = graph.get_attr(lifted[node.name])
            copies[node].meta = dict(node.meta)
        elif node.op == "placeholder" and node.name not in input_names:
            continue  # a constant argument: torch.export specialised on its value
        elif node.op == "output":
            flat = [copies[x] if isinstance(x, fx.Node) else x for x in node.args[0]]
            value, output_names = _restore_outputs(program, flat)
            graph.output(value)
        elif _is_dropout_or_assert(node):
            if node.args and isinstance(node.args[0], fx.Node):
                copies[node] = copies[node.args[0]]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.target in _VIEWS:
                copies[node].target = torch.ops.aten.reshape.default
    return graph, output_names


def _is_dropout_or_assert(node: fx.Node) -> bool:
    name = str(node.target)
    is_dropout = name.startswith("aten.") and "dropout" in name
    return node.op == "call_function" and (is_dropout or "_assert" in name or "sym_constrain_range" in name)


def _restore_outputs(program: ExportedProgram, flat: list[Any]) -> tuple[Any, tuple[str, ...]]:
    """The structure of the model's own outputs as far as a graph can hold it, and a name for each tensor."""
    value = program.call_spec.out_spec.unflatten(flat)
    if isinstance(value, Mapping):
        value = dict(value)
        names = [str(key) for key, item in value.items() if isinstance(item, fx.Node)]
        if len(names) == len(flat):
            return value, tuple(names)
    elif isinstance(value, fx.Node):
        return value, ("output",)
    elif not (isinstance(value, tuple | list) and all(isinstance(item, fx.Node) for item in value)):
        value = tuple(flat)
    return value, tuple(f"output_{i}" for i, item in enumerate(flat) if isinstance(item, fx.Node))


def _copy_tensor(program: ExportedProgram, target: str, device: torch.device) -> Tensor:
    source = program.state_dict.get(target)
    is_parameter = isinstance(source, nn.Parameter)
    if source is None:
        source = program.constants[target]
    copied = source.detach().to(device, copy=True)
    return nn.Parameter(copied, requires_grad=False) if is_parameter else copied


def _device_of(tensor: Tensor) -> torch.device:
    # "cuda" and "cuda:0" are one device when only one is meant.
    return torch.device(tensor.device.type) if tensor.device.index in (None, 0) else tensor.device


def _move(
    inputs: Sequence[Tensor] | Mapping[str, Tensor], device: torch.device
) -> Sequence[Tensor] | Mapping[str, Tensor]:
    if isinstance(inputs, Mapping):
        return {name: x.to(device) for name, x in inputs.items()}
    return tuple(x.to(device) for x in inputs)


def _fixed_batch_size(graph_module: fx.GraphModule) -> int | None:
    for node in graph_module.graph.nodes:
        # A size that the graph specialised is still a SymInt.
        if node.op == "placeholder" and node.meta["val"].ndim and is_concrete_int(node.meta["val"].shape[0]):
            return int(node.meta["val"].shape[0])
    return None

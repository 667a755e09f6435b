"""Exports a quantized module as a QDQ ONNX file."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from infoq_fx.conversion.quantized import find_wide_weights, provenance_of
from infoq_fx.core.targets import DEFAULT_TARGET, OPSET_VERSION, TARGETS, Container, Target, find_container, find_target
from infoq_fx.errors import OptionError
from infoq_fx.export.qdq_onnx.finishing import METADATA_KEY, finish
from infoq_fx.export.qdq_onnx.lowering import lower
from infoq_fx.export.qdq_onnx.quant_nodes import lower_to_quant
from infoq_fx.export.qdq_onnx.translation.tracing import trace
from infoq_fx.export.qdq_onnx.writing import check_file, folder_beside, write_model

__all__ = ["METADATA_KEY", "export_onnx"]


def export_onnx(
    quantized: nn.Module,
    path: str | os.PathLike[str],
    *,
    container: str | None = None,
    target: str = DEFAULT_TARGET,
    external_data: bool = False,
) -> Path:
    """Write a quantized module as QDQ ONNX with a dynamic batch, integer weights and int32 biases.

    Containers, both with opset 18 and IR version 8:

    - ``"exact"``: weights of b bits take b bits each, packed, and operators on constants turn them into int8. Runtimes
      compute these once, as they load: onnxruntime and OpenVINO then run what they run for ``"int8"``. Scales take a
      byte and biases two where they can.
    - ``"int8"``: int8 with values within the bit-width, for runtimes that compute no constants as they load.

    Target ``"qonnx"`` has no container: the file has ``Quant`` nodes of the domain ``qonnx.custom_op.general`` with
    every site's bit-width and a batch of 1, for FINN and hls4ml. It takes uniform levels:
    ``quantize(levels="uniform")``.

    Weights of 8 bits may be uint8 around zero point 128 in both.

    An activation of fewer than 8 bits is QuantizeLinear, Clip on the uint8 value, DequantizeLinear. Initializers and
    layers are named by module paths. The metadata has the allocation as JSON under ``METADATA_KEY``, and
    ``infoq.container`` and ``infoq.version``. The file is moved to its path only after it passes the ONNX checker and
    a run in onnxruntime agrees with the module.

    Args:
        quantized: what :func:`infoq_fx.quantize` or :func:`infoq_fx.convert` returned.
        path: of the file; its folder must exist.
        container: of :data:`infoq_fx.CONTAINERS`; None for the target's first, or for QONNX.
        target: the runtime of :data:`infoq_fx.TARGETS` that the file is for.
        external_data: store tensors in ``<path>.data``; models above 2 GB always do.

    Returns:
        The path.

    Raises:
        OptionError: the module is not a quantized module, the container or target is unknown, or a container is given
            for QONNX, or a weight has other levels than uniform ones there.
        ExportError: the path cannot be written, torch cannot export the graph, or a check failed; no file is left,
            and a previous file is not changed.
    """
    provenance = provenance_of(quantized)
    if provenance is None:
        raise OptionError(f"{type(quantized).__name__} is not a quantized module; pass what quantize() returned")
    runtime = find_target(target)
    chosen = _choose_container(container, runtime)
    if not isinstance(path, str | os.PathLike):
        raise OptionError(f"path={path!r}; give the path of the file, such as 'model.onnx'")
    place = Path(path)
    if chosen is None:
        _check_uniform(quantized)
    with folder_beside(place) as folder:
        model = trace(quantized, provenance, OPSET_VERSION, has_fixed_sizes=chosen is None)
        if chosen is None:
            lower_to_quant(model)
        else:
            lower(model, chosen, runtime)
        finish(model, provenance.allocation, chosen)
        write_model(model, folder / place.name, external_data=external_data)
        check_file(folder / place.name, quantized, provenance)
    return place


def _check_uniform(quantized: nn.Module) -> None:
    """Check that weights have integers of their bit-width, which Quant nodes can state."""
    found = find_wide_weights(quantized)
    if found:
        raise OptionError(
            f"target 'qonnx' takes integers of b bits, and {len(found)} weights have mirrored ranges or codebooks, as "
            f"{found[0]!r}; quantize with levels='uniform'"
        )


def _choose_container(asked: str | None, target: Target) -> Container | None:
    if target.containers:
        return find_container(asked or target.containers[0])
    if asked is not None:
        packed = " or ".join(repr(other.name) for other in TARGETS.values() if asked in other.containers)
        raise OptionError(
            f"container={asked!r} is given for target {target.name!r}, whose files hold floats and say the bits of "
            f"each site in Quant nodes; leave the container out{', or give target ' + packed if packed else ''}"
        )
    return None

"""Quantization as a pass for the pass managers of ``torch.fx``."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from infoq_fx.export.quantize_target import check_options, quantize_target
from infoq_fx.graph.passes.annotate_bits import read_bits
from infoq_fx.types import Allocation, Budget

__all__ = ["InfoqPass"]


class InfoqPass(PassBase):
    """Quantization as a graph pass: ``PassManager([InfoqPass(3.0, calibration_data=loader)])(graph_module)``.

    A graph that is already quantized is returned unchanged, so that a manager with several ``steps`` terminates.

    Args:
        target: mean weight bit-width, a :class:`infoq_fx.Budget`, or an existing :class:`infoq_fx.Allocation`.
        calibration_data: see :func:`infoq_fx.quantize`.
        options: those of :func:`infoq_fx.quantize`; with an allocation only ``example_inputs``, ``recovery``,
            ``seed``, ``device``, ``cache_dir`` and ``progress``.

    Raises:
        OptionError: an argument cannot be used. Errors of the run are those of :func:`infoq_fx.quantize`; a manager
            wraps them and keeps them as the cause.
    """

    def __init__(self, target: float | Budget | Allocation, calibration_data: Any = None, **options: Any) -> None:
        check_options("InfoqPass", target, options)
        self._target, self._options = target, {"calibration_data": calibration_data, **options}

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Quantize a float graph, traced or exported; the float graph itself is not changed."""
        if read_bits(graph_module.graph):
            return PassResult(graph_module, False)
        return PassResult(quantize_target(graph_module, self._target, self._options), True)

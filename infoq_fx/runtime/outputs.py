"""Reads the outputs of a model, and measures the divergence of two outputs in nats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from infoq_fx.quantization.prepared import PreparedModel

__all__ = ["class_logits", "diverge", "first_output", "first_tensor", "measure_spread", "output_rows"]


def class_logits(output: Tensor) -> Tensor:
    """Return a model's output as ``[samples, classes]``, averaged over tokens or pixels.

    Three dimensions are read as ``[samples, tokens, classes]``, four and more as ``[samples, classes, ...]``.
    """
    if output.ndim < 3:
        return output.float().reshape(output.shape[0], -1)
    return output.float().mean(1) if output.ndim == 3 else output.float().flatten(2).mean(2)


def first_output(prepared: PreparedModel) -> fx.Node:
    """Return the node of the model's first output."""
    return prepared.graph_module.graph.output_node().all_input_nodes[0]


def measure_spread(logits: Tensor) -> Tensor:
    """Return the variance of every output column over the samples, float64 ``[classes]``."""
    return logits.double().var(0, correction=0)


def diverge(reference: Tensor, found: Tensor, spread: Tensor) -> Tensor:
    """Return the KL divergence between the distributions of Y given by two outputs, in nats, float64 ``[samples]``.

    Outputs ``[samples, classes]`` are logits. A single column is a regression output: Y is Gaussian with this mean and
    the variance ``spread [1]`` of the float model's output over the samples.
    """
    reference, found = reference.double(), found.double()
    if reference.shape[1] == 1:
        return (reference - found).square()[:, 0] / (2 * spread[0].clamp_min(1e-30))
    log_p, log_q = reference.log_softmax(1), found.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def first_tensor(output: Any) -> Tensor:
    """Return a model's output, or its first output if it has several."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output


def output_rows(output: Tensor) -> Tensor:
    """Return an output as float32 ``[rows, classes]``, a row per token or pixel; see :func:`class_logits`."""
    if output.ndim < 3:
        return output.float().reshape(output.shape[0], -1)
    return (output if output.ndim == 3 else output.flatten(2).transpose(1, 2)).float().flatten(0, 1)

"""The loops of :mod:`infoq_fx.recovery.error_feedback` as torch operations over all rows, for weights on a GPU.

A column is a few operations on every row at once; nothing waits for the GPU but each sweep's question whether anything
changed. Tensors are of one device, and shaped as in :mod:`infoq_fx.recovery.error_feedback`.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["descend", "descend_on_inputs", "find_shares", "pass_errors_on", "pass_errors_on_inputs"]


def pass_errors_on(rows: Tensor, factor: Tensor, steps: Tensor, nearest: Tensor) -> tuple[Tensor, Tensor]:
    """Round column after column, the error of each fed back to the later ones: levels and what is passed on."""
    values, errors = rows.clone(), torch.empty_like(rows)
    for j in range(rows.shape[2]):
        value = values[..., j].clone()
        values[..., j] = _look_up(value / steps, nearest)
        errors[..., j] = (value - values[..., j] * steps) / factor[:, j, j, None]
        values[..., j + 1 :] -= errors[..., j, None] * factor[:, None, j, j + 1 :]
    return values, errors


def descend(q: Tensor, gradient: Tensor, second: Tensor, steps: Tensor, nearest: Tensor, sweeps: int) -> Tensor:
    """Set every column to its best level given all others, until nothing changes; ``gradient`` is overwritten."""
    found = q.clone()
    for _ in range(sweeps):
        before = found.clone()
        for j in range(q.shape[2]):
            best = _look_up(found[..., j] - gradient[..., j] / (second[:, j, j, None] * steps), nearest)
            move = (best - found[..., j]) * steps
            found[..., j] = best
            gradient += move[..., None] * second[:, None, j]
        if torch.equal(found, before):
            break
    return found


def find_shares(columns: Tensor, ridge: Tensor) -> Tensor:
    """Find, for every column j, ``(ridge I + A_L A_L^T)^-1 a_j`` with L the columns from j on."""
    inverse = torch.eye(columns.shape[2], dtype=columns.dtype, device=columns.device) / ridge[:, None, None]
    shares = torch.empty_like(columns)
    for j in range(columns.shape[1] - 1, -1, -1):
        image = (inverse @ columns[:, j, :, None])[..., 0]
        scale = 1 + (columns[:, j] * image).sum(1, keepdim=True)
        shares[:, j] = image / scale
        inverse -= image[:, :, None] * image[:, None, :] / scale[..., None]
    return shares


def pass_errors_on_inputs(
    rows: Tensor, columns: Tensor, shares: Tensor, ridge: Tensor, steps: Tensor, nearest: Tensor
) -> tuple[Tensor, Tensor]:
    """Round column after column as :func:`pass_errors_on` does: levels and the form of every row's error."""
    groups, count, width = rows.shape
    output = columns.new_zeros(groups, count, columns.shape[2])
    square, q = columns.new_zeros(groups, count), torch.empty_like(rows)
    for j in range(width):
        shift = (output @ shares[:, j, :, None])[..., 0]
        q[..., j] = _look_up((rows[..., j] - shift) / steps, nearest)
        error = (q[..., j] * steps - rows[..., j]).to(output.dtype)
        square += error.square()
        output += error[..., None] * columns[:, None, j]
    return q, output.square().sum(2) + ridge[:, None] * square


def descend_on_inputs(
    q: Tensor, target: Tensor, columns: Tensor, ridge: Tensor, steps: Tensor, nearest: Tensor, sweeps: int
) -> Tensor:
    """Set every column to its best level given all others, as :func:`descend` does."""
    found = q.clone()
    output = (found * steps[..., None] - target).to(columns.dtype) @ columns
    curvature = columns.square().sum(2) + ridge[:, None]
    for _ in range(sweeps):
        before = found.clone()
        for j in range(q.shape[2]):
            error = found[..., j] * steps - target[..., j]
            gradient = (output @ columns[:, j, :, None])[..., 0] + ridge[:, None] * error
            best = _look_up(found[..., j] - gradient / (curvature[:, j, None] * steps), nearest)
            output += ((best - found[..., j]) * steps).to(output.dtype)[..., None] * columns[:, None, j]
            found[..., j] = best
        if torch.equal(found, before):
            break
    return found


def _look_up(value: Tensor, nearest: Tensor) -> Tensor:
    """The level of every value in units of the scale, see :func:`infoq_fx.quantization.codebooks.table_of_levels`."""
    place = torch.floor(value * 2).add_(256).nan_to_num_(nan=0.0).clamp_(0, 511)
    return nearest[place.long()].to(torch.float32)

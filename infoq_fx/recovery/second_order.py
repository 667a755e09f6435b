"""The linear algebra of second-order rounding: later weights of a row compensate for the errors of earlier ones."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infoq_fx.recovery.error_feedback import descend, pass_errors_on
from infoq_fx.recovery.input_moments import InputMoments

__all__ = ["ideal_rows", "quadratic_error", "round_rows"]


def ideal_rows(rows: Tensor, moments: InputMoments, ridge: Tensor) -> Tensor:
    """Return the real-valued rows that best approximate the reference's output from the quantized model's input.

    They minimise ``E |W x - V x^|^2 + ridge |V - W|^2`` over V, with x the reference's input and x^ the quantized one.
    """
    target = rows.double() @ (moments.cross + ridge)
    return torch.cholesky_solve(target.mT, torch.linalg.cholesky(moments.second + ridge)).mT


def round_rows(
    ideal: Tensor, second: Tensor, scales: Tensor, quant_min: int, quant_max: int, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Round rows to integers ``q`` so that ``E |(V - q scale) x^|^2`` is small, at the best of several scales per row.

    Columns are rounded one after the other, those of large inputs first; the error of each is fed back to the columns
    not yet rounded by the second moments (GPTQ's form of Optimal Brain Surgeon). Then, up to ``sweeps`` times, every
    column is set to its best integer given all others.

    Args:
        ideal: V, float64 ``[groups, rows, columns]``.
        second: positive definite, float64 ``[groups, columns, columns]``.
        scales: candidates, float32 ``[groups, rows, candidates]``.
        quant_min: smallest integer.
        quant_max: largest integer.
        sweeps: rounds of coordinate descent.

    Returns:
        Integers as float32, shaped like ``ideal``, and the scales chosen, ``[groups, rows]``.
    """
    groups, count, columns = ideal.shape
    order = second.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    inverse_order = order.argsort(dim=1)
    ordered = second.gather(1, order[:, :, None].expand(-1, -1, columns))
    ordered = ordered.gather(2, order[:, None, :].expand(-1, columns, -1))
    factor, moments = _factor_of_inverse(ordered).float(), ordered.float()
    target = ideal.float().gather(2, order[:, None, :].expand(-1, count, -1))
    candidates = scales.shape[2]
    repeated = target.repeat_interleave(candidates, dim=1)
    steps = scales.reshape(groups, -1)
    q = _pass_errors_on(repeated, factor, steps, quant_min, quant_max)
    errors = quadratic_error(q * steps[..., None] - repeated, moments).view(groups, count, candidates)
    best = errors.argmin(2, keepdim=True)
    q = q.view(groups, count, candidates, columns)
    q = q.gather(2, best[..., None].expand(-1, -1, -1, columns))[:, :, 0]
    step = scales.gather(2, best)[..., 0]
    q = _descend(q, (q * step[..., None] - target) @ moments, moments, step, quant_min, quant_max, sweeps)
    return q.gather(2, inverse_order[:, None, :].expand(-1, count, -1)), step


def quadratic_error(difference: Tensor, second: Tensor) -> Tensor:
    """Return the quadratic form ``d H d`` of every row, ``[groups, rows]``."""
    return ((difference @ second) * difference).sum(2)


def _factor_of_inverse(second: Tensor) -> Tensor:
    """Upper triangular U with ``inverse(second) = U^T U``, without inverting: second = R R^T gives U = R^-1."""
    lower = torch.linalg.cholesky(second.flip(1, 2))
    eye = torch.eye(second.shape[1], dtype=second.dtype, device=second.device)
    factor: Tensor = torch.linalg.solve_triangular(lower.flip(1, 2), eye, upper=True)
    return factor


def _pass_errors_on(rows: Tensor, factor: Tensor, steps: Tensor, low: int, high: int) -> Tensor:
    q = np.empty(rows.shape, np.float32)
    pass_errors_on(_array(rows), _array(factor), _array(steps), np.float32(low), np.float32(high), q)
    return torch.from_numpy(q).to(rows.device)


def _descend(q: Tensor, gradient: Tensor, second: Tensor, steps: Tensor, low: int, high: int, sweeps: int) -> Tensor:
    found = _array(q.clone())
    descend(found, _array(gradient), _array(second), _array(steps), np.float32(low), np.float32(high), sweeps)
    return torch.from_numpy(found).to(q.device)


def _array(x: Tensor) -> NDArray[np.float32]:
    """As a numpy array on the CPU, for which the loops are compiled."""
    found: NDArray[np.float32] = x.cpu().contiguous().numpy()
    return found

"""The linear algebra of second-order rounding: later weights of a row compensate for the errors of earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infoq_fx.core.memory import return_free_memory
from infoq_fx.recovery import device_feedback
from infoq_fx.recovery.error_feedback import (
    descend,
    descend_on_inputs,
    find_shares,
    pass_errors_on,
    pass_errors_on_inputs,
)

__all__ = ["Curvature", "DenseCurvature", "LowRankCurvature", "cholesky", "factorize", "factorize_inputs", "round_rows"]

Floats: TypeAlias = NDArray[np.floating[Any]]

_LEAST_RAISE, _MOST_RAISES = 1e-7, 20
_COLUMNS_AT_ONCE = 1024
_BLOCK = 128  # columns


class Curvature(Protocol):
    """A quadratic form ``d H d`` over the columns of rows, in the order in which the columns are rounded.

    All methods take and return rows whose columns are in this ``order``.
    """

    @property
    def order(self) -> Tensor:
        """Of the columns, int64 ``[groups, columns]``."""

    def pass_errors_on(self, rows: Tensor, steps: Tensor, nearest: Floats) -> tuple[Tensor, Tensor]:
        """Round column after column, the error of each fed back to the later ones.

        Returns the levels, shaped like ``rows``, and the form of every row's error, ``[groups, rows]``.
        """

    def descend(self, q: Tensor, target: Tensor, steps: Tensor, nearest: Floats, sweeps: int) -> Tensor:
        """Set every column to its best level given all others, up to ``sweeps`` times."""


def round_rows(
    ideal: Tensor, curvature: Curvature, scales: Tensor, nearest: Floats, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Round rows to levels ``q`` so that ``E |(V - q scale) x^|^2`` is small, at the best of several scales per row.

    Columns are rounded one after the other, those of large inputs first; the error of each is fed back to the columns
    not yet rounded by the second moments (GPTQ's form of Optimal Brain Surgeon). Then, up to ``sweeps`` times, every
    column is set to its best level given all others.

    Args:
        ideal: V, float64 ``[groups, rows, columns]``.
        curvature: of the error, from :func:`factorize` or :func:`factorize_inputs`.
        scales: candidates, float32 ``[groups, rows, candidates]``.
        nearest: the levels, as :func:`infoq_fx.quantization.codebooks.table_of_levels` of the weight's qparams.
        sweeps: rounds of coordinate descent.

    Returns:
        Levels as float32, shaped like ``ideal``, and the scales chosen, ``[groups, rows]``.
    """
    groups, count, columns = ideal.shape
    order = curvature.order[:, None, :].expand(-1, count, -1)
    target = ideal.float().gather(2, order)
    candidates = scales.shape[2]
    repeated = target.repeat_interleave(candidates, dim=1)
    steps = scales.reshape(groups, -1)
    q, errors = curvature.pass_errors_on(repeated, steps, nearest)
    best = errors.view(groups, count, candidates).argmin(2, keepdim=True)
    q = q.view(groups, count, candidates, columns)
    q = q.gather(2, best[..., None].expand(-1, -1, -1, columns))[:, :, 0]
    step = scales.gather(2, best)[..., 0]
    q = curvature.descend(q, target, step, nearest, sweeps)
    return q.gather(2, curvature.order.argsort(dim=1)[:, None, :].expand(-1, count, -1)), step


@dataclass(frozen=True)
class DenseCurvature:
    """The curvature as a matrix for each group: ``second`` H and ``factor`` U with ``inverse(H) = U^T U``, float32."""

    order: Tensor
    second: Tensor
    factor: Tensor

    def pass_errors_on(self, rows: Tensor, steps: Tensor, nearest: Floats) -> tuple[Tensor, Tensor]:
        """See :class:`Curvature`; errors go to columns beyond a block by a matrix product.

        What a column adds to the form, once the later ones have made up for it, is the square of what it passes on.
        """
        columns, values, found = rows.shape[2], rows, []
        form = torch.zeros_like(steps)
        for start in range(0, columns, _BLOCK):
            end = min(start + _BLOCK, columns)
            factor = self.factor[:, start:end]
            q, passed_on = _pass_errors_on(values[:, :, : end - start], factor[:, :, start:end], steps, nearest)
            found.append(q)
            form += passed_on.square().sum(2)
            if end < columns:
                values = (passed_on @ factor[:, :, end:]).neg_().add_(values[:, :, end - start :])
        return torch.cat(found, 2), form

    def descend(self, q: Tensor, target: Tensor, steps: Tensor, nearest: Floats, sweeps: int) -> Tensor:
        """See :class:`Curvature`."""
        gradient = (q * steps[..., None] - target) @ self.second
        if q.device.type != "cpu":
            return device_feedback.descend(q, gradient, self.second, steps, _on(q, nearest), sweeps)
        found = _array(q.clone())
        descend(found, _array(gradient), _array(self.second), _array(steps), nearest, sweeps)
        return torch.from_numpy(found)


@dataclass(frozen=True)
class LowRankCurvature:
    r"""The curvature of few input rows A and a ridge: ``H = A^T A + ridge I``, which is never formed.

    With L the columns not yet rounded and r the output of the errors so far, the best shift of column j of them is
    ``-a_j^T (ridge I + A_L A_L^T)^-1 r``. ``shares`` holds these vectors, found from the last column to the first by
    rank-one updates. A column costs the square of the number of input rows once, and that number for every row.

    Args:
        order: of the columns.
        inputs: A, float64 ``[groups, input rows, columns]``.
        ridge: ``[groups]``.
        shares: ``[groups, columns, input rows]``.
    """

    order: Tensor
    inputs: Tensor
    ridge: Tensor
    shares: Tensor

    def pass_errors_on(self, rows: Tensor, steps: Tensor, nearest: Floats) -> tuple[Tensor, Tensor]:
        """See :class:`Curvature`."""
        if rows.device.type != "cpu":
            return device_feedback.pass_errors_on_inputs(
                rows, self.inputs.mT, self.shares, self.ridge, steps, _on(rows, nearest)
            )
        q, form = np.empty(rows.shape, np.float32), np.empty(rows.shape[:2], np.float64)
        columns = _array(self.inputs.mT)
        pass_errors_on_inputs(
            _array(rows), columns, _array(self.shares), _array(self.ridge), _array(steps), nearest, q, form
        )
        return torch.from_numpy(q), torch.from_numpy(form)

    def descend(self, q: Tensor, target: Tensor, steps: Tensor, nearest: Floats, sweeps: int) -> Tensor:
        """See :class:`Curvature`."""
        if q.device.type != "cpu":
            return device_feedback.descend_on_inputs(
                q, target, self.inputs.mT, self.ridge, steps, _on(q, nearest), sweeps
            )
        found, columns = _array(q.clone()), _array(self.inputs.mT)
        descend_on_inputs(found, _array(target), columns, _array(self.ridge), _array(steps), nearest, sweeps)
        return torch.from_numpy(found)


def factorize(second: Tensor) -> DenseCurvature:
    """Order the columns by their second moments, the largest first, and factorize these.

    Args:
        second: positive definite, float ``[groups, columns, columns]``.
    """
    order = second.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    groups, turned = torch.arange(len(second), device=second.device)[:, None, None], order.flip(1)
    ordered = second[groups, turned[:, :, None], turned[:, None, :]]
    del second  # matrices of thousands of columns take hundreds of megabytes: none stays longer than needed
    narrow = ordered.float().flip(1, 2)
    lower = cholesky(ordered)
    del ordered
    upper = lower.flip(1, 2)
    del lower
    return DenseCurvature(order, narrow, _invert_factor(upper))


def factorize_inputs(inputs: Tensor, ridge: Tensor) -> LowRankCurvature:
    """The same as :func:`factorize` of ``inputs^T inputs`` with the ridge on its diagonal.

    Args:
        inputs: float64 ``[groups, input rows, columns]``, fewer rows than columns.
        ridge: ``[groups]``, positive.
    """
    order = inputs.square().sum(1).argsort(dim=1, descending=True, stable=True)
    ordered = inputs.gather(2, order[:, None, :].expand(-1, inputs.shape[1], -1))
    if inputs.device.type != "cpu":
        return LowRankCurvature(order, ordered, ridge, device_feedback.find_shares(ordered.mT, ridge))
    shares = np.empty((inputs.shape[0], inputs.shape[2], inputs.shape[1]))
    find_shares(_array(ordered.mT), _array(ridge), shares)
    return LowRankCurvature(order, ordered, ridge, torch.from_numpy(shares))


def cholesky(matrix: Tensor) -> Tensor:
    """Factorize symmetric matrices; where rounding errors made one indefinite, its diagonal is raised until it is not.

    Args:
        matrix: float ``[groups, columns, columns]``.
    """
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(matrix)
    least = _LEAST_RAISE * matrix.diagonal(dim1=1, dim2=2).abs().amax(1).clamp_min(1e-12)
    raised = torch.zeros_like(least)
    for _ in range(_MOST_RAISES):
        if not bool(failed.any()):
            return lower
        raised = torch.where(failed > 0, (10 * raised).maximum(least), raised)
        higher = matrix.clone()
        higher.diagonal(dim1=1, dim2=2).add_(raised[:, None])
        lower, failed = torch.linalg.cholesky_ex(higher)
    found: Tensor = torch.linalg.cholesky(matrix)  # says what is wrong
    return found


def _invert_factor(upper: Tensor) -> Tensor:
    """Upper triangular U with ``inverse(H) = U^T U``, float32, from the factor R of ``H = R R^T``: U = R^-1.

    It is computed for some columns at a time, which have no values below them.
    """
    columns = upper.shape[1]
    factor = torch.zeros_like(upper, dtype=torch.float32)
    if columns > _COLUMNS_AT_ONCE:
        return_free_memory()
    for start in range(0, columns, _COLUMNS_AT_ONCE):
        end = min(start + _COLUMNS_AT_ONCE, columns)
        eye = torch.eye(end, dtype=upper.dtype, device=upper.device)[:, start:]
        factor[:, :end, start:end] = torch.linalg.solve_triangular(upper[:, :end, :end], eye, upper=True)
    return factor


def _pass_errors_on(rows: Tensor, factor: Tensor, steps: Tensor, nearest: Floats) -> tuple[Tensor, Tensor]:
    """Levels of a block of columns, and what it passes on."""
    if rows.device.type != "cpu":
        return device_feedback.pass_errors_on(rows, factor, steps, _on(rows, nearest))
    part = _array(rows)
    q, errors = np.empty_like(part), np.empty_like(part)
    pass_errors_on(part, _array(factor), _array(steps), nearest, q, errors)
    return torch.from_numpy(q), torch.from_numpy(errors)


def _array(x: Tensor) -> NDArray[Any]:
    """As a numpy array, for which the loops are compiled."""
    found: NDArray[Any] = x.contiguous().numpy()
    return found


def _on(x: Tensor, nearest: Floats) -> Tensor:
    return torch.from_numpy(nearest).to(x.device)

"""Compiled loops of second-order rounding: error feedback to later columns, and coordinate descent.

Every row is rounded by itself, so that its result does not depend on other rows. Rows and matrices are float32. The
loops ``on_inputs`` do the same from a few input rows, in float64, where these are fewer than the columns.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from infoq_fx.core.jit import jit
from infoq_fx.quantization.codebooks import look_up

__all__ = ["descend", "descend_on_inputs", "find_shares", "pass_errors_on", "pass_errors_on_inputs"]

Floats: TypeAlias = NDArray[np.floating[Any]]

_LANES = 64  # rows rounded together so that the compiler vectorizes the loop; with 16 or 32 it did not


@jit
def pass_errors_on(rows: Floats, factor: Floats, steps: Floats, nearest: Floats, q: Floats, errors: Floats) -> None:
    """Round column after column; the error of each column is fed back to the later ones.

    Args:
        rows: ``[groups, rows, columns]``; not changed.
        factor: upper triangular U of every group, with U^T U the inverse of its second moments.
        steps: scales, ``[groups, rows]``.
        nearest: the level of every half integer, see :func:`infoq_fx.quantization.codebooks.table_of_levels`.
        q: output: the levels, shaped like ``rows``.
        errors: output, shaped like ``rows``: what further columns are to be lowered by, times their part of ``factor``.
    """
    groups, count, columns = rows.shape
    values, left = np.empty((columns, _LANES), rows.dtype), np.empty((columns, _LANES), rows.dtype)
    step = np.ones(_LANES, rows.dtype)
    for g in range(groups):
        for first in range(0, count, _LANES):
            used = min(_LANES, count - first)
            values[:] = 0
            for lane in range(used):
                step[lane] = steps[g, first + lane]
                for j in range(columns):
                    values[j, lane] = rows[g, first + lane, j]
            for j in range(columns):
                pivot = factor[g, j, j]
                for lane in range(_LANES):  # look_up, written out: the compiler vectorizes it
                    place = np.floor(values[j, lane] / step[lane] * np.float32(2)) + np.float32(256)
                    place = place if place > 0 else np.float32(0)
                    found = nearest[np.int32(place if place < 511 else np.float32(511))]
                    left[j, lane] = (values[j, lane] - found * step[lane]) / pivot
                    values[j, lane] = found
                for later in range(j + 1, columns):
                    share = factor[g, j, later]
                    for lane in range(_LANES):
                        values[later, lane] -= left[j, lane] * share
            for lane in range(used):
                for j in range(columns):
                    q[g, first + lane, j] = values[j, lane]
                    errors[g, first + lane, j] = left[j, lane]


@jit
def descend(q: Floats, gradient: Floats, second: Floats, steps: Floats, nearest: Floats, sweeps: int) -> None:
    """Coordinate descent: set every column to its best level given all others, in place, until nothing changes.

    Args:
        q: levels, ``[groups, rows, columns]``.
        gradient: ``(q step - target) second``, shaped like ``q``; overwritten.
        second: second moments, ``[groups, columns, columns]``, symmetric.
        steps: scales, ``[groups, rows]``.
        nearest: the level of every half integer, see :func:`infoq_fx.quantization.codebooks.table_of_levels`.
        sweeps: largest number of passes over the columns.
    """
    groups, count, columns = q.shape
    for g in range(groups):
        for r in range(count):
            step = steps[g, r]
            for _ in range(sweeps):
                changed = False
                for j in range(columns):
                    best = look_up(q[g, r, j] - gradient[g, r, j] / (second[g, j, j] * step), nearest)
                    move = best - q[g, r, j]
                    if move != 0:
                        changed = True
                        q[g, r, j] = best
                        for other in range(columns):
                            gradient[g, r, other] += move * step * second[g, j, other]
                if not changed:
                    break


@partial(jit, fastmath={"reassoc"})  # lets the compiler vectorize the sum
def _dot(a: Floats, b: Floats) -> float:
    total = 0.0
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@jit
def find_shares(columns: Floats, ridge: Floats, shares: Floats) -> None:
    """Find, for every column j, ``(ridge I + A_L A_L^T)^-1 a_j`` with L the columns from j on.

    Args:
        columns: A by column, ``[groups, columns, input rows]``.
        ridge: ``[groups]``.
        shares: output, shaped like ``columns``.
    """
    groups, count, rows = columns.shape
    for g in range(groups):
        inverse, image = np.zeros((rows, rows)), np.empty(rows)
        for i in range(rows):
            inverse[i, i] = 1 / ridge[g]
        for j in range(count - 1, -1, -1):
            for i in range(rows):
                image[i] = _dot(inverse[i], columns[g, j])
            scale = 1 + _dot(columns[g, j], image)
            for i in range(rows):
                shares[g, j, i] = image[i] / scale
                for k in range(rows):
                    inverse[i, k] -= image[i] * image[k] / scale


@jit
def pass_errors_on_inputs(
    rows: Floats,
    columns: Floats,
    shares: Floats,
    ridge: Floats,
    steps: Floats,
    nearest: Floats,
    q: Floats,
    form: Floats,
) -> None:
    """Round column after column as :func:`pass_errors_on` does.

    Args:
        rows: ``[groups, rows, columns]``; not changed.
        columns: the inputs by column, ``[groups, columns, input rows]``.
        shares: of :func:`find_shares`.
        ridge: ``[groups]``.
        steps: scales, ``[groups, rows]``.
        nearest: the level of every half integer, see :func:`infoq_fx.quantization.codebooks.table_of_levels`.
        q: output: the levels, shaped like ``rows``.
        form: output: the squared output of every row's error and ``ridge`` times its square, ``[groups, rows]``.
    """
    groups, count, width = rows.shape
    for g in range(groups):
        for r in range(count):
            step, output, square = steps[g, r], np.zeros(columns.shape[2]), 0.0
            for j in range(width):
                found = look_up((rows[g, r, j] - _dot(shares[g, j], output)) / step, nearest)
                q[g, r, j] = found
                error = found * step - rows[g, r, j]
                square += error * error
                for i in range(output.size):
                    output[i] += error * columns[g, j, i]
            form[g, r] = _dot(output, output) + ridge[g] * square


@jit
def descend_on_inputs(
    q: Floats, target: Floats, columns: Floats, ridge: Floats, steps: Floats, nearest: Floats, sweeps: int
) -> None:
    """Coordinate descent as :func:`descend` does it, in place.

    Args:
        q: levels, ``[groups, rows, columns]``.
        target: real values, shaped like ``q``.
        columns: the inputs by column, ``[groups, columns, input rows]``.
        ridge: ``[groups]``.
        steps: scales, ``[groups, rows]``.
        nearest: the level of every half integer, see :func:`infoq_fx.quantization.codebooks.table_of_levels`.
        sweeps: largest number of passes over the columns.
    """
    groups, count, width = q.shape
    for g in range(groups):
        for r in range(count):
            step, output = steps[g, r], np.zeros(columns.shape[2])
            for j in range(width):
                error = q[g, r, j] * step - target[g, r, j]
                for i in range(output.size):
                    output[i] += error * columns[g, j, i]
            for _ in range(sweeps):
                changed = False
                for j in range(width):
                    gradient = _dot(columns[g, j], output) + ridge[g] * (q[g, r, j] * step - target[g, r, j])
                    curvature = _dot(columns[g, j], columns[g, j]) + ridge[g]
                    best = look_up(q[g, r, j] - gradient / (curvature * step), nearest)
                    if best != q[g, r, j]:
                        changed = True
                        error = (best - q[g, r, j]) * step
                        for i in range(output.size):
                            output[i] += error * columns[g, j, i]
                        q[g, r, j] = best
                if not changed:
                    break

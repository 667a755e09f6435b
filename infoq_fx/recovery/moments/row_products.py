"""Sums of products of a layer's input rows, over 8-bit integers where both factors are such, else over floats.

Sums over integers are exact, and take about a quarter of the time on processors that multiply 8-bit integers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from infoq_fx.core.threads import ThreadMap
from infoq_fx.runtime.integer_convolution import QuantizedTensor, can_multiply_integers

__all__ = [
    "Rows",
    "add_products",
    "as_integers",
    "count_rows",
    "dequantize_rows",
    "join_rows",
    "mirror",
    "rows_at_once",
    "sum_rows",
]

Rows = Tensor | QuantizedTensor
"""Input rows ``[groups, rows, columns]``, float32 or as integers."""

_ROWS_OF_FLOATS, _ROWS_OF_INTEGERS = 1024, 4096  # of a product, at least
_LEAST_COLUMNS = 256  # of integers; smaller products are faster over floats
_COLUMNS_OF_PRODUCT = 512  # at most
_MIDDLE = 128  # what uint8 values are reduced by to become int8
_MOST_ROWS = 1 << 15  # whose sum of products of two differences of 8-bit values is an int32


def dequantize_rows(rows: Rows) -> Tensor:
    """Return rows as float32."""
    return rows if isinstance(rows, Tensor) else rows.dequantize()


def as_integers(rows: Rows, like: QuantizedTensor) -> Rows:
    """Return rows as integers of the scale and zero point of others, if they are such and products are faster so."""
    if isinstance(rows, QuantizedTensor) or not _is_faster(like.q):
        return rows
    q = rows.div(like.scale).round_().add_(like.zero_point).clamp_(0, 255).to(torch.uint8)
    found = replace(like, q=q)
    return found if torch.equal(found.dequantize(), rows) else rows


def count_rows(rows: Rows) -> int:
    """Return the number of rows of every group."""
    return (rows if isinstance(rows, Tensor) else rows.q).shape[1]


def rows_at_once(rows: Rows) -> int:
    """Return how many rows, at least, are worth a product."""
    is_integer = isinstance(rows, QuantizedTensor) and _is_faster(rows.q)
    return _ROWS_OF_INTEGERS if is_integer else _ROWS_OF_FLOATS


def join_rows(parts: Sequence[Rows]) -> Rows:
    """Return the rows of several batches as one, as integers only if all are and products of them are faster so."""
    integers = [part for part in parts if isinstance(part, QuantizedTensor)]
    is_alike = len({(part.scale, part.zero_point) for part in integers}) == 1 and len(integers) == len(parts)
    if is_alike and _is_faster(integers[0].q):
        return replace(integers[0], q=torch.cat([part.q for part in integers], 1))
    return torch.cat([dequantize_rows(part) for part in parts], 1)


def sum_rows(rows: Rows) -> Tensor:
    """Return the sum over the rows, float64 ``[groups, columns]``."""
    if isinstance(rows, Tensor):
        return rows.sum(1).double()  # a sum in float64 takes 20 times as long
    count = rows.q.shape[1]
    return (rows.q.sum(1, dtype=torch.int64) - rows.zero_point * count).double() * rows.scale


def add_products(total: Tensor, x: Rows, found: Rows, spread: ThreadMap, *, is_symmetric: bool = False) -> None:
    """Add ``x^T found`` to a total ``[groups, columns, columns]``, in place, some of its rows at a time.

    A symmetric product is added right of the blocks of the diagonal alone; see :func:`mirror`.
    """
    if isinstance(x, QuantizedTensor) and isinstance(found, QuantizedTensor):
        for part, other in zip(x.q.split(_MOST_ROWS, 1), found.q.split(_MOST_ROWS, 1), strict=True):
            _add_integers(total, replace(x, q=part), replace(found, q=other), spread, is_symmetric)
        return
    left, right = dequantize_rows(x), dequantize_rows(found)

    def add(start: int) -> None:
        with torch.inference_mode():
            first, end = start if is_symmetric else 0, start + _COLUMNS_OF_PRODUCT
            part, factors = total[:, start:end, first:], (left[..., start:end].mT, right[..., first:])
            if part.dtype == torch.float32:
                part.baddbmm_(*factors)
            else:
                part.add_(factors[0] @ factors[1])

    _run(spread, add, total)


def mirror(matrix: Tensor) -> None:
    """Copy what is right of the blocks of the diagonal to the other side."""
    for start in range(0, matrix.shape[1], _COLUMNS_OF_PRODUCT):
        end = start + _COLUMNS_OF_PRODUCT
        matrix[:, end:, start:end] = matrix[:, start:end, end:].mT


def _add_integers(
    total: Tensor, x: QuantizedTensor, found: QuantizedTensor, spread: ThreadMap, is_symmetric: bool
) -> None:
    """Add the products of integers of one group, which are int32 until their scales multiply them.

    With s = q - 128 and a = 128 - zero_point of each side, the sum of (s + a) (t + b) is that of s t, b times that of
    s, and a times that of t + b.
    """
    left, right = ((rows.q[0] ^ _MIDDLE).view(torch.int8) for rows in (x, found))
    turned, scale = left.t().contiguous(), x.scale * found.scale
    shift, other_shift = _MIDDLE - x.zero_point, _MIDDLE - found.zero_point
    by_row = turned.sum(1, dtype=torch.int32) * other_shift
    by_column = (right.sum(0, dtype=torch.int32) + len(right) * other_shift) * shift

    def add(start: int) -> None:
        with torch.inference_mode():
            first, end = start if is_symmetric else 0, start + _COLUMNS_OF_PRODUCT
            products = torch._int_mm(turned[start:end], right[:, first:])
            products.add_(by_row[start:end, None]).add_(by_column[first:])
            total[0, start:end, first:].add_(products, alpha=scale)

    _run(spread, add, total)


def _run(spread: ThreadMap, add: Callable[[int], None], total: Tensor) -> None:
    for _ in spread(add, range(0, total.shape[1], _COLUMNS_OF_PRODUCT)):
        pass


def _is_faster(q: Tensor) -> bool:
    groups, _, columns = q.shape
    return groups == 1 and columns >= _LEAST_COLUMNS and q.device.type == "cpu" and _can_multiply_exactly()


@functools.lru_cache(maxsize=1)
def _can_multiply_exactly() -> bool:
    """Whether torch's product of int8 matrices is exact and fast here, tried on values that saturate elsewhere."""
    if not can_multiply_integers():
        return False
    signs = torch.tensor([1, -1], dtype=torch.int16).repeat(32)
    left = torch.where(signs > 0, 127, -128).to(torch.int8)[None].repeat(16, 1)
    right = torch.where(signs > 0, 127, -128).to(torch.int8)[:, None].repeat(1, 16)
    right[:, ::2] = 127
    try:
        found = torch._int_mm(left, right)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.equal(found.double(), left.double() @ right.double())

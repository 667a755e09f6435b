"""Writes bags of embeddings as an embedding, whose weight is quantized, and a sum, mean or maximum over each bag."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from infoq_fx.graph.layer_forms.building import Place

__all__ = ["write_embedding_bags"]

_ATEN = torch.ops.aten
_BAGS = {_ATEN.embedding_bag.default, _ATEN.embedding_bag.padding_idx}
_SUM, _MEAN, _MAX = range(3)


def write_embedding_bags(graph_module: fx.GraphModule) -> bool:
    """Write ``embedding_bag`` as ``embedding`` and a reduction.

    1. indices ``[bags, entries]``, as ``nn.EmbeddingBag`` takes them without offsets: a reduction over the entries.
    2. indices ``[entries]`` with offsets: a scatter of the rows into their bags.

    Left alone: bags whose other results are read.
    """
    changed = False
    for node in list(graph_module.graph.nodes):
        read = [user for user in node.users if user.users]
        if node.target not in _BAGS or not all(u.target is operator.getitem and u.args[1] == 0 for u in read):
            continue
        result = _write(Place(graph_module, node), _Bag(*node.args))
        for user in list(node.users):
            user.replace_all_uses_with(result)
            graph_module.graph.erase_node(user)
        graph_module.graph.erase_node(node)
        changed = True
    return changed


@dataclass(frozen=True)
class _Bag:
    """The arguments of the operation."""

    weight: fx.Node
    indices: fx.Node
    offsets: fx.Node
    scale_grad_by_freq: bool = False
    mode: int = _SUM
    sparse: bool = False
    per_sample_weights: fx.Node | None = None
    include_last_offset: bool = False
    padding_idx: int | None = None


def _write(place: Place, bag: _Bag) -> fx.Node:
    table = _rectangle(bag)
    indices = bag.indices if table is None else table
    rows = place.call(_ATEN.embedding.default, bag.weight, indices)
    kept = None
    if bag.padding_idx is not None and bag.padding_idx >= 0:
        kept = place.call(_ATEN.unsqueeze.default, place.call(_ATEN.ne.Scalar, indices, bag.padding_idx), -1)
    if bag.per_sample_weights is not None:
        shares = bag.per_sample_weights
        if table is not None:
            shares = place.call(_ATEN.reshape.default, shares, [-1, place.size(table, 1)])
        rows = place.call(_ATEN.mul.Tensor, rows, place.call(_ATEN.unsqueeze.default, shares, -1))
    if kept is not None:
        others = float("-inf") if bag.mode == _MAX else 0.0
        rows = place.call(_ATEN.where.ScalarOther, kept, rows, others)
    spread = None if table is not None else _spread(place, bag, rows)
    total = _reduce(place, bag, rows, spread)
    if bag.mode == _MEAN:
        ones = place.call(_ATEN.ones_like.default, place.call(_ATEN.slice.Tensor, rows, -1, 0, 1))
        counted = ones if kept is None else place.call(_ATEN.where.ScalarOther, kept, ones, 0.0)
        count = place.call(_ATEN.clamp_min.default, _reduce(place, bag, counted, spread), 1.0)
        return place.call(_ATEN.div.Tensor, total, count)
    if bag.mode == _MAX and kept is not None:  # bags of padding alone are zeros
        return place.call(_ATEN.where.ScalarOther, place.call(_ATEN.gt.Scalar, total, float("-inf")), total, 0.0)
    return total


def _rectangle(bag: _Bag) -> fx.Node | None:
    """The indices ``[bags, entries]`` that were flattened for the operation; None if the bags differ in size."""
    source: Any = bag.indices.args[0] if bag.indices.target is _ATEN.reshape.default else None
    if source is None or source.meta["val"].ndim != 2 or bag.offsets.target is not _ATEN.arange.start_step:
        return None
    start, _, step = (*bag.offsets.args, 1)[:3]
    width = source.meta["val"].shape[1]
    is_width = (
        step.meta["val"] is width or str(step.meta["val"]) == str(width) if isinstance(step, fx.Node) else step == width
    )
    return source if start == 0 and is_width and not bag.include_last_offset else None


@dataclass(frozen=True)
class _Spread:
    """Bags of any size: the number of bags, and each entry's bag, ``[entries, 1]``."""

    bags: Any
    places: fx.Node


def _spread(place: Place, bag: _Bag, rows: fx.Node) -> _Spread:
    offsets = bag.offsets
    if bag.include_last_offset:
        offsets = place.call(_ATEN.slice.Tensor, offsets, 0, 0, -1)
    numbers = place.call(_ATEN.arange.default, place.size(rows, 0), device=rows.meta["val"].device)
    begun = place.call(_ATEN.ge.Tensor, place.call(_ATEN.unsqueeze.default, numbers, 1), offsets)
    places = place.call(_ATEN.sub.Tensor, place.call(_ATEN.sum.dim_IntList, begun, [1], True), 1)
    return _Spread(place.size(offsets, 0), places)


def _reduce(place: Place, bag: _Bag, rows: fx.Node, spread: _Spread | None) -> fx.Node:
    """Sums, or maxima, over every bag of values ``[..., entries, features]``."""
    if spread is None:
        return place.call(_ATEN.amax.default if bag.mode == _MAX else _ATEN.sum.dim_IntList, rows, [1])
    width, value = place.size(rows, 1), rows.meta["val"]
    sizes: Sequence[Any] = [spread.bags, width]
    zeros = place.call(_ATEN.zeros.default, list(sizes), dtype=value.dtype, device=value.device)
    places = place.call(_ATEN.expand.default, spread.places, [place.size(rows, 0), width])
    if bag.mode == _MAX:
        return place.call(_ATEN.scatter_reduce.two, zeros, 0, places, rows, "amax", include_self=False)
    return place.call(_ATEN.scatter_add.default, zeros, 0, places, rows)

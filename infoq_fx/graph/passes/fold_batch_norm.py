"""Folds batch norms into the layers before them."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from infoq_fx.graph.layers import LAYER_OPS, LayerOp, free_path, module_path, read_tensor, write_tensor

__all__ = ["fold_batch_norm"]

_BATCH_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default


def fold_batch_norm(graph_module: fx.GraphModule) -> bool:
    """Fold inference batch norms into convolutions, transposed convolutions and linear layers.

    1. layer -> batch norm: the affine map is folded into the layer's weight and bias, and the batch norm is removed.
    2. anything else -> batch norm: becomes one ``aten.batch_norm`` node.

    Left alone (case 2): a layer whose output or weight is also used elsewhere, one that takes no bias, and a
    linear layer on more than two dimensions, whose features are last while a batch norm's are the second dimension.
    """
    changed = False
    for node in list(graph_module.graph.nodes):
        if node.target is _BATCH_NORM:
            _fold_or_normalise(graph_module, node)
            changed = True
    return changed


def _fold_or_normalise(graph_module: fx.GraphModule, norm: fx.Node) -> None:
    results = [user for user in norm.users if user.target is operator.getitem and user.args[1] == 0]
    if not _try_fold(graph_module, norm, results):
        source, weight, bias, mean, variance, momentum, epsilon = norm.args
        with graph_module.graph.inserting_before(norm):
            whole = graph_module.graph.call_function(
                torch.ops.aten.batch_norm.default,
                (source, weight, bias, mean, variance, False, momentum, epsilon, False),
            )
        whole.meta = {**norm.meta, "val": norm.meta["val"][0]}
        for result in results:
            result.replace_all_uses_with(whole)
    for result in results:
        graph_module.graph.erase_node(result)
    graph_module.graph.erase_node(norm)


def _try_fold(graph_module: fx.GraphModule, norm: fx.Node, results: list[fx.Node]) -> bool:
    layer = norm.args[0]
    if not isinstance(layer, fx.Node) or layer.target not in LAYER_OPS or len(layer.users) != 1:
        return False
    op = LAYER_OPS[layer.target]
    if op.bias is None or not (op.is_convolution or layer.meta["val"].ndim == 2):
        return False
    weight = layer.args[op.weight]
    bias = op.bias_of(layer)
    parameters = [weight, *([bias] if bias is not None else []), *norm.args[1:5]]
    if not all(p is None or (isinstance(p, fx.Node) and p.op == "get_attr") for p in parameters):
        return False
    if not isinstance(weight, fx.Node) or len(weight.users) != 1 or _groups(layer, op) != 1:
        return False
    gain, shift = _affine_map(graph_module, norm)
    channels_first = [1] * weight.meta["val"].ndim
    channels_first[op.channel_axis] = -1
    folded = read_tensor(graph_module, weight) * gain.reshape(channels_first)
    write_tensor(graph_module, str(weight.target), folded)
    old_bias = read_tensor(graph_module, bias) if isinstance(bias, fx.Node) else torch.zeros_like(shift)
    _set_bias(graph_module, layer, op, old_bias * gain + shift)
    for result in results:
        result.replace_all_uses_with(layer)
    return True


def _groups(layer: fx.Node, op: LayerOp) -> int:
    """Groups of a transposed convolution, whose weight then cannot take one factor per output channel; else 1."""
    if not op.is_transposed:
        return 1
    return int(layer.args[6]) if len(layer.args) > 6 else 1  # type: ignore[arg-type]


def _affine_map(graph_module: fx.GraphModule, norm: fx.Node) -> tuple[Tensor, Tensor]:
    weight, bias, mean, variance = (
        read_tensor(graph_module, p) if isinstance(p, fx.Node) else None for p in norm.args[1:5]
    )
    assert mean is not None
    assert variance is not None
    epsilon = float(norm.args[6])  # type: ignore[arg-type]
    gain = torch.rsqrt(variance.double() + epsilon)
    gain = gain if weight is None else gain * weight.double()
    shift = -mean.double() * gain
    shift = shift if bias is None else shift + bias.double()
    return gain.to(mean.dtype), shift.to(mean.dtype)


def _set_bias(graph_module: fx.GraphModule, layer: fx.Node, op: LayerOp, bias: Tensor) -> None:
    weight_name = str(layer.args[op.weight].target)  # type: ignore[union-attr]
    path = module_path(layer) or weight_name.rpartition(".")[0]
    old = op.bias_of(layer)
    if isinstance(old, fx.Node) and len(old.users) == 1:
        name = str(old.target)
    else:
        name = free_path(graph_module, f"{path}.bias" if path else "bias")
    write_tensor(graph_module, name, bias)
    with graph_module.graph.inserting_before(layer):
        node = graph_module.graph.get_attr(name)
    node.meta["val"] = bias.to("meta")
    op.set_bias(layer, node)

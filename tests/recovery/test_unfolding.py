"""Layers as matrices: rows of inputs times rows of weights are the outputs."""

import pytest
import torch
from recovered import CONTEXT, prepare
from torch import nn

from infoq_fx.graph.layers import read_tensor
from infoq_fx.recovery.layerwise_runner import LayerwiseRunner
from infoq_fx.recovery.parameters import fork
from infoq_fx.recovery.unfolding import input_rows, rows_to_weight, weight_to_rows


def test_rows_give_the_layers_outputs(branches):
    prepared, data = branches
    runner = LayerwiseRunner(fork(prepared), {}, data, CONTEXT)
    seen = 0
    for segment in runner.segments:
        for layer in segment.layers:
            if not layer.op.is_transposed:
                rows = weight_to_rows(layer, read_tensor(prepared.graph_module, layer.weight))
                pairs = zip(
                    runner.collect(layer.source, lambda _, pair: pair.reference),
                    runner.collect(layer.node, lambda _, pair: pair.reference),
                    strict=True,
                )
                for x, y in pairs:
                    found = input_rows(layer, x, 10**6) @ rows.mT  # groups, places, channels
                    y = y.movedim(1, -1) if layer.op.is_convolution else y
                    found = found.transpose(0, 1).reshape(-1, y.shape[-1])
                    bias = 0 if layer.bias is None else read_tensor(prepared.graph_module, layer.bias)
                    assert torch.allclose(found + bias, y.reshape(-1, y.shape[-1]), atol=1e-5)
                assert torch.equal(rows_to_weight(layer, rows), read_tensor(prepared.graph_module, layer.weight))
                assert len(set(map(tuple, input_rows(layer, x, 3)[0].tolist()))) <= 3 * len(x)
                assert input_rows(layer, x, 3).shape[1] <= 3 * len(x)
                seen += 1
        runner.advance(segment)
    assert seen == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(2, 6, (2, 4), padding="same"),
        nn.Conv2d(2, 6, (3, 2), stride=(2, 3), padding=(2, 1), groups=2),
        nn.Conv2d(2, 8, 3, dilation=(1, 2), padding=(0, 2)),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding")  # torch's, of an even kernel
def test_rows_of_any_padding_give_the_outputs(convolution):
    x = torch.randn(12, 2, 7, 9, generator=torch.Generator().manual_seed(0))
    prepared, data = prepare(convolution, x)
    (layer,) = [layer for segment in LayerwiseRunner(prepared, {}, data, CONTEXT).segments for layer in segment.layers]
    rows = weight_to_rows(layer, read_tensor(prepared.graph_module, layer.weight))
    found = (input_rows(layer, x, 10**6) @ rows.mT).transpose(0, 1)
    with torch.no_grad():
        expected = convolution(x).movedim(1, -1)
    torch.testing.assert_close(found.reshape(expected.shape) + convolution.bias, expected)

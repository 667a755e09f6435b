"""Layers as matrices: rows of inputs times rows of weights are the outputs."""

import pytest
import torch
from recovered import CONTEXT, prepare
from torch import nn

import infoq_fx
from infoq_fx.graph.float_interpreter import FloatInterpreter
from infoq_fx.graph.layers import read_tensor
from infoq_fx.recovery.layerwise_runner import LayerwiseRunner
from infoq_fx.recovery.moments.unfolding import input_rows, rows_to_weight, sources_of, weight_to_rows
from infoq_fx.recovery.parameters import fork
from infoq_fx.recovery.segments import find_segments


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


class Recurrent(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.layer = nn.GRU(6, 4, bidirectional=True, batch_first=batch_first)

    def forward(self, x, state):
        x = x if self.layer.batch_first else x.transpose(0, 1)
        return self.layer(x, state.transpose(0, 1).contiguous())[1].transpose(0, 1)


@pytest.mark.parametrize("batch_first", [True, False])
def test_rows_of_a_recurrent_layer_are_its_inputs_and_states(batch_first):
    torch.manual_seed(0)
    model, data = Recurrent(batch_first).eval(), {"x": torch.randn(3, 5, 6), "state": torch.randn(3, 2, 4)}
    prepared = infoq_fx.prepare(model, data)
    layers = {x.site.name: x for segment in find_segments(prepared) for x in segment.layers}
    interpreter = _Values(prepared)
    interpreter.run(*data.values())
    for direction, suffix in enumerate(("", "_reverse")):
        rows = {}
        for name in ("ih", "hh"):
            layer = layers[f"layer.weight_{name}_l0{suffix}"]
            sources = sources_of(layer)
            parts = [source.rows(interpreter.values[source.node], 10**6) for source in sources]
            rows[name] = [part[0].reshape(3, -1, part.shape[-1]) for part in parts]
            assert sources[0].samples(interpreter.values[sources[0].node]) == 3
        assert torch.equal(rows["ih"][0], data["x"])
        # Step by step with the cell of torch, from the state that each row is.
        first, later = rows["hh"]
        order = list(range(5)) if direction == 0 else list(range(4, -1, -1))
        held = torch.cat([first, later if direction == 0 else later.flip(1)], 1)
        weights = [
            getattr(model.layer, f"{part}_l0{suffix}") for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]
        state = data["state"][:, direction]
        for index, step in enumerate(order):
            assert torch.allclose(held[:, index], state, atol=1e-5)
            with torch.no_grad():
                state = torch.gru_cell(data["x"][:, step], state, *weights)


class _Values(FloatInterpreter):
    def __init__(self, prepared):
        super().__init__(prepared)
        self.values = {}

    def run_node(self, n):
        self.values[n] = super().run_node(n)
        return self.values[n]

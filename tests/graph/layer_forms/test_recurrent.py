"""Recurrent layers and cells as layers of one level: torch's own values."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from infoq_fx.errors import UnsupportedModelError
from infoq_fx.graph.capture import capture
from infoq_fx.graph.layer_forms.normal_form import NORMAL_FORM
from infoq_fx.graph.layers import RECURRENT_OPS
from infoq_fx.graph.passes.pass_manager import run_passes
from infoq_fx.graph.program.recurrent_shapes import infer_recurrent, inferring_recurrent_shapes

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}


class Sequences(nn.Module):
    def __init__(self, kind, *, has_state=False, batch_first=True, **options):
        super().__init__()
        self.layer = KINDS[kind](10, 12, batch_first=batch_first, **options)
        self.has_state = has_state

    def forward(self, x):
        levels = self.layer.num_layers * (2 if self.layer.bidirectional else 1)
        state = x.mean(1)[:, :1].expand(levels, -1, -1).repeat(1, 1, 12) if self.has_state else None
        if self.has_state and isinstance(self.layer, nn.LSTM):
            state = (state, 2 * state)
        y, last = self.layer(x if self.layer.batch_first else x.transpose(0, 1), state)
        states = last if isinstance(last, tuple) else (last,)
        return y if self.layer.batch_first else y.transpose(0, 1), *(h.transpose(0, 1) for h in states)


class Steps(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.cell = CELLS[kind](10, 12, **options)

    def forward(self, x):
        state = x.new_zeros(x.shape[0], 12)
        if isinstance(self.cell, nn.LSTMCell):
            state = (state, state)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state


def normalize(model):
    return run_passes(capture(model.eval(), {"x": torch.randn(4, 5, 10)}).graph_module, NORMAL_FORM)


def flat(values):
    return values if isinstance(values, tuple) else (values,)


MODELS = [
    *(lambda kind=kind: Sequences(kind) for kind in KINDS),
    *(lambda kind=kind: Sequences(kind, num_layers=2, bidirectional=True, dropout=0.3) for kind in KINDS),
    *(lambda kind=kind: Sequences(kind, has_state=True, batch_first=False, bias=False, num_layers=2) for kind in KINDS),
    lambda: Sequences("rnn", nonlinearity="relu"),
    lambda: Sequences("lstm", proj_size=6, num_layers=2, bidirectional=True),
    *(lambda kind=kind: Steps(kind) for kind in CELLS),
    lambda: Steps("lstm", bias=False),
    lambda: Steps("rnn", nonlinearity="relu"),
]


@pytest.mark.parametrize(
    "make",
    [make if index % 3 == 0 else pytest.param(make, marks=pytest.mark.slow) for index, make in enumerate(MODELS)],
)
def test_layers_and_cells_have_the_same_values(make):
    torch.manual_seed(0)
    model = make()
    graph_module = normalize(model)
    nodes = [node for node in graph_module.graph.nodes if node.target in RECURRENT_OPS]
    assert nodes
    assert all(node.args[4] == 1 for node in nodes)
    assert {name for name, _ in graph_module.named_parameters()} == {name for name, _ in model.named_parameters()}
    x = torch.randn(7, 5, 10)
    with torch.no_grad():
        for found, wanted in zip(flat(graph_module(x)), flat(model(x)), strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_batch_first", [True, False])
def test_shapes_are_those_of_torch(kind, is_batch_first):
    layer = KINDS[kind](10, 12, bidirectional=True, batch_first=is_batch_first).eval()
    target = {"lstm": "lstm", "gru": "gru", "rnn": "rnn_tanh"}[kind]
    state = torch.zeros(2, 3, 12)
    arguments = (
        torch.randn((3, 5, 10) if is_batch_first else (5, 3, 10)),
        [state, state] if kind == "lstm" else state,
        layer._flat_weights,
        *(True, 1, 0.0, False, True, is_batch_first),
    )
    operation = getattr(torch.ops.aten, target).input
    wanted, found = operation(*arguments), infer_recurrent(*arguments)
    assert [x.shape for x in found] == [x.shape for x in wanted]
    if kind != "lstm":  # oneDNN's output has other strides than torch's own
        assert found[0].stride() == wanted[0].stride()


def test_torchs_own_inference_is_restored():
    kernels = {operation: dict(operation.py_kernels) for operation in RECURRENT_OPS}
    with inferring_recurrent_shapes():
        assert all(operation.py_kernels != kernels[operation] for operation in RECURRENT_OPS)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert nn.GRU(3, 4)(torch.empty(5, 2, 3))[0].shape == (5, 2, 4)
    assert all(operation.py_kernels == kernels[operation] for operation in RECURRENT_OPS)


def test_a_projection_with_a_state_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LSTM(10, 12, proj_size=6, batch_first=True)

        def forward(self, x):
            state = x.mean(1)[None, :, :1]
            return self.layer(x, (state.repeat(1, 1, 6), state.repeat(1, 1, 12)))[0]

    with pytest.raises(UnsupportedModelError, match=r"'layer' has a projection \(proj_size\) and is given"):
        normalize(Net())


def test_computed_weights_are_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(10, 12)

        def forward(self, x):
            weight = self.cell.weight_ih * x.mean()
            return torch.gru_cell(x[:, 0], x.new_zeros(x.shape[0], 12), weight, self.cell.weight_hh)

    with pytest.raises(UnsupportedModelError, match="depend on an input"):
        normalize(Net())

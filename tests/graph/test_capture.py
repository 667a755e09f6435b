import copy
import gc

import pytest
import torch
from networks import ResidualNet, randomise_norms
from torch import fx, nn

from infoq_fx.errors import CalibrationDataError, UnsupportedModelError
from infoq_fx.graph.capture import capture
from infoq_fx.graph.program.exporting import export_quietly

ATEN = torch.ops.aten


def targets(graph_module):
    return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]


def as_module(model, x):
    return model


def as_traced(model, x):
    return fx.symbolic_trace(model)


def as_program(model, x):
    batch = torch.export.Dim("batch")
    return torch.export.export(model, (x,), dynamic_shapes=({0: batch},))


def as_unlifted(model, x):
    return as_program(model, x).module()


FORMS = [as_module, as_traced, as_program, as_unlifted]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_becomes_the_same_functional_graph(form, residual_net, images):
    x = images[0][:4]
    captured = capture(form(residual_net, x), (x,))
    assert captured.batch_size is None
    assert captured.input_names == ("x",)
    assert captured.output_names == ("output",)
    with torch.no_grad():
        for batch in (1, 3, 7):
            torch.testing.assert_close(captured.graph_module(images[0][:batch]), residual_net(images[0][:batch]))
    names = [str(target) for target in targets(captured.graph_module)]
    assert not [name for name in names if "dropout" in name or name.removesuffix(".default").endswith("_.Tensor")]
    assert names.count("aten.conv2d.default") == 5
    held = dict(captured.graph_module.named_parameters())
    assert {"stem.0.weight", "blocks.1.conv2.weight", "head.weight"} <= set(held)


def test_every_tensor_node_has_a_shape_with_a_free_batch(residual_net, images):
    captured = capture(residual_net, (images[0][:4],))
    values = [node.meta["val"] for node in captured.graph_module.graph.nodes if node.op == "call_function"]
    shapes = [value.shape for value in values if isinstance(value, torch.Tensor)]
    assert shapes
    assert all(isinstance(shape[0], torch.SymInt) for shape in shapes)


def test_the_model_is_left_as_it_was(images):
    model = randomise_norms(ResidualNet())
    model.train()
    model.blocks[0].bn1.eval()
    model.stem[0].weight.requires_grad_(False)
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    captured = capture(model, (images[0][:4],))
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert len(model.head._forward_hooks) == 1
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        for parameter in captured.graph_module.parameters():
            parameter.zero_()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    # Captured in inference mode although the model trains.
    model.eval()
    with torch.no_grad():
        again = capture(model, (images[0][:4],)).graph_module
        torch.testing.assert_close(again(images[0]), model(images[0]))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(6, 3)

    def forward(self, a, b):
        return {"sum": self.left(a) + self.right(b), "left": self.left(a)}


def test_named_inputs_and_outputs_keep_their_names():
    model = TwoInputs().eval()
    a, b = torch.randn(5, 4), torch.randn(5, 6)
    captured = capture(model, {"b": b, "a": a})
    assert captured.input_names == ("a", "b")
    assert captured.output_names == ("sum", "left")
    with torch.no_grad():
        found, expected = captured.graph_module(a=a, b=b), model(a, b)
    assert list(found) == list(expected)
    torch.testing.assert_close(found["sum"], expected["sum"])


def test_views_take_any_memory_layout():
    class Flattens(nn.Module):
        def forward(self, x):
            return x.view(x.shape[0], -1)

    x = torch.randn(3, 4, 5, 6)
    captured = capture(Flattens(), (x,))
    channels_last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(captured.graph_module(channels_last), x.flatten(1))


@pytest.mark.slow
def test_tied_weights_stay_one_tensor():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).relu())

    captured = capture(Tied().eval(), (torch.randn(3, 4),))
    weights = {node.target for node in captured.graph_module.graph.nodes if str(node.target).endswith("weight")}
    assert len(weights) == 1


class Branching(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


class HoldsBranching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.inner = nn.Linear(4, 4), Branching()

    def forward(self, x):
        return self.inner(self.layer(x))


def test_what_torch_cannot_export_names_the_place_and_the_reason():
    with pytest.raises(UnsupportedModelError, match=r"'inner' \(test_capture\.py:\d+\).*data-dependent"):
        capture(HoldsBranching(), (torch.randn(3, 4),))


@pytest.mark.parametrize(
    "x",
    [torch.randn(3, 5), torch.zeros(3, 4, dtype=torch.int64)],
    ids=["shape", "int64"],
)
def test_inputs_the_model_rejects_are_the_datas_fault(x):
    with pytest.raises(CalibrationDataError, match="rejects a calibration batch of"):
        capture(nn.Linear(4, 2), (x,))


def test_parameters_without_values_are_refused():
    with pytest.raises(UnsupportedModelError, match="meta device"):
        capture(nn.Linear(4, 2, device="meta"), (torch.randn(3, 4),))


def test_a_stateful_model_is_refused():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            self.calls += 1
            return self.layer(x) * self.calls

    model = Counts()
    with pytest.raises(UnsupportedModelError, match="'calls'"):
        capture(model, (torch.randn(3, 4),))
    assert model.calls == 0


def test_a_program_exported_for_training_is_refused(images):
    model = ResidualNet().train()
    program = torch.export.export(model, (images[0][:4],))
    with pytest.raises(UnsupportedModelError, match=r"model\.eval\(\)"):
        capture(program, (images[0][:4],))


def test_a_fixed_batch_is_reported(residual_net, images):
    program = torch.export.export(residual_net, (images[0][:4],))
    assert capture(program, (images[0][:4],)).batch_size == 4


def test_a_batch_size_that_the_code_fixes_is_found():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            return self.head(x.reshape(20, 6)).reshape(4, 5, 3)

    program = export_quietly(Fixed(), (torch.randn(4, 5, 6),))
    assert capture(program, (torch.randn(4, 5, 6),)).batch_size == 4


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_transformers_with_a_causal_mask_are_captured(kind):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            layer, whole = (
                (nn.TransformerEncoderLayer, nn.TransformerEncoder)
                if kind == "encoder"
                else (nn.TransformerDecoderLayer, nn.TransformerDecoder)
            )
            self.layers = whole(layer(8, 2, 16, batch_first=True), 1)
            self.register_buffer("mask", torch.full((5, 5), float("-inf")).triu(1))

        def forward(self, x):
            return self.layers(x, mask=self.mask) if kind == "encoder" else self.layers(x, 0 * x, tgt_mask=self.mask)

    torch.manual_seed(0)
    model, x = Masked().eval(), torch.randn(4, 5, 8)
    captured = capture(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(captured.graph_module(x), model(x))
        changed = torch.cat([x[:, :3], torch.randn(4, 2, 8)], 1)
        assert torch.equal(captured.graph_module(changed)[:, :3], captured.graph_module(x)[:, :3])
    assert not any(module._forward_pre_hooks for module in model.modules())


class Counted(nn.Module):
    """Counts its runs; paddings to even sizes are left to the caller, so that it rejects odd ones."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2, stride=2)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.runs.add_(1)
        if x.shape[2] % 2:
            raise ValueError("odd")
        return self.conv(x)


def test_sizes_are_tried_on_a_copy():
    model = Counted()
    captured = capture(model, (torch.randn(2, 3, 16, 16),))
    assert captured.free_axes == {"x": (2, 3)}
    assert model.runs == 0


@pytest.mark.parametrize("was_enabled", [True, False])
def test_a_capture_leaves_the_garbage_collector_as_it_was(was_enabled):
    seen = []

    class Sees(nn.Module):
        def forward(self, x):
            seen.append(gc.isenabled())
            return x + 1

    (gc.enable if was_enabled else gc.disable)()
    try:
        capture(Sees(), (torch.randn(2, 3),), dynamic=None)
        found = gc.isenabled()
    finally:
        gc.enable()
    assert found == was_enabled
    assert not any(seen)

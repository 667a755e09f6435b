"""Products with parameters as layers: the same values, at any batch, and each parameter stored once."""

import pytest
import torch
from torch import nn

from infoq_fx.graph.capture import capture
from infoq_fx.graph.layer_forms.normal_form import NORMAL_FORM
from infoq_fx.graph.layer_forms.products import write_products_as_layers
from infoq_fx.graph.layers import LAYER_OPS, read_tensor
from infoq_fx.graph.passes.pass_manager import run_passes

ATEN = torch.ops.aten
TOKENS, FEATURES, HEADS = torch.randn(4, 6, 16), torch.randn(5, 16), torch.randn(4, 6, 2, 8)


class Product(nn.Module):
    def __init__(self, compute, *shapes):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])
        self.compute = compute

    def forward(self, x):
        return self.compute(x, *self.weights)


def normalize(model, x):
    captured = capture(model, {"x": x})
    assert captured.batch_size is None
    return run_passes(captured.graph_module, NORMAL_FORM)


def layers_of(graph_module):
    nodes = [node for node in graph_module.graph.nodes if node.target in LAYER_OPS]
    return [node for node in nodes if node.args[LAYER_OPS[node.target].weight].op == "get_attr"]


def check(model, x):
    torch.manual_seed(0)
    graph_module = normalize(model, x)
    for given in (x, torch.cat([x, x + 1])):
        with torch.no_grad():
            torch.testing.assert_close(graph_module(given), model(given), rtol=1e-4, atol=1e-4)
    return graph_module


CASES = {
    "einsum": (lambda x, w: torch.einsum("btd,dhk->bthk", x, w), TOKENS, (16, 2, 8)),
    "parameter on the left": (lambda x, w: torch.einsum("dhk,btd->bhkt", w, x), TOKENS, (16, 2, 8)),
    "ellipsis": (lambda x, w: torch.einsum("...d,dhk", x, w), TOKENS, (16, 2, 8)),
    "a chain": (lambda x, w, v: torch.einsum("btd,dhk,hko->bto", x, w, v), TOKENS, (16, 2, 8), (2, 8, 5)),
    "bilinear attention": (lambda x, w: torch.einsum("bqd,de,bke->bqk", x, w, x.tanh()), TOKENS, (16, 16)),
    "sums of one operand": (lambda x, w: torch.einsum("btd,dok->bo", x, w), TOKENS, (16, 5, 3)),
    "a sum over heads": (lambda x, w: torch.einsum("bthk,hkd->btd", x, w), HEADS, (2, 8, 5)),
    "groups": (lambda x, w: torch.einsum("bthk,hkd->bthd", x, w), HEADS, (2, 8, 5)),
    "groups on the left": (lambda x, w: torch.einsum("hkd,bthk->hbdt", w, x).movedim(0, 1), HEADS, (2, 8, 5)),
    "experts": (lambda x, w: torch.bmm(x.expand(4, -1, -1), w).sum(0), FEATURES, (4, 16, 32)),
    "experts, two layers": (
        lambda x, w, v: torch.bmm(torch.bmm(x.expand(4, -1, -1), w).relu(), v).sum(0),
        FEATURES,
        (4, 16, 32),
        (4, 32, 8),
    ),
    "expanded": (lambda x, w: torch.bmm(x, w.unsqueeze(0).expand(x.shape[0], -1, -1)), TOKENS, (16, 7)),
    "repeated": (lambda x, w: torch.bmm(x, w.unsqueeze(0).repeat(x.shape[0], 1, 1)), TOKENS, (16, 7)),
    "expanded on the left": (lambda x, w: torch.bmm(w.expand(x.shape[0], -1, -1), x), TOKENS, (3, 6)),
    "four dimensions": (lambda x, w: x.unsqueeze(1) @ w, TOKENS, (3, 16, 32)),
    "matmul on the left": (lambda x, w: w @ x.transpose(1, 2), TOKENS, (3, 16)),
    "baddbmm": (
        lambda x, w, b: torch.baddbmm(b, x.expand(4, -1, -1), w, alpha=0.5, beta=2).sum(0),
        FEATURES,
        (4, 16, 32),
        (4, 1, 32),
    ),
    "addmm of a transpose": (lambda x, w, b: torch.addmm(b, x, w.t()), FEATURES, (32, 16), (32,)),
    "reshaped": (lambda x, w: x @ w.reshape(8, 16).t(), TOKENS, (16, 8)),
    "split": (lambda x, w: torch.cat([x @ part for part in w.chunk(3, 1)], -1), TOKENS, (16, 9)),
    "tensordot": (lambda x, w: torch.tensordot(x, w, dims=([2, 1], [0, 2])), TOKENS, (16, 2, 6)),
    "inner": (torch.inner, TOKENS, (12, 16)),
    "of a parameter's layer": (lambda x, w: nn.functional.linear(w, x[:, 0]).t(), TOKENS, (3, 16)),
    "read twice": (
        lambda x, w: torch.einsum("btd,dh->bth", x, w) + torch.einsum("btd,dh->bth", x.relu(), w),
        TOKENS,
        (16, 3),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_products_become_layers_of_the_same_values(name):
    compute, x, *shapes = CASES[name]
    model = Product(compute, *shapes)
    graph_module = check(model, x)
    layers = layers_of(graph_module)
    matrices = [weight for weight in model.weights if weight.ndim > 1 and 1 not in weight.shape]
    held = [value for _, value in [*graph_module.named_parameters(), *graph_module.named_buffers()]]
    read = {str(node.args[LAYER_OPS[node.target].weight].target) for node in layers}
    sizes = sorted(read_tensor(graph_module, path).numel() for path in read)
    if name not in ("split", "sums of one operand"):  # stored in parts, and summed first
        assert sizes == sorted(weight.numel() for weight in matrices)
        assert sum(value.numel() for value in held) == sum(weight.numel() for weight in model.weights)
        assert all(path.startswith("weights.") for path in read)


def test_groups_have_scales_of_their_own():
    graph_module = check(Product(CASES["groups"][0], (2, 8, 5)), HEADS)
    (node,) = layers_of(graph_module)
    assert node.target is ATEN.conv1d.default
    assert tuple(node.args[1].meta["val"].shape) == (2 * 5, 8, 1)
    assert node.args[6] == 2


def test_a_tied_embedding_is_stored_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(30, 16)

        def forward(self, x):
            rows, weight = self.table(x), self.table.weight
            return torch.einsum("btd,vd->btv", rows, weight) + rows @ weight.T

    model, ids = Tied(), torch.randint(0, 30, (4, 6))
    graph_module = normalize(model, ids)
    torch.testing.assert_close(graph_module(ids), model(ids), rtol=1e-4, atol=1e-4)
    assert [name for name, _ in graph_module.named_parameters()] == ["table.weight"]
    assert not dict(graph_module.named_buffers())


def test_bilinear_is_a_layer_over_products():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Bilinear(16, 16, 5)

        def forward(self, x):
            return self.layer(x, x.tanh())

    for x in (FEATURES, TOKENS):
        (node,) = layers_of(check(Net(), x))
        assert tuple(node.args[1].meta["val"].shape) == (5, 256)
        assert str(node.args[1].target) == "layer.weight"


def test_an_einsum_of_activations_is_a_matmul():
    graph_module = check(Product(lambda x: torch.einsum("bthk,bshk->bhts", x, x.tanh())), HEADS)
    assert [node.target for node in graph_module.graph.nodes].count(ATEN.matmul.default) == 1


@pytest.mark.parametrize(
    ("compute", "shapes"),
    [
        (lambda x, w: x @ w, [(16, 3)]),
        (lambda x, w, b: nn.functional.linear(x, w, b), [(3, 16), (3,)]),
        (lambda x, v: x @ v, [(16,)]),
        (lambda x, w: torch.einsum("btd,dd->bt", x, w), [(16, 16)]),
        (lambda x: x @ x.transpose(1, 2), []),
    ],
)
def test_what_is_a_layer_or_cannot_be_one_is_left_alone(compute, shapes):
    graph_module = capture(Product(compute, *shapes), {"x": TOKENS}).graph_module
    assert not write_products_as_layers(graph_module)

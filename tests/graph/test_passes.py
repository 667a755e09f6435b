"""Each pass: the nodes of the graph before and after, and that outputs do not change."""

import functools

import pytest
import torch
from networks import ResidualNet, randomise_norms
from torch import nn
from torch.nn.utils import parametrizations

import infoq_fx
from infoq_fx.errors import OptionError, UnsupportedModelError
from infoq_fx.graph.capture import capture
from infoq_fx.graph.passes.add_head_dimension import add_head_dimension
from infoq_fx.graph.passes.convert_quantizers import convert_quantizers
from infoq_fx.graph.passes.fold_batch_norm import fold_batch_norm
from infoq_fx.graph.passes.fold_constants import fold_constants
from infoq_fx.graph.passes.insert_observers import insert_observers
from infoq_fx.graph.passes.insert_quantizers import insert_quantizers
from infoq_fx.graph.passes.pass_manager import run_passes
from infoq_fx.graph.passes.quantize_biases import quantize_biases
from infoq_fx.graph.passes.remove_observers import remove_observers
from infoq_fx.graph.sites import find_sites
from infoq_fx.quantization.quantizers import Observe, Quantizer

ATEN = torch.ops.aten
NORM = ATEN._native_batch_norm_legit_no_training.default


def count(graph_module, target):
    return sum(node.target is target for node in graph_module.graph.nodes)


def modules_of(graph_module, kind):
    return [m for m in graph_module.modules() if isinstance(m, kind)]


def norm_after(layer, norm, shape):
    model = nn.Sequential(layer, norm, nn.ReLU())
    return randomise_norms(model).eval(), torch.randn(4, *shape)


LAYERS = {
    "conv1d": lambda: norm_after(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (3, 9)),
    "conv2d_bias": lambda: norm_after(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), (3, 9, 9)),
    "conv2d": lambda: norm_after(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), (3, 9, 9)),
    "conv2d_same": lambda: norm_after(nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4), (3, 9, 9)),
    "depthwise": lambda: norm_after(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), (4, 9, 9)),
    "conv3d": lambda: norm_after(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), (2, 5, 5, 5)),
    "transposed": lambda: norm_after(nn.ConvTranspose2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), (3, 5, 5)),
    "linear": lambda: norm_after(nn.Linear(5, 4), nn.BatchNorm1d(4), (5,)),
    "no_affine": lambda: norm_after(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), (3, 9, 9)),
}


@pytest.mark.parametrize(
    "name", [name if name in ("depthwise", "linear") else pytest.param(name, marks=pytest.mark.slow) for name in LAYERS]
)
def test_a_batch_norm_folds_into_the_layer_before_it(name):
    model, x = LAYERS[name]()
    graph_module = capture(model, (x,)).graph_module
    assert count(graph_module, NORM) == 1
    run_passes(graph_module, [fold_batch_norm])
    assert count(graph_module, NORM) == count(graph_module, ATEN.batch_norm.default) == 0
    assert {"0.weight", "0.bias"} == {n for n, _ in graph_module.named_buffers()}
    with torch.no_grad():
        torch.testing.assert_close(graph_module(x), model(x), rtol=1e-4, atol=1e-5)


class NormFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(self.norm(x))


class UsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class SharedConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.one(self.conv(x)) + self.two(self.conv(x * 2))


class OnTokens(nn.Module):
    """Five tokens of five features: the batch norm's channels are the tokens, the linear layer's the features."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(5, 5), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.layer(x))


class NoBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(5, 5)), nn.BatchNorm1d(5)

    def forward(self, x):
        return self.norm(x[:, 0, 0] @ self.weight)


def grouped_transposed():
    return nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4))


CANNOT_FOLD = [(NormFirst, 1), (UsedTwice, 1), (SharedConv, 2), (grouped_transposed, 1), (OnTokens, 1), (NoBias, 1)]


@pytest.mark.parametrize(("build", "left"), CANNOT_FOLD)
def test_a_batch_norm_that_cannot_fold_stays_one_node(build, left):
    model, x = randomise_norms(build()).eval(), torch.randn(4, 4 if build is grouped_transposed else 3, 5, 5)
    graph_module = run_passes(capture(model, (x,)).graph_module, [fold_batch_norm])
    assert count(graph_module, ATEN.batch_norm.default) == left
    assert count(graph_module, NORM) == 0
    with torch.no_grad():
        torch.testing.assert_close(graph_module(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_computed_weight_becomes_a_weight_of_its_layer():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.ReLU()).eval()
    x = torch.randn(3, 4)
    graph_module = capture(model, (x,)).graph_module
    before = len(graph_module.graph.nodes)
    run_passes(graph_module, [fold_constants])
    assert len(graph_module.graph.nodes) < before
    assert "0.weight" in dict(graph_module.named_buffers())
    with torch.no_grad():
        torch.testing.assert_close(graph_module(x), model(x))
    assert not fold_constants(graph_module)


class Attends(nn.Module):
    def forward(self, x, mask):
        return nn.functional.scaled_dot_product_attention(x, x * 2, x + 1, attn_mask=mask)


def test_attention_over_three_dimensions_gets_a_head():
    x, mask = torch.randn(3, 5, 4), torch.randn(3, 5, 5)
    graph_module = capture(Attends(), (x, mask)).graph_module
    run_passes(graph_module, [add_head_dimension])
    assert count(graph_module, ATEN.unsqueeze.default) == 4
    assert count(graph_module, ATEN.squeeze.dim) == 1
    torch.testing.assert_close(graph_module(x, mask), Attends()(x, mask))
    assert not add_head_dimension(graph_module)


def plan_of(model, x, **options):
    graph_module = run_passes(capture(model.eval(), (x,)).graph_module, [fold_constants, fold_batch_norm])
    chosen = {"bits": (2, 8), "activation_bits": (8,), **options}
    return graph_module, find_sites(graph_module, {"x": x}, **chosen)


@functools.cache
def residual_graph():
    torch.manual_seed(1)
    x = torch.randn(4, 1, 8, 8)
    graph_module = capture(randomise_norms(ResidualNet()).eval(), (x,)).graph_module
    return run_passes(graph_module, [fold_constants, fold_batch_norm]), x


def residual_plan(**options):
    """Finding sites changes no graph."""
    graph_module, x = residual_graph()
    return find_sites(graph_module, {"x": x}, **{"bits": (2, 8), "activation_bits": (8,), **options})


def by_kind(plan, kind, searched=True):
    return [s.name for s in plan.inventory.sites if s.kind == kind and s.is_searched is searched]


def test_sites_of_a_residual_network():
    plan = residual_plan()
    layers = ["stem.0", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "head"]
    assert by_kind(plan, "weight") == [f"{layer}.weight" for layer in layers]
    assert by_kind(plan, "activation") == [f"{layer}.input" for layer in layers]
    # Both operands of both additions; the sums in front of a convolution have a site already.
    fused = by_kind(plan, "activation", searched=False)
    assert {"stem.0.output", "blocks.0.conv2.output", "blocks.1.conv2.output"} <= set(fused)
    assert all(site.bits == (8,) for site in plan.inventory.sites if not site.is_searched)
    assert plan.classifier == "head.weight"
    macs = {operation.name: operation.macs for operation in plan.inventory.operations}
    assert macs == {layers[0]: 64 * 6 * 9, **dict.fromkeys(layers[1:5], 64 * 36 * 9), "head": 30}
    # 5 convolution biases of 6 (four of them from batch norms) and the head's 5.
    assert plan.inventory.float_bytes == 4 * (5 * 6 + 5)


class Wide(nn.Module):
    """Two layers on one tensor, one weight in two layers, a matmul, attention, a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.up = nn.ConvTranspose1d(4, 2, 3)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        c = self.a(b.relu())
        d = nn.functional.scaled_dot_product_attention(a, b, c)
        return self.up(d @ b.transpose(1, 2))


def test_shared_tensors_and_shared_weights_are_one_site():
    _, plan = plan_of(Wide(), torch.randn(5, 4, 6))
    assert by_kind(plan, "weight") == ["a.weight", "b.weight", "up.weight"]
    activations = by_kind(plan, "activation")
    assert activations.count("a.input") == 1
    assert "b.input" not in activations
    assert {"attention.query", "attention.key", "attention.value", "matmul.left", "matmul.right"} <= set(activations)
    site = plan.inventory["up.weight"]
    assert (site.shape, site.channel_axis) == ((4, 2, 3), 1)
    macs = {operation.name: operation.macs for operation in plan.inventory.operations}
    assert macs["a"] == macs["a_1"] == macs["b"] == 4 * 36
    assert macs["attention"] + macs["attention.1"] == 2 * 4 * 4 * 6
    assert macs["matmul"] == 4 * 4 * 6
    assert macs["up"] == 4 * 4 * 2 * 3


@pytest.mark.parametrize(
    ("ignore", "left"),
    [
        (["stem"], 5),
        (["*.conv1"], 4),
        (["blocks.0*", "head"], 3),
        (["blocks.?.conv2", "stem.0"], 3),
    ],
    ids=str,
)
def test_ignored_layers_stay_in_float(ignore, left):
    plan = residual_plan(ignore=ignore)
    assert len(by_kind(plan, "weight")) == left
    whole = residual_plan()
    kept = sum(site.numel for site in plan.inventory.sites if site.kind == "weight")
    everything = sum(site.numel for site in whole.inventory.sites if site.kind == "weight")
    assert plan.inventory.ignored_weights == everything - kept
    assert plan.inventory.float_bytes - whole.inventory.float_bytes == 4 * (everything - kept)


def test_pins_fix_weights_by_layer_and_any_site_by_name():
    plan = residual_plan(pin={"blocks.0": 5, "head": 8, "stem.0.input": 4})
    bits = {site.name: site.bits for site in plan.inventory.sites}
    assert bits["blocks.0.conv1.weight"] == bits["blocks.0.conv2.weight"] == (5,)
    assert bits["head.weight"] == (8,)
    assert bits["stem.0.input"] == (4,)
    assert bits["blocks.1.conv1.weight"] == (2, 8)


@pytest.mark.parametrize("option", [{"ignore": ["block.0"]}, {"pin": {"blocks.0.conv3": 4}}], ids=str)
def test_a_pattern_that_matches_nothing_lists_the_nearest(option):
    with pytest.raises(OptionError, match=r"unknown layer in (ignore|pin) .*'blocks\.0"):
        residual_plan(**option)


@pytest.mark.parametrize(
    ("model", "options"),
    [(nn.Sequential(nn.ReLU(), nn.Softmax(1)), {}), (nn.Sequential(nn.Linear(4, 2)), {"ignore": ["0"]})],
    ids=["none", "all_ignored"],
)
def test_nothing_to_quantize(model, options):
    with pytest.raises(UnsupportedModelError, match="no layer to quantize"):
        plan_of(model, torch.randn(3, 4), **options)


def test_a_weight_that_is_not_finite_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(UnsupportedModelError, match=r"'1\.weight' holds NaN"):
        plan_of(model, torch.randn(3, 4))


@pytest.mark.slow
def test_quantizers_and_observers_leave_the_function_as_it_is(residual_net, images):
    x = images[0][:4]
    graph_module, plan = plan_of(residual_net, x)
    nodes = len(graph_module.graph.nodes)
    expected = graph_module(x)
    insert_quantizers(graph_module, plan)
    graph_module.recompile()
    assert len(graph_module.graph.nodes) == nodes + len(plan.placements)
    assert len(modules_of(graph_module, Quantizer)) == len(plan.placements)
    insert_observers(graph_module)
    graph_module.recompile()
    observers = modules_of(graph_module, Observe)
    assert len(graph_module.graph.nodes) == nodes + len(plan.placements) + len(observers)
    names = [name for observer in observers for name in observer.names]
    assert len(names) == len(set(names))
    assert {"output", "head.input", "blocks.0", "stem", "blocks.1.conv2"} <= set(names)
    assert torch.equal(graph_module(x), expected)


@pytest.mark.slow
def test_converting_leaves_only_integers_and_the_projects_ops(residual_net, images):
    prepared = infoq_fx.prepare(residual_net, images[0], levels="uniform")
    graph_module = prepared.graph_module
    bits = {site.name: 3 if site.kind == "weight" else 8 for site in prepared.inventory.sites}
    for _, quantizer in prepared.quantizer_nodes():
        quantizer.bits = bits[quantizer.site.name]
    expected = graph_module(images[0])
    assert remove_observers(graph_module)
    assert convert_quantizers(graph_module, bits)
    graph_module.recompile()
    assert not modules_of(graph_module, (Quantizer, Observe)) or not count(graph_module, "call_module")
    torch.testing.assert_close(graph_module(images[0]), expected, rtol=0, atol=1e-6)
    assert quantize_biases(graph_module)
    graph_module.recompile()
    dtypes = {name: buffer.dtype for name, buffer in graph_module.named_buffers() if "quantizers" not in name}
    for site in prepared.inventory.sites:
        if site.kind == "weight":
            weight = graph_module.get_buffer(site.name)
            assert weight.dtype == torch.int8
            assert -4 <= weight.min() < weight.max() <= 3
    assert all(dtypes[name] == torch.int32 for name in dtypes if name.endswith(".bias"))
    # The bias moves by at most half a unit of the accumulator.
    torch.testing.assert_close(graph_module(images[0]), expected, rtol=0.05, atol=0.05)


def test_a_failing_pass_is_named(residual_net, images):
    def break_everything(graph_module):
        raise KeyError("lost")

    graph_module = capture(residual_net, (images[0][:4],)).graph_module
    with pytest.raises(UnsupportedModelError, match=r"break_everything failed \(passes done: fold_constants\)"):
        run_passes(graph_module, [fold_constants, break_everything])


def test_the_test_model_has_norms_that_matter(images):
    model = randomise_norms(ResidualNet()).eval()
    assert not torch.allclose(model(images[0]), ResidualNet().eval()(images[0]))


class Language(nn.Module):
    def __init__(self, is_tied):
        super().__init__()
        self.words, self.positions, self.head = nn.Embedding(9, 4), nn.Embedding(3, 4), nn.Linear(4, 9)
        self.register_buffer("ids", torch.arange(3))
        if is_tied:
            self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(self.words(x) + self.positions(self.ids))


@pytest.mark.parametrize("is_tied", [False, True])
def test_embeddings_are_weight_sites_with_scales_by_feature_unless_a_layer_shares_them(is_tied):
    graph_module, plan = plan_of(Language(is_tied), torch.randint(0, 9, (4, 3)))
    axes = [site.channel_axis for site in plan.inventory.sites if site.kind == "weight"]
    assert sorted(axes) == ([0, 1] if is_tied else [0, 1, 1])
    assert by_kind(plan, "activation") == ["head.input"]
    assert [operation.name for operation in plan.inventory.operations] == ["head"]
    run_passes(graph_module, [lambda gm: insert_quantizers(gm, plan), insert_observers])
    names = [name for observer in modules_of(graph_module, Observe) for name in observer.names]
    assert "words.input" not in names
    assert "words" in names
    assert "positions" not in names  # the same for all samples
    assert "head.input" in names

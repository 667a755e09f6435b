import copy
import dataclasses
import shutil

import pytest
import torch
from networks import Block, ResidualNet, randomise_norms
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager

import infoq_fx
from infoq_fx.conversion.quantized import provenance_of
from infoq_fx.types import Allocation

pytestmark = pytest.mark.slow  # torch.compile and pass managers

IMAGES = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def case():
    """A model, its allocation of mixed bits, and what prepare and convert make of both."""
    torch.manual_seed(1)
    model = randomise_norms(ResidualNet()).eval()
    prepared = infoq_fx.prepare(model, IMAGES, activation_bits=(6, 8))
    bits = {s.name: 3 + i % 4 if s.kind == "weight" else s.bits[0] for i, s in enumerate(prepared.inventory.sites)}
    assert {6, 8} <= set(bits.values())
    allocation = Allocation(bits=bits, criterion="by hand")
    return model, allocation, infoq_fx.convert(prepared, allocation)


def recording(seen):
    def keep(graph_module, example_inputs):
        seen.append(graph_module)
        return graph_module.forward

    return keep


def compiled(model, *arguments, fullgraph=True, **options):
    return torch.compile(model, backend=infoq_fx.backend(*arguments, **options), fullgraph=fullgraph)


def chosen_bits(quantized):
    """Without sites that are fixed to 8 bits; their names hold those of nodes, which differ between captures."""
    return {name: bits for name, bits in infoq_fx.allocation_of(quantized).bits.items() if ".output" not in name}


def failure_of(call):
    with pytest.raises(BackendCompilerFailed) as caught:
        call()
    return caught.value.inner_exception


# Passes


def remove_relus(graph_module):
    found = [node for node in graph_module.graph.nodes if node.target is torch.ops.aten.relu.default]
    for node in found:
        node.replace_all_uses_with(node.args[0])
        graph_module.graph.erase_node(node)
    return PassResult(graph_module, bool(found))


@pytest.mark.slow
def test_the_pass_stands_in_a_manager_between_others(case):
    model, allocation, quantized = case
    traced = torch.fx.symbolic_trace(model)
    code = traced.code
    nodes = []

    def count(graph_module):
        nodes.append(len(graph_module.graph.nodes))
        return PassResult(graph_module, False)

    manager = PassManager([count, infoq_fx.InfoqPass(allocation, IMAGES, recovery="none"), count, remove_relus, count])
    done = manager(traced)
    assert done.modified
    assert isinstance(done.graph_module, infoq_fx.QuantizedModule)
    assert nodes[2] == nodes[1] - 5
    assert traced.code == code
    twin = copy.deepcopy(quantized)
    remove_relus(twin)
    twin.recompile()
    assert torch.equal(done.graph_module(IMAGES), twin(IMAGES))
    assert chosen_bits(done.graph_module) == chosen_bits(quantized)


@pytest.mark.slow
def test_the_pass_finds_an_allocation_under_a_budget(case):
    model, _, _ = case
    options = {"criterion": "weight_mse", "refine": False, "recovery": "none"}
    call = infoq_fx.InfoqPass(infoq_fx.Budget(weight_bits=4), IMAGES, **options)
    free = {"x": {0: torch.export.Dim.AUTO}}
    done = call(torch.export.export(model, (IMAGES,), dynamic_shapes=free).module())
    expected = infoq_fx.quantize(model, 4.0, calibration_data=IMAGES, **options)
    assert infoq_fx.allocation_of(done.graph_module).bits == infoq_fx.allocation_of(expected).bits
    again = call(done.graph_module)
    assert again.graph_module is done.graph_module
    assert not again.modified


@pytest.mark.slow
def test_a_manager_of_several_steps_comes_to_an_end(case):
    model, allocation, quantized = case
    manager = PassManager([infoq_fx.InfoqPass(allocation, IMAGES, recovery="none")], steps=5)
    done = manager(torch.fx.symbolic_trace(model))
    assert torch.equal(done.graph_module(IMAGES), quantized(IMAGES))


@pytest.mark.slow
def test_layers_that_the_allocation_does_not_know_stay_in_float(case):
    model, allocation, _ = case
    known = {name: bits for name, bits in allocation.bits.items() if not name.startswith("head.")}
    done = infoq_fx.InfoqPass(Allocation(bits=known), IMAGES, recovery="none")(torch.fx.symbolic_trace(model))
    held = dict(done.graph_module.named_parameters())
    assert torch.equal(held["head.weight"], model.head.weight)
    assert "head.weight" not in infoq_fx.allocation_of(done.graph_module).bits


@pytest.mark.parametrize(
    ("limit", "options", "levels"),
    [("bitops", {}, "mirrored"), ("weight_bits", {}, "codebook"), ("weight_bits", {"levels": "uniform"}, "uniform")],
)
def test_levels_follow_the_budget_of_an_allocation(case, limit, options, levels):
    model, allocation, _ = case
    known = dataclasses.replace(allocation, budget=infoq_fx.Budget(**{limit: 1e9}))
    done = infoq_fx.InfoqPass(known, IMAGES, recovery="none", **options)(torch.fx.symbolic_trace(model))
    assert provenance_of(done.graph_module).inventory.levels == levels


@pytest.mark.parametrize("face", [infoq_fx.InfoqPass, infoq_fx.backend])
def test_arguments_are_refused_at_once(face, case):
    with pytest.raises(infoq_fx.OptionError, match="got a str as its target"):
        face("3.0")
    with pytest.raises(infoq_fx.OptionError, match=r"unknown option .* 'critrion'; nearest of .*'criterion'"):
        face(3.0, critrion="eagl")
    with pytest.raises(infoq_fx.OptionError, match=r"with an allocation 'criterion'"):
        face(case[1], criterion="eagl")


def test_an_allocation_of_another_model_is_refused(case):
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()))
    with pytest.raises(infoq_fx.OptionError, match=r"no layer of this model; its sites are 'blocks.*'0\.weight'"):
        infoq_fx.InfoqPass(case[1], IMAGES)(traced)


# torch.compile


@pytest.mark.slow
def test_the_backend_quantizes_what_dynamo_captures(case):
    model, allocation, quantized = case
    seen = []
    call = compiled(model, allocation, IMAGES, recovery="none", inner=recording(seen))
    assert torch.equal(call(IMAGES[:4]), quantized(IMAGES[:4]))
    (inner,) = seen
    assert chosen_bits(inner) == chosen_bits(quantized)
    # Another batch size is compiled again, not quantized again.
    assert torch.equal(call(IMAGES[:7]), quantized(IMAGES[:7]))
    assert len(seen) == 2
    assert seen[1] is inner


@pytest.mark.slow
def test_recovery_and_a_budget_do_in_the_backend_what_they_do_outside(case):
    model, allocation, _ = case
    prepared = infoq_fx.prepare(model, IMAGES, activation_bits=(6, 8))
    better = infoq_fx.convert(infoq_fx.recover(prepared, allocation, IMAGES, progress=False), allocation)
    assert torch.equal(compiled(model, allocation, IMAGES, inner="eager", progress=False)(IMAGES), better(IMAGES))
    options = {"criterion": "weight_mse", "refine": False, "recovery": "none", "progress": False}
    found = compiled(model, 4.0, IMAGES, inner="eager", **options)(IMAGES)
    assert torch.equal(found, infoq_fx.quantize(model, 4.0, calibration_data=IMAGES, **options)(IMAGES))


@pytest.mark.slow
def test_changed_weights_are_quantized_anew(case):
    model, allocation, _ = case
    changing, seen = copy.deepcopy(model), []
    call = compiled(changing, allocation, IMAGES, recovery="none", inner=recording(seen))
    call(IMAGES[:4])
    with torch.no_grad():
        changing.head.weight.mul_(-2)
    call(IMAGES[:6])
    assert len(seen) == 2
    assert seen[1] is not seen[0]
    first, second = (dict(q.named_buffers())["head.weight"] for q in seen)
    assert not torch.equal(first, second)


@pytest.mark.slow
def test_without_data_the_first_batch_gives_the_ranges(case):
    model, allocation, _ = case
    with pytest.warns(UserWarning, match="ranges of activations are those of the first batch"):
        found = compiled(model, allocation, inner="eager")(IMAGES)
    expected = infoq_fx.InfoqPass(allocation, IMAGES, recovery="none")(torch.fx.symbolic_trace(model)).graph_module
    assert torch.equal(found, expected(IMAGES))


class Named(nn.Module):
    """Inputs by name, a tensor that is no buffer, a parameter used twice, sizes in the code, two outputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.shift = nn.Linear(6, 8), nn.Linear(6, 8, bias=False), torch.linspace(-1, 1, 8)

    def forward(self, tokens, mask=None):
        rows, words, width = tokens.shape
        flat = tokens.reshape(rows * words, width)
        hidden = (self.left(flat) * torch.sigmoid(self.right(flat)) + self.shift).reshape(rows, words, 8) * mask
        return {"hidden": hidden, "total": hidden.sum((1, 2))}


@pytest.mark.slow
def test_names_sizes_and_outputs_survive():
    model = Named().eval()
    data = {"tokens": torch.randn(48, 5, 6), "mask": torch.rand(48, 5, 1)}
    prepared = infoq_fx.prepare(model, data, bits=4)
    allocation = Allocation(bits={site.name: site.bits[0] for site in prepared.inventory.sites})
    expected = infoq_fx.convert(prepared, allocation)
    call = compiled(model, allocation, data, recovery="none", inner="eager")
    for rows in (4, 6, 8):
        few = {name: x[:rows] for name, x in data.items()}
        found = call(few["tokens"], mask=few["mask"])
        assert all(torch.equal(found[name], value) for name, value in expected(**few).items())


@pytest.mark.slow
def test_a_function_around_a_model_is_compiled_too(case):
    model, allocation, quantized = case

    def predict(x):
        return model(x).argmax(1)

    call = compiled(predict, allocation, IMAGES, recovery="none", inner="eager")
    assert torch.equal(call(IMAGES), quantized(IMAGES).argmax(1))


class Open(nn.Sequential):
    def forward(self, *tensors):
        return super().forward(tensors[0])


@pytest.mark.parametrize("kind", [nn.Sequential, Open])
def test_models_that_take_any_number_of_tensors_are_compiled(kind):
    """Dynamo's guards of such inputs do not see the sizes that are found while the backend captures the graph."""
    torch.manual_seed(0)
    model, x = kind(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval(), torch.randn(32, 6)
    torch.compiler.reset()
    found = compiled(model, 8, x, inner="eager", progress=False)
    with torch.no_grad():
        assert float((found(x) - model(x)).abs().max()) < 0.05
        assert found(x[:5]).shape == (5, 3)


def test_training_mode_is_refused_by_name(case):
    _, allocation, _ = case
    model = randomise_norms(ResidualNet()).train()
    error = failure_of(lambda: compiled(model, allocation, IMAGES)(IMAGES[:4]))
    assert isinstance(error, infoq_fx.UnsupportedModelError)
    assert "training mode at 'stem.1': call model.eval() first" in str(error)


class Broken(ResidualNet):
    """A graph break between the stem and the blocks."""

    def forward(self, x):
        x = self.stem(x)
        torch._dynamo.graph_break()
        return self.head(self.blocks(x).mean((2, 3)))


def test_a_part_of_the_model_is_refused(case):
    model = Broken().eval()
    model.load_state_dict(case[0].state_dict())
    error = failure_of(lambda: compiled(model, case[1], IMAGES, fullgraph=False)(IMAGES[:4]))
    assert isinstance(error, infoq_fx.UnsupportedModelError)
    assert "use fullgraph=True to see where" in str(error)


def test_data_of_another_shape_is_refused(case):
    error = failure_of(lambda: compiled(case[0], case[1], torch.randn(16, 3, 8, 8))(IMAGES[:4]))
    assert isinstance(error, infoq_fx.CalibrationDataError)


def test_unknown_backends_and_other_graphs_are_refused(case):
    with pytest.raises(infoq_fx.OptionError, match=r"'inductr'; nearest of .*'inductor'"):
        infoq_fx.backend(case[1], IMAGES, inner="inductr")
    with pytest.raises(infoq_fx.OptionError, match="takes no device"):
        infoq_fx.backend(case[1], IMAGES, device="cpu")
    with pytest.raises(infoq_fx.OptionError, match=r"use quantize\(\) or InfoqPass for other graphs"):
        infoq_fx.backend(case[1], IMAGES)(torch.fx.symbolic_trace(case[0]), [IMAGES])


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler")
def test_eager_inductor_and_the_backend_agree_within_an_output_step(case):
    model, allocation, quantized = case
    layer = next(node for node in quantized.graph.nodes if node.target is torch.ops.aten.linear.default)
    step = max(float(quantized.head.bias_scale.max()), float(layer.args[0].args[1]))
    with torch.no_grad():
        expected = quantized(IMAGES)
        direct = torch.compile(quantized, fullgraph=True)(IMAGES)
        routed = compiled(model, allocation, IMAGES, recovery="none")(IMAGES)
    assert float((direct - expected).abs().max()) <= step
    assert float((routed - expected).abs().max()) <= step


@pytest.mark.slow
def test_a_block_is_a_model_like_any():
    block = randomise_norms(Block(4)).eval()
    x = torch.randn(16, 4, 6, 6)
    done = infoq_fx.InfoqPass(4.0, x, criterion="weight_mse", progress=False)(torch.fx.symbolic_trace(block))
    assert set(infoq_fx.allocation_of(done.graph_module).bits) >= {"conv1.weight", "conv2.weight"}

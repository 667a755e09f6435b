"""Whatever a model calls its parameters, modules, inputs and outputs, nothing of its own is replaced."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

import infoq_fx
from infoq_fx.graph.layers import free_path

pytestmark = pytest.mark.slow  # of names that few models have

TAKEN = ("observers", "quantizers", "one", "zero_0", "x", "output", "quant_max_15", "scale_1", "last_axis")
OF_LAYER = ("weight_scale", "bias_scale", "weight_float", "weight_int4")


class Named(nn.Module):
    """A network with many parameters of its own, called as ``rename`` says."""

    def __init__(self, rename):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.names = {name: rename(name) for name in (*TAKEN, *OF_LAYER)}
        for name in TAKEN:
            self.register_parameter(self.names[name], nn.Parameter(torch.rand(8) + 0.5))
        for name in OF_LAYER:
            self.fc.register_buffer(self.names[name], torch.rand(8) + 0.5)

    def forward(self, x):
        y = self.fc(x)
        for name in OF_LAYER:
            y = y * self.fc._buffers[self.names[name]]
        for name in TAKEN:
            y = y * self._parameters[self.names[name]]
        return self.head(y)


def quantize(model, x, bits=4, **options):
    return infoq_fx.quantize(
        model.eval(),
        float(bits),
        calibration_data=x,
        bits=bits,
        recovery="none",
        refine=False,
        progress=False,
        **options,
    )


@pytest.mark.parametrize("container", ["exact", pytest.param("int8", marks=pytest.mark.slow)])
def test_names_of_the_users_own_change_nothing(container, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    results = []
    for rename in (str, "own_{}".format):
        quantized = quantize(Named(rename), x)
        path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx", container=container)
        (found,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
        with torch.no_grad():
            results.append(quantized(x).numpy())
        np.testing.assert_array_equal(found, results[-1])
    np.testing.assert_array_equal(*results)


class Block(nn.Module):
    """A convolution whose weight is the block's own, with a batch norm behind it, and a ``bias`` that is not its."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3, 1, 1)), nn.Parameter(torch.randn(4, 1, 1))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(functional.conv2d(x, self.weight)) * self.bias


def test_a_folded_batch_norm_leaves_the_models_own_bias_alone():
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.Conv2d(4, 2, 1)).eval()
    model[0].norm.running_mean.normal_()
    x = torch.randn(32, 3, 5, 5)
    with torch.no_grad():
        found, expected = quantize(model, x, 8)(x), model(x)
    assert (found - expected).norm() < 0.05 * expected.norm()


class InputWeight(nn.Module):
    """A layer whose weight is called ``input``, as the site of its input would be."""

    def __init__(self):
        super().__init__()
        self.input = nn.Parameter(torch.randn(5, 6))

    def forward(self, x):
        return functional.linear(x, self.input)


def test_a_weight_called_input_is_another_site_than_the_layers_input():
    torch.manual_seed(0)
    model, x = nn.Sequential(InputWeight(), nn.ReLU(), nn.Linear(5, 3)), torch.randn(32, 6)
    quantized = quantize(model, x, 8)
    assert {"0.input", "0.input_1"} <= set(infoq_fx.allocation_of(quantized).bits)
    with torch.no_grad():
        assert (quantized(x) - model(x)).norm() < 0.05 * model(x).norm()


class OutputInside(nn.Module):
    """A module called ``output`` that does not give the output."""

    def __init__(self):
        super().__init__()
        self.output, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.output(x).relu())


def test_the_observer_output_is_the_models_output():
    prepared = infoq_fx.prepare(OutputInside(), torch.randn(8, 6))
    nodes = prepared.observer_nodes()
    assert nodes["output"] in prepared.graph_module.graph.output_node().all_input_nodes
    assert nodes["output_1"] is not nodes["output"]


class Twice(nn.Module):
    """Outputs that are called as the input is."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return {"x": self.fc(x), "y": x}


def test_outputs_called_like_an_input_get_a_name_of_their_own_in_the_file(tmp_path):
    x = torch.randn(32, 6)
    quantized = quantize(Twice(), x, 8)
    assert list(quantized(x)) == ["x", "y"]
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    assert [value.name for value in onnx.load(path).graph.output] == ["x_1", "y"]


def make_reserved(name, change):
    """A module with a submodule whose name every graph module keeps for itself."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    model.register_module(name, nn.Linear(4, 4))
    model.forward = lambda x: functional.linear(x, model.weight) + change(model._modules[name](x))
    return model


@pytest.mark.parametrize("name", ["meta", "graph", "code"])
def test_a_name_that_torch_keeps_for_itself_is_refused_by_name_where_torch_is_needed(name):
    model = make_reserved(name, lambda y: y + y[:, :2].relu_().sum())
    with pytest.raises(infoq_fx.UnsupportedModelError, match=f"{name}.*rename"):
        infoq_fx.prepare(model, torch.randn(8, 4))


@pytest.mark.parametrize("name", ["meta", "graph", "code"])
def test_a_name_that_torch_keeps_for_itself_may_stand_in_everyday_programs(name):
    model, x = make_reserved(name, torch.relu), torch.randn(64, 4)
    quantized = infoq_fx.quantize(model, 8.0, calibration_data=x, progress=False)
    assert (quantized(x) - model(x)).abs().max() < 0.1 * model(x).abs().max()


def test_free_paths_pass_attributes_of_modules_and_their_tensors():
    model = nn.Sequential()
    model.add_module("a", nn.Linear(2, 2))
    model.register_buffer("scale", torch.zeros(1))
    graph_module = torch.fx.GraphModule(model, torch.fx.Graph())
    graph_module.add_module("a", model.a)
    graph_module.register_buffer("scale", model.scale)
    assert free_path(graph_module, "b.c") == "b.c"
    assert free_path(graph_module, "a.weight") == "a.weight_1"
    assert free_path(graph_module, "scale.a") == "scale_1.a"
    assert free_path(graph_module, "half.a.half") == "half_1.a.half_1"

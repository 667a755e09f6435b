"""Sizes of inputs: the batch is free or its place is told, further axes stay free where the model takes any."""

import importlib
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

import infoq_fx
from infoq_fx.graph.capture import capture
from infoq_fx.graph.program.exporting import export_quietly
from infoq_fx.graph.program.flattening import flatten_program
from infoq_fx.graph.program.sizes import are_equal, stay_equal

X = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Upscaler(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)

    def forward(self, x):
        return functional.pixel_shuffle(self.b(self.a(x).relu()), 2)


class Segmenter(nn.Module):
    """Resizes features to the size of its input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(11, 4, 3, padding=1)

    def forward(self, x):
        y = functional.interpolate(self.a(x).relu(), size=x.shape[2:], mode="nearest")
        return self.b(torch.cat([x, y], 1))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 16 * 16, 5)

    def forward(self, x):
        return self.b(self.a(x).relu().flatten(1))


class PinnedBatch(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        samples = int(x.shape[0])
        y = self.a(x).relu().mean((2, 3)).reshape(samples * 2, 4)
        return self.b(y.reshape(samples, -1) + torch.zeros(samples, 1))


class LoopOverSamples(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 4)

    def forward(self, x):
        return torch.stack([self.a(x[i]) for i in range(int(x.shape[0]))])


class Audio(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv1d(2, 8, 3, padding=1), nn.Conv1d(8, 1, 1)

    def forward(self, x):
        return self.b(self.a(x).relu())


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.a(x).relu().cumsum(1))


def quantize(model, x, **options):
    return infoq_fx.quantize(
        model.eval(), 8.0, calibration_data=x, bits=8, recovery="none", refine=False, progress=False, **options
    )


def shapes(path):
    graph = onnx.load(path).graph
    sizes = lambda value: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]  # noqa: E731
    return [sizes(value) for value in [*graph.input, *graph.output]]


def assert_takes(quantized, path, model, x):
    with torch.no_grad():
        found, expected = quantized(x), model(x)
    assert (found - expected).norm() < 0.06 * expected.norm()
    session = onnxruntime.InferenceSession(path)
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    # Sums in another order round single values to the next step.
    assert result.shape == tuple(found.shape)
    assert np.abs(result - found.numpy()).mean() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("make", [Upscaler, Segmenter])
def test_image_networks_take_any_size(make, tmp_path, capfd):
    model = make()
    quantized = quantize(model, X)
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    assert shapes(path)[0] == ["batch", 3, "height", "width"]
    for size in ((1, 3, 16, 16), (3, 3, 29, 43), (8, 3, 64, 10)):
        assert_takes(quantized, path, model, torch.randn(size))
    assert infoq_fx.verify_onnx(path, quantized, torch.randn(8, 3, 57, 86)).is_sound
    infoq_fx.save_quantized(quantized, tmp_path / "model.pt2")
    again = infoq_fx.load_quantized(tmp_path / "model.pt2")
    assert torch.equal(again(torch.ones(1, 3, 31, 22)), quantized(torch.ones(1, 3, 31, 22)))
    assert shapes(infoq_fx.export_onnx(again, tmp_path / "again.onnx")) == shapes(path)
    assert capfd.readouterr().err == ""


def test_the_capture_is_the_same_whether_sizes_are_free_or_not():
    free, fixed = (infoq_fx.prepare(Upscaler(), X, dynamic=dynamic) for dynamic in ("auto", None))
    assert free.free_axes == {"x": (2, 3)}
    assert not fixed.free_axes
    assert str(free.graph_module.graph) == str(fixed.graph_module.graph)


@pytest.mark.slow
def test_a_classifier_that_needs_its_size_keeps_it(tmp_path, capfd):
    model = Classifier()
    quantized = quantize(model, X)
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    assert shapes(path) == [["batch", 3, 16, 16], ["batch", 5]]
    assert capfd.readouterr().err == ""
    with pytest.raises(infoq_fx.UnsupportedModelError, match=r"axes \[2, 3\] of input 'x' cannot stay free"):
        quantize(model, X, dynamic={"x": (2, 3)})


@pytest.mark.slow
def test_dynamic_names_axes_or_none(tmp_path):
    model = Upscaler()
    paths = {
        str(dynamic): infoq_fx.export_onnx(quantize(model, X, dynamic=dynamic), tmp_path / f"{index}.onnx")
        for index, dynamic in enumerate((None, {"x": 3}, {"x": [0, 2, 3]}))
    }
    assert [shapes(path)[0][2:] for path in paths.values()] == [[16, 16], [16, "width"], ["height", "width"]]
    tokens, x = Tokens(), torch.randn(16, 5, 6)
    assert shapes(infoq_fx.export_onnx(quantize(tokens, x), tmp_path / "t.onnx"))[0] == ["batch", 5, 6]
    path = infoq_fx.export_onnx(quantize(tokens, x, dynamic={"x": 1}), tmp_path / "t.onnx")
    assert shapes(path)[0] == ["batch", "length", 6]
    with pytest.raises(infoq_fx.OptionError, match="nearest"):
        quantize(model, X, dynamic={"image": 2})
    with pytest.raises(infoq_fx.OptionError, match="axis 7"):
        quantize(model, X, dynamic={"x": 7})
    with pytest.raises(infoq_fx.OptionError, match="'auto'"):
        quantize(model, X, dynamic="all")


@pytest.mark.slow
def test_the_length_of_audio_is_free(tmp_path):
    model = Audio()
    quantized = quantize(model, torch.randn(16, 2, 40))
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    assert shapes(path) == [["batch", 2, "length"], ["batch", 1, "length"]]
    assert_takes(quantized, path, model, torch.randn(3, 2, 77))


@pytest.mark.slow
def test_a_batch_that_the_model_writes_into_its_graph_is_freed(tmp_path):
    model = PinnedBatch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized = quantize(model, X)
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    assert shapes(path)[0][0] == shapes(path)[1][0] == "batch"
    for samples in (1, 2, 8):
        assert_takes(quantized, path, model, torch.randn(samples, 3, 16, 16))


@pytest.mark.slow
def test_a_batch_that_cannot_be_freed_is_told_with_its_place_and_not_claimed(tmp_path):
    with pytest.warns(UserWarning, match=r"fixes the batch to the 2 samples of the capture in test_sizes\.py:\d+"):
        quantized = quantize(LoopOverSamples(), torch.randn(16, 6))
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    assert shapes(path) == [[2, 6], [2, 4]]
    assert infoq_fx.verify_onnx(path, quantized, torch.randn(16, 6)).is_sound


class Encoder(nn.Module):
    def __init__(self, keeps_tokens):
        super().__init__()
        self.e, self.h, self.keeps_tokens = nn.TransformerEncoderLayer(16, 2, 24), nn.Linear(16, 3), keeps_tokens

    def forward(self, x):
        y = self.e(x)
        return self.h(y if self.keeps_tokens else y.mean(0))


class Recurrent(nn.Module):
    def __init__(self, keeps_tokens):
        super().__init__()
        self.i, self.l, self.h, self.keeps_tokens = nn.Linear(16, 16), nn.LSTM(16, 8), nn.Linear(8, 3), keeps_tokens

    def forward(self, x):
        y = self.l(self.i(x))[0]
        return self.h(y if self.keeps_tokens else y[-1])


@pytest.mark.parametrize("keeps_tokens", [True, False])
@pytest.mark.parametrize("make", [Encoder, Recurrent])
def test_samples_in_the_second_place_are_refused(make, keeps_tokens):
    torch.manual_seed(0)
    with pytest.raises(infoq_fx.UnsupportedModelError, match="must come first"):
        infoq_fx.prepare(make(keeps_tokens), torch.randn(6, 32, 16))


def test_a_state_with_its_batch_second_says_that_samples_come_first():
    with pytest.raises(infoq_fx.CalibrationDataError, match="samples come first"):
        infoq_fx.prepare(nn.GRU(4, 5, batch_first=True), [((torch.randn(8, 6, 4), torch.randn(1, 8, 5)), None)])


class NormalizesTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 4)

    def forward(self, x):
        return self.a(x / x.abs().max())


def test_models_that_mix_all_values_are_not_mistaken():
    torch.manual_seed(0)
    infoq_fx.prepare(NormalizesTheBatch(), torch.randn(8, 5, 6))


class Steps(nn.Module):
    """A convolution, and operations that torch replaces when it makes a graph functional."""

    def __init__(self, *steps):
        super().__init__()
        self.conv, self.steps = nn.Conv2d(3, 4, 3, padding=1), steps
        self.modules_among_them = nn.ModuleList(step for step in steps if isinstance(step, nn.Module))

    def forward(self, x):
        x = self.conv(x)
        for step in self.steps:
            x = step(x)
        return x


# The first four take any size as they are, the others write sizes into their graphs.
STEPS = [
    (nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
    (lambda x: functional.interpolate(x, scale_factor=2.0, mode="bilinear"), lambda x: x.softmax(1)[:, :4]),
    (lambda x: functional.layer_norm(x.mean((2, 3)), (4,)), lambda x: x.unflatten(1, (2, 2)).squeeze(0)),
    (lambda x: x.chunk(2, dim=1), torch.stack),
    (nn.Flatten(), lambda x: x[:, : 4 * 16 * 16]),
    (lambda x: x / x.shape[-1],),
    (lambda x: x + torch.linspace(0, 1, x.shape[-1]),),
    (lambda x: x.flatten(1).unflatten(1, (4, -1))[..., : x.shape[-1]],),
]


@pytest.mark.parametrize("steps", STEPS)
def test_the_short_comparison_says_equal_only_where_the_whole_one_does(steps):
    model = Steps(*steps).eval()
    programs = [export_quietly(model, (x,)) for x in (X, functional.pad(X, (0, 33, 0, 33)))]
    functionals = [program.run_decompositions({}) for program in programs]
    graphs = [flatten_program(program, torch.device("cpu")).graph_module for program in functionals]
    is_equal = are_equal(*graphs)
    kept = {node.target for node in functionals[0].graph.nodes}
    assert stay_equal(*programs, kept) <= is_equal
    assert is_equal == (STEPS.index(steps) < 4)


class Frames(nn.Module):
    """Convolves images of a video one by one: the number of frames is written into the graph."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return torch.stack([self.conv(x[:, :, t]) for t in range(x.shape[2])], 2).mean((3, 4))


class Windows(nn.Module):
    """Shifts windows of 7 unless there is one alone, as a Swin transformer does."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        for axis in (2, 3):
            if x.shape[axis] > 7:
                x = x.roll(1, axis)
        return self.conv(x)


def test_axes_stay_free_beside_one_that_is_written_into_the_graph():
    video = torch.randn(2, 3, 3, 8, 8)
    captured = capture(Frames().eval(), (video,))
    assert captured.free_axes == {"x": (3, 4)}


def test_symbolic_sizes_are_not_asked_for_where_other_sizes_have_other_operations(monkeypatch):
    asked = []
    module = importlib.import_module("infoq_fx.graph.capture")
    monkeypatch.setattr(module, "try_draft", lambda *given: asked.append(given))
    assert capture(Windows().eval(), (torch.randn(2, 3, 7, 7),)).free_axes == {}
    assert not asked

"""Outputs of any structure: the quantized module gives what the model gives, the file has names for its tensors."""

import collections
import copy
import dataclasses
import pickle
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import infoq_fx

Pair = collections.namedtuple("Pair", "logits hidden")


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    hidden: torch.Tensor


torch.export.register_dataclass(Result, serialized_type_name="tests.graph.test_outputs.Result")

ANCHORS = torch.arange(4.0)
QUICK = {"none first", "size", "nested"}
STRUCTURES = {
    "none in a tuple": (lambda x, h, y: (y, None), ["output_0"]),
    "none first": (lambda x, h, y: {"loss": None, "logits": y}, ["logits"]),
    "bool": (lambda x, h, y: (y, y > 0), ["output_0", "output_1"]),
    "scalar": (lambda x, h, y: (y, y.mean()), ["output_0", "output_1"]),
    "number": (lambda x, h, y: (y, 3, 0.5, True), ["output_0"]),
    "string": (lambda x, h, y: {"logits": y, "name": "net"}, ["logits"]),
    "size": (lambda x, h, y: (y, x.shape[0]), ["output_0", "output_1"]),
    "constant": (lambda x, h, y: (y, ANCHORS + 0), ["output_0", "output_1"]),
    "input": (lambda x, h, y: (y, x), ["output_0", "output_1"]),
    "nested": (
        lambda x, h, y: {"logits": y, "inner": {"a": h, "b": [h + 1, None]}},
        ["logits", "inner.a", "inner.b.0"],
    ),
    "tuple in a tuple": (lambda x, h, y: (y, (h, {"k": h + 1})), ["output_0", "output_1.0", "output_1.1.k"]),
    "namedtuple": (lambda x, h, y: Pair(y, h), ["logits", "hidden"]),
    "dataclass": (lambda x, h, y: Result(y, h), ["logits", "hidden"]),
    "ordered dict": (lambda x, h, y: collections.OrderedDict(b=y, a=h), ["b", "a"]),
}


class Net(nn.Module):
    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.make = nn.Linear(6, 12), nn.Linear(12, 4), make

    def forward(self, x):
        h = self.a(x).relu()
        return self.make(x, h, self.b(h))


def quantize(model, x, **options):
    return infoq_fx.quantize(
        model.eval(), 8.0, calibration_data=x, bits=8, recovery="none", refine=False, progress=False, **options
    )


def same_structure(found, expected):
    if isinstance(expected, torch.Tensor):
        return (
            isinstance(found, torch.Tensor)
            and found.dtype == expected.dtype
            and bool(torch.isclose(found.float(), expected.float(), atol=0.1).float().mean() > 0.95)
        )
    if isinstance(expected, dict):
        return (
            type(found) is type(expected)
            and list(found) == list(expected)
            and all(same_structure(found[key], expected[key]) for key in expected)
        )
    if isinstance(expected, tuple | list):
        return (
            type(found) is type(expected) and len(found) == len(expected) and all(map(same_structure, found, expected))
        )
    if dataclasses.is_dataclass(expected):
        return type(found) is type(expected) and same_structure(vars(found), vars(expected))
    return type(found) is type(expected) and found == expected


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STRUCTURES]
)
def test_the_module_gives_the_models_structure_and_the_file_its_names(name, tmp_path, capfd):
    make, names = STRUCTURES[name]
    torch.manual_seed(1)
    model, x = Net(make), torch.randn(32, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized = quantize(model, x)
        path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    with torch.no_grad():
        expected = model(x[:5])
        assert same_structure(quantized(x[:5]), expected)
        assert same_structure(quantized(x=x[:5]), expected)
        assert same_structure(copy.deepcopy(quantized)(x[:5]), expected)
    assert [value.name for value in onnx.load(path).graph.output] == names
    session = onnxruntime.InferenceSession(path)
    with torch.no_grad():
        tensors = infoq_fx.quantization.call_forms.flatten_tensors(quantized(x[:5]))
    for ours, theirs in zip(tensors, session.run(None, {"x": x[:5].numpy()}), strict=False):
        np.testing.assert_allclose(theirs, ours.numpy(), atol=1e-6)
    assert infoq_fx.verify_onnx(path, quantized, x).verdict.startswith("sound")
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""


@pytest.mark.parametrize("name", ["none first", "nested", "dataclass", "size"])
def test_pickled_modules_keep_the_structure(name):
    model, x = Net(STRUCTURES[name][0]), torch.randn(16, 6)
    quantized = quantize(model, x)
    model.make = None
    again = pickle.loads(pickle.dumps(quantized))
    assert same_structure(again(x), quantized(x))


AS_LOADED = {"dataclass": vars, "namedtuple": tuple}  # classes are not in the file
SAVED = {"none first"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in SAVED else pytest.param(name, marks=pytest.mark.slow) for name in STRUCTURES]
)
def test_saved_modules_keep_the_structure(name, tmp_path):
    model, x = Net(STRUCTURES[name][0]), torch.randn(16, 6)
    quantized = quantize(model, x)
    infoq_fx.save_quantized(quantized, tmp_path / "model.pt2")
    again = infoq_fx.load_quantized(tmp_path / "model.pt2")
    expected = AS_LOADED.get(name, lambda found: found)(quantized(x))
    assert same_structure(again(x), expected)
    found, wanted = (infoq_fx.quantization.call_forms.flatten_tensors(value) for value in (again(x), expected))
    assert all(map(torch.equal, found, wanted))
    path = infoq_fx.export_onnx(again, tmp_path / "model.onnx")
    assert infoq_fx.verify_onnx(path, again, x).is_sound


def test_saved_modules_keep_their_dtypes(tmp_path):
    model, x = nn.Linear(6, 4).half(), torch.randn(16, 6).half()
    quantized = quantize(model, x)
    infoq_fx.save_quantized(quantized, tmp_path / "model.pt2")
    again = infoq_fx.load_quantized(tmp_path / "model.pt2")
    assert again(x).dtype == torch.float16
    assert torch.equal(again(x), quantized(x))


def test_a_model_without_a_tensor_among_its_outputs_is_refused():
    with pytest.raises(infoq_fx.UnsupportedModelError, match="no tensor"):
        infoq_fx.prepare(Net(lambda x, h, y: None), torch.randn(8, 6))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.register_buffer("mean", torch.rand(6))

    def forward(self, image):
        return self.fc(image.sub_(self.mean).mul_(2))


def test_a_model_that_changes_its_input_in_place_is_quantized_and_the_input_left_alone():
    model, x = InPlace(), torch.randn(32, 6)
    kept = x.clone()
    quantized = quantize(model, x)
    found = quantized(x)
    assert torch.equal(x, kept)
    expected = model(x.clone())
    assert (found - expected).norm() < 0.05 * expected.norm()


class Counter(nn.Module):
    def __init__(self, reads):
        super().__init__()
        self.fc, self.reads = nn.Linear(6, 4), reads
        self.register_buffer("steps", torch.tensor(1.0))

    def forward(self, x):
        self.steps += 1
        return self.fc(x) * self.steps if self.reads else self.fc(x)


def test_a_counter_that_nothing_reads_is_left_out_and_a_state_refused():
    x = torch.randn(32, 6)
    model = Counter(reads=False)
    with torch.no_grad():
        assert (quantize(model, x)(x) - model.fc(x)).norm() < 0.05 * model.fc(x).norm()
    with pytest.raises(infoq_fx.UnsupportedModelError, match=r"steps.*state"):
        quantize(Counter(reads=True), x)


class Cond(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return torch.cond(x.mean() > 0, lambda y: self.a(y), lambda y: self.b(y), (x,))


def test_branches_within_the_graph_are_refused_by_name():
    with pytest.raises(infoq_fx.UnsupportedModelError, match=r"torch\.cond"):
        quantize(nn.Sequential(nn.Linear(6, 6), Cond()), torch.randn(8, 6))


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.utils.weight_norm(nn.Conv1d(3, 8, 3)), nn.Linear(8, 3)

    def forward(self, x):
        self.last = self.conv(x).relu()
        return self.head(self.last.mean(2))


@pytest.mark.skipif(torch.__version__ < "2.10", reason="torch.export 2.9 refuses attributes set in a forward")
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_torchs_warnings_about_the_capture_do_not_leak():
    model = Keeps()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(model, torch.randn(16, 3, 9))

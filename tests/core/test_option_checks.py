"""Arguments are refused at the door, by the call that the user made and before anything is computed."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

import infoq_fx
from infoq_fx.core.option_checks import check_device
from infoq_fx.errors import OptionError, UnsupportedModelError

DATA = torch.randn(16, 4)


@pytest.fixture
def nothing_computed(monkeypatch):
    """Reading data and capture fail: what is refused is refused before them."""

    def fail(*args, **kwargs):
        raise AssertionError("something was computed")

    for name in ("read_data", "capture", "fit_data", "find_candidates"):
        monkeypatch.setattr(f"infoq_fx.api.{name}", fail)


@pytest.fixture(scope="module")
def prepared():
    return infoq_fx.prepare(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), DATA)


@pytest.fixture(scope="module")
def table(prepared):
    return infoq_fx.score(prepared, criterion="weight_mse")


MODELS = {
    "None": (None, ["None", "give a trained nn.Module"]),
    "a function": (functional.relu, ["the function relu", "forward()"]),
    "a class": (nn.ReLU, ["the class ReLU", "ReLU(...)"]),
    "a state dict": (nn.Linear(4, 3).state_dict(), ["OrderedDict of 2 entries", "load_state_dict"]),
    "a path": ("model.pt2", ["the path 'model.pt2'", "torch.export.load"]),
    "a tensor": (DATA, ["a Tensor", "nn.Module"]),
}


@pytest.mark.parametrize("call", [lambda m: infoq_fx.quantize(m, 4.0, calibration_data=DATA), infoq_fx.prepare])
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_no_model_is_refused(kind, call, nothing_computed):
    model, parts = MODELS[kind]
    with pytest.raises(UnsupportedModelError) as caught:
        call(model)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", 3.5, None, "cpu:x"])
def test_a_device_that_is_not_there_is_refused(device, nothing_computed):
    model = nn.Linear(4, 3)
    for call in (
        lambda: infoq_fx.quantize(model, 4.0, calibration_data=DATA, device=device),
        lambda: infoq_fx.prepare(model, DATA, device=device),
        lambda: infoq_fx.load_quantized("model.pt2", device=device),
    ):
        with pytest.raises(OptionError, match=r"device=.*; give 'cpu'"):
            call()


def test_devices_are_taken_by_name_and_as_they_are():
    assert check_device("cpu") == check_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("alpha", [-1.0, float("nan"), float("inf"), "1", None, True, torch.ones(2)])
def test_alpha_is_refused_before_anything_is_scored(alpha, prepared, table, nothing_computed):
    for call in (
        lambda: infoq_fx.quantize(nn.Linear(4, 3), 4.0, calibration_data=DATA, alpha=alpha),
        lambda: infoq_fx.refine(prepared, table, 4.0, DATA, alpha=alpha),
        lambda: infoq_fx.allocate(table, 4.0, alpha=alpha),
    ):
        with pytest.raises(OptionError, match=r"alpha=.*give 1\.0"):
            call()


@pytest.mark.parametrize("wrong", [None, nn.Linear(4, 3), "prepared"])
def test_the_stages_take_a_prepared_model(wrong, table, nothing_computed):
    allocation = infoq_fx.allocate(table, 4.0)
    for name, call in {
        "score": lambda: infoq_fx.score(wrong, DATA),
        "refine": lambda: infoq_fx.refine(wrong, table, 4.0, DATA),
        "recover": lambda: infoq_fx.recover(wrong, allocation, DATA),
        "convert": lambda: infoq_fx.convert(wrong, allocation),
    }.items():
        with pytest.raises(OptionError, match=rf"{name}\(\) got a {type(wrong).__name__}; give what prepare\(\)"):
            call()


def test_tables_and_allocations_are_checked(prepared, nothing_computed):
    for call in (
        lambda: infoq_fx.allocate("scores.json", 4.0),
        lambda: infoq_fx.refine(prepared, "scores.json", 4.0, DATA),
    ):
        with pytest.raises(OptionError, match=r"the scores are a str; give what score\(\)"):
            call()
    for call in (lambda: infoq_fx.convert(prepared, {}), lambda: infoq_fx.recover(prepared, {}, DATA)):
        with pytest.raises(OptionError, match=r"the allocation is a dict; give what allocate\(\)"):
            call()


def test_numbers_are_checked_without_torch():
    code = "import infoq_fx.core.option_checks, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(ignore=5), "ignore=5; give a list of glob patterns"),
        (dict(ignore="head"), "ignore='head'; give a list"),
        (dict(pin=["head"]), r"pin=\['head'\]; give a dict of bit-widths"),
    ],
)
def test_layers_are_named_by_patterns(nothing_computed, options, told):
    for call in (infoq_fx.prepare, lambda *args, **options: infoq_fx.audit(*args, progress=False, **options)):
        with pytest.raises(OptionError, match=told):
            call(nn.Linear(4, 3), DATA, **options)


@pytest.mark.parametrize("dynamic", [True, [2], {"input": "a"}, {"input": [True]}])
def test_free_axes_are_numbers_by_input(dynamic):
    with pytest.raises(OptionError, match="dynamic"):
        infoq_fx.prepare(nn.Linear(4, 3), DATA, dynamic=dynamic)

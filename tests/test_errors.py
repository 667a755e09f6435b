"""Every error says what is wrong and what to do: in the source, and in messages as they arrive."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import infoq_fx
from infoq_fx import errors
from infoq_fx.cli.model_files import load_model, load_samples
from infoq_fx.core.data import read_data
from infoq_fx.types import check_bits

PACKAGE = Path(infoq_fx.__file__).parent
KINDS = {name for name in errors.__all__ if name.endswith("Error")}
VERBS = (
    "add|allocate|allow|call|check|choose|clean|compile|correct|export|fix|give|go|install|leave|load|look|lower|make|"
    "move|name|pass|prepare|pin|pip|put|quantize|raise|remove|repeat|report|resize|return|rewrite|run|save|score|set|take|"
    "try|use|wrap|write"
)
REMEDY = re.compile(rf"(?:[;:,?.]|\bor) (?:{VERBS})\b")
# Reasons, which the message around them completes: "cannot read X: <reason>; save one with ...".
REASON = re.compile(r"^(it|its|not|two|damaged|a binary|a size)\b|^\{\}$")
REASONS_IN = {"allocation_file.py", "atomic_files.py", "cache.py", "quantized_files.py", "saved_structure.py"}


def raised():
    """(place, message with {} for what is filled in) of every error that the package raises itself."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                call = node.exc
                if isinstance(call.func, ast.Name) and call.func.id in KINDS:
                    message = written(call.args[0])
                    if not (path.name in REASONS_IN and REASON.search(message)):
                        yield f"{path.relative_to(PACKAGE)}:{node.lineno}", message


def written(message):
    if isinstance(message, ast.Constant):
        return message.value
    if not isinstance(message, ast.JoinedStr):
        return "{}"
    parts = []
    for value in message.values:
        if isinstance(value, ast.Constant):
            parts.append(value.value)
        else:
            # A remedy that several messages share is in a variable of one of these names.
            name = ast.unparse(value.value)
            parts.append("give {}" if name in ("advice", "remedy", "_FORMS") else "{}")
    return "".join(parts)


def has_cause_and_remedy(message):
    found = REMEDY.search(message)
    return bool(found and message[: found.start()].strip() and "\n" not in message)


def test_every_message_has_a_cause_and_a_remedy():
    messages = dict(raised())
    assert len(messages) > 150
    # A message that is put together elsewhere: what is out of reach, which the infeasible budgets below provoke.
    wrong = {place: text for place, text in messages.items() if text != "{}" and not has_cause_and_remedy(text)}
    assert not wrong
    assert [place.partition(":")[0] for place, text in messages.items() if text == "{}"] == ["allocation/solver.py"]


@pytest.mark.parametrize("text", ["bits=9 is out of range", "use fewer bits", "no file\n; give another"])
def test_a_message_without_a_cause_or_a_remedy_is_found(text):
    assert not has_cause_and_remedy(text)


class Reshaping(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.fixture(scope="module")
def prepared():
    torch.manual_seed(0)
    return infoq_fx.prepare(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(16, 4))


@pytest.fixture(scope="module")
def table(prepared):
    return infoq_fx.score(prepared, criterion="weight_mse")


def _files(folder):
    (folder / "no.pt2").write_bytes(b"x")
    (folder / "table.json").write_text("{}")
    np.savez(folder / "other.npz", pixels=np.zeros(3))
    (folder / "empty").mkdir(exist_ok=True)
    return folder


PROVOKED = {
    "budget_out_of_reach": ("InfeasibleBudgetError", lambda c: infoq_fx.allocate(c.table, 1.0), ["weight_bits=1", "2"]),
    "compression_out_of_reach": (
        "InfeasibleBudgetError",
        lambda c: infoq_fx.allocate(c.table, infoq_fx.Budget(compression=99.0)),
        ["compression=99", "16"],
    ),
    "loss_out_of_reach": (
        "InfeasibleBudgetError",
        lambda c: infoq_fx.search_tolerance(
            c.prepared,
            c.table,
            infoq_fx.Tolerance(sqnr_db=200.0, minimize="weight_bits"),
            torch.randn(16, 4),
            validation_data=torch.randn(16, 4),
            recovery="none",
        ),
        ["sqnr_db=200", "8 bits", "lower sqnr_db", "add 16"],
    ),
    "tolerance": ("OptionError", lambda c: infoq_fx.Tolerance(drop=1.0, nats=0.1), ["drop and nats", "sqnr_db"]),
    "drop_without_labels": (
        "CalibrationDataError",
        lambda c: infoq_fx.search_tolerance(
            c.prepared,
            c.table,
            infoq_fx.Tolerance(drop=1.0, minimize="weight_bits"),
            torch.randn(16, 4),
            validation_data=torch.randn(16, 4),
        ),
        ["labels", "nats="],
    ),
    "no_budget": ("OptionError", lambda c: infoq_fx.allocate(c.table, "small"), ["'small'", "3.0"]),
    "empty_budget": ("OptionError", lambda c: infoq_fx.Budget(), ["weight_bits", "size_bytes"]),
    "negative_limit": ("OptionError", lambda c: infoq_fx.Budget(size_bytes=-1), ["size_bytes=-1", "positive"]),
    "alpha": ("OptionError", lambda c: infoq_fx.allocate(c.table, 3.0, alpha=-1.0), ["alpha=-1.0", "1.0"]),
    "pin": ("OptionError", lambda c: infoq_fx.allocate(c.table, 3.0, pin={"0.wieght": 4}), ["0.wieght", "0.weight"]),
    "bits": ("OptionError", lambda c: check_bits((1, 2), "bits"), ["1", "2 to 8"]),
    "bits_as_text": ("OptionError", lambda c: check_bits("16", "bits"), ["holds '16'; give integers", "16 for float"]),
    "a_class": (
        "OptionError",
        lambda c: infoq_fx.quantize(nn.Linear(4, 3), infoq_fx.Tolerance, calibration_data=torch.randn(32, 4)),
        ["the class Tolerance", "Tolerance(drop=1.0)"],
    ),
    "criterion": ("OptionError", lambda c: infoq_fx.score(c.prepared, criterion="info"), ["'info'", "'infoq'"]),
    "criterion_without_data": (
        "CalibrationDataError",
        lambda c: infoq_fx.score(c.prepared, criterion="output_kl"),
        ["'output_kl'", "weight_mse"],
    ),
    "recovery": (
        "OptionError",
        lambda c: infoq_fx.recover(c.prepared, infoq_fx.allocate(c.table, 4.0), torch.randn(8, 4), "fst"),
        ["'fst'", "'fast'"],
    ),
    "wrong_input": (
        "CalibrationDataError",
        lambda c: infoq_fx.score(c.prepared, torch.randn(8, 5), criterion="output_kl"),
        ["['samples', 5]", "resize"],
    ),
    "no_samples": ("CalibrationDataError", lambda c: read_data([]), ["empty", "1,000"]),
    "nan": ("CalibrationDataError", lambda c: read_data(torch.full((4, 2), torch.nan)), ["NaN", "normalisation"]),
    "control_flow": (
        "UnsupportedModelError",
        lambda c: infoq_fx.prepare(nn.Sequential(nn.Linear(4, 4), Reshaping()), torch.randn(8, 4)),
        ["control flow", "'1'"],
    ),
    "nothing_to_quantize": (
        "UnsupportedModelError",
        lambda c: infoq_fx.prepare(nn.ReLU(), torch.randn(8, 4)),
        ["no layer to quantize", "linear"],
    ),
    "not_quantized": ("OptionError", lambda c: infoq_fx.export_onnx(nn.ReLU(), "x.onnx"), ["ReLU", "quantize()"]),
    "no_folder": (
        "ExportError",
        lambda c: infoq_fx.export_onnx(c.quantized, "/no/such/folder/x.onnx"),
        ["/no/such/folder", "writable"],
    ),
    "no_table": (
        "OptionError",
        lambda c: infoq_fx.SensitivityTable.load(c.folder / "table.json"),
        ["table.json", "format marker", "score again"],
    ),
    "no_allocation": ("OptionError", lambda c: infoq_fx.load_allocation(c.folder / "no.json"), ["no.json", "make one"]),
    "no_program": ("OptionError", lambda c: load_model(str(c.folder / "no.pt2")), ["no.pt2", "torch.export.save"]),
    "no_model": ("OptionError", lambda c: load_model("torchvision.models:resnet81"), ["resnet81", "'resnet18'"]),
    "no_array": (
        "CalibrationDataError",
        lambda c: load_samples(c.folder / "other.npz", limit=4),
        ["'pixels'", "numpy.savez"],
    ),
    "no_image": ("CalibrationDataError", lambda c: load_samples(c.folder / "empty", limit=4), ["no image", ".jpg"]),
}


@pytest.mark.parametrize("name", PROVOKED)
def test_a_message_arrives_with_what_was_asked_and_what_works(name, prepared, table, tmp_path):
    class Case:
        pass

    Case.prepared, Case.table, Case.folder = prepared, table, _files(tmp_path)
    Case.quantized = infoq_fx.convert(prepared, infoq_fx.allocate(table, 4.0)) if name == "no_folder" else None
    kind, call, parts = PROVOKED[name]
    with pytest.raises(getattr(errors, kind)) as caught:
        call(Case)
    message = str(caught.value)
    assert type(caught.value).__name__ == kind
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert REMEDY.search(message) or "nearest" in message


def test_every_kind_is_provoked_or_named_here():
    elsewhere = {
        "InfoqError": "the base, and CBC's failures in test_allocation",
        "EncoderUnavailableError": "test_encoders",
        "MissingExtraError": "test_report",
    }
    assert {kind for kind, _, _ in PROVOKED.values()} | set(elsewhere) == KINDS

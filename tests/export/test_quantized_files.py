import copy
import dataclasses
import io
import json
import pickle
import zipfile

import pytest
import torch
from torch import nn

import infoq_fx
from infoq_fx.types import Allocation, Cost, Score


class TwoInputs(nn.Module):
    """Two inputs by name, a buffer, a float layer next to a quantized one, and outputs in a dict."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(4, 8)
        self.register_buffer("shift", torch.linspace(-1, 1, 8))

    def forward(self, tokens, mask):
        hidden = self.left(tokens) * self.right(mask) + self.shift
        return {"hidden": hidden, "score": hidden.sum(-1)}


@pytest.fixture(scope="module")
def residual():
    from networks import ResidualNet, randomise_norms

    torch.manual_seed(1)
    model, images = randomise_norms(ResidualNet()).eval(), torch.randn(48, 1, 8, 8)
    prepared = infoq_fx.prepare(model, images, activation_bits=(4, 8))
    bits = {s.name: 3 + i % 4 if s.kind == "weight" else s.bits[-1] for i, s in enumerate(prepared.inventory.sites)}
    allocation = Allocation(
        bits=bits,
        criterion="by hand",
        budget=infoq_fx.Budget(weight_bits=5, compression=2.5),
        score=0.25,
        cost=Cost(weight_bits=4.5, compression=7.0, size_bytes=1, bitops=2, activation_bytes=3),
        scores={name: Score(0.5, 0.1) for name in bits},
    )
    return infoq_fx.convert(prepared, allocation), images


@pytest.fixture(scope="module")
def saved(residual, tmp_path_factory):
    return infoq_fx.save_quantized(residual[0], tmp_path_factory.mktemp("saved") / "model.pt2")


@pytest.mark.slow
def test_a_loaded_module_is_the_saved_one(residual, saved, tmp_path):
    quantized, images = residual
    loaded = infoq_fx.load_quantized(saved)
    assert isinstance(loaded, infoq_fx.QuantizedModule)
    assert torch.equal(loaded(images), quantized(images))
    assert infoq_fx.allocation_of(loaded) == infoq_fx.allocation_of(quantized)
    held = {name: (x.dtype, x.tolist()) for name, x in quantized.state_dict().items()}
    assert {name: (x.dtype, x.tolist()) for name, x in loaded.state_dict().items()} == held
    first, second = (infoq_fx.export_onnx(m, tmp_path / f"{i}.onnx") for i, m in enumerate((quantized, loaded)))
    assert first.read_bytes() == second.read_bytes()
    trainable = infoq_fx.to_trainable(loaded)
    assert torch.equal(trainable(images), infoq_fx.to_trainable(quantized)(images))
    assert torch.equal(infoq_fx.to_quantized(trainable)(images), quantized(images))


def test_a_loaded_module_is_saved_copied_and_pickled_like_any(residual, saved, tmp_path):
    quantized, images = residual
    loaded = infoq_fx.load_quantized(saved)
    again = infoq_fx.load_quantized(infoq_fx.save_quantized(pickle.loads(pickle.dumps(copy.deepcopy(loaded))), saved))
    assert torch.equal(again(images), quantized(images))
    assert infoq_fx.allocation_of(again) == infoq_fx.allocation_of(quantized)


def test_plain_torch_reads_the_file(residual, saved):
    quantized, images = residual
    program = torch.export.load(saved)
    assert torch.equal(program.module()(images), quantized(images))
    graph_bits, known = infoq_fx.allocation_of(program).bits, infoq_fx.allocation_of(quantized).bits
    assert graph_bits.items() <= known.items()
    assert all(name in graph_bits for name in known if name.endswith(".weight"))


def test_names_of_several_inputs_and_outputs_are_kept(tmp_path):
    data = {"tokens": torch.randn(32, 6), "mask": torch.randn(32, 4)}
    prepared = infoq_fx.prepare(TwoInputs(), data, ignore=("right",), bits=4)
    quantized = infoq_fx.convert(prepared, Allocation(bits={s.name: s.bits[0] for s in prepared.inventory.sites}))
    loaded = infoq_fx.load_quantized(infoq_fx.save_quantized(quantized, tmp_path / "model.pt2"))
    expected, found = quantized(**data), loaded(**data)
    assert found.keys() == expected.keys() == {"hidden", "score"}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_graph_fixed_to_a_batch_stays_so(tmp_path):
    data = [torch.randn(4, 6) for _ in range(4)]
    program = torch.export.export(nn.Sequential(nn.Linear(6, 3)), (data[0],))
    prepared = infoq_fx.prepare(program, data, bits=3)
    assert prepared.batch_size == 4
    quantized = infoq_fx.convert(prepared, Allocation(bits={s.name: s.bits[0] for s in prepared.inventory.sites}))
    loaded = infoq_fx.load_quantized(infoq_fx.save_quantized(quantized, tmp_path / "model.pt2"))
    assert torch.equal(loaded(data[0]), quantized(data[0]))


def test_what_is_no_quantized_module_is_not_saved(tmp_path):
    with pytest.raises(infoq_fx.OptionError, match="got a Linear"):
        infoq_fx.save_quantized(nn.Linear(2, 2), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_said(residual, tmp_path):
    with pytest.raises(infoq_fx.ExportError, match=r"cannot write .*No such file"):
        infoq_fx.save_quantized(residual[0], tmp_path / "nowhere" / "model.pt2")
    with pytest.raises(infoq_fx.ExportError, match="cannot write"):
        infoq_fx.save_quantized(residual[0], tmp_path)
    assert not list(tmp_path.iterdir())


def rewritten(source, target, changes):
    """The archive with some entries changed (a function of their bytes), added (bytes) or taken out (None)."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            change = changes.get(name, lambda content: content)
            if change is not None:
                new.writestr(name, change(old.read(name)))
        for name, content in changes.items():
            if isinstance(content, bytes):
                new.writestr(name, content)
    return target


def edited(**values):
    return lambda content: json.dumps({**json.loads(content), **values}).encode()


class Harmful:
    """Unpickled, it would leave a trace."""

    def __reduce__(self):
        return exec, ("import infoq_fx; infoq_fx.was_unpickled = True",)


def pickled_by_torch(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def without_bits(content):
    document = json.loads(content)
    document["allocation"]["bits"] = {}
    return json.dumps(document).encode()


def unpickling_weight(content):
    config = json.loads(content)
    next(iter(config["config"].values()))["use_pickle"] = True
    return json.dumps(config).encode()


def harmful_size(content):
    assert b'"expr_str"' in content
    harm = b"exec('import infoq_fx; infoq_fx.was_unpickled = True') + "
    return content.replace(b'"expr_str": "', b'"expr_str": "' + harm)


EXTRA = "archive/extra/infoq_fx.json"
DAMAGED = {
    "no allocation": ({EXTRA: None}, "holds no allocation"),
    "another format": ({EXTRA: edited(format="other")}, "format marker"),
    "another version": ({EXTRA: edited(version=99)}, "this release reads version 1"),
    "another allocation": ({EXTRA: without_bits}, "its graph"),
    "fields missing": ({EXTRA: lambda _: b'{"format": "infoq_fx quantized module", "version": 1}'}, "KeyError"),
    "another output": ({EXTRA: edited(output_names=["a", "b"])}, "not those of its graph"),
    "a batch size of words": ({EXTRA: edited(batch_size="two")}, "batch size is 'two'"),
    "unpickled weights": ({"archive/data/weights/model_weights_config.json": unpickling_weight}, "would be unpickled"),
    "an older format": ({"archive/data/weights/model.pt": pickled_by_torch(Harmful())}, "older format"),
    "examples that run code": (
        {"archive/data/sample_inputs/model.pt": lambda _: pickled_by_torch(((Harmful(),), {}))},
        "UnpicklingError",
    ),
    "a size that runs code": ({"archive/models/model.json": harmful_size}, "a size in its graph"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_other_archives_are_refused_with_a_reason(case, saved, tmp_path):
    changes, message = DAMAGED[case]
    path = rewritten(saved, tmp_path / "model.pt2", changes)
    with pytest.raises(infoq_fx.OptionError, match=message):
        infoq_fx.load_quantized(path)
    assert not hasattr(infoq_fx, "was_unpickled")


def test_other_files_are_refused_with_a_reason(saved, tmp_path):
    with pytest.raises(infoq_fx.OptionError, match="No such file"):
        infoq_fx.load_quantized(tmp_path / "missing.pt2")
    (tmp_path / "short.pt2").write_bytes(saved.read_bytes()[:5000])
    with pytest.raises(infoq_fx.OptionError, match="cut short"):
        infoq_fx.load_quantized(tmp_path / "short.pt2")
    program = torch.export.export(nn.Linear(2, 2), (torch.randn(3, 2),))
    torch.export.save(program, tmp_path / "float.pt2")
    with pytest.raises(infoq_fx.OptionError, match=r"float\.pt2' is not a quantized module: it holds no allocation"):
        infoq_fx.load_quantized(tmp_path / "float.pt2")


def test_every_field_of_an_allocation_returns(residual, saved):
    quantized, _ = residual
    found, expected = (infoq_fx.allocation_of(m) for m in (infoq_fx.load_quantized(saved), quantized))
    for field in dataclasses.fields(expected):
        assert getattr(found, field.name) == getattr(expected, field.name), field.name

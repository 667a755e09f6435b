"""What the command line reads: models and their weights, arrays and images."""

import io
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from networks import ResidualNet
from PIL import Image
from torch import nn
from torchvision import transforms

from infoq_fx.cli.model_files import load_model, load_samples
from infoq_fx.cli.options import read_dynamic
from infoq_fx.errors import CalibrationDataError, InfoqError, OptionError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("files")
    x = np.random.default_rng(0).standard_normal((40, 1, 8, 8)).astype(np.float32)
    np.savez(path / "data.npz", x=x, y=np.arange(40) % 5)
    for index in range(12):
        kind = path / "images" / ("cat" if index < 6 else "dog")
        kind.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (50, 40 + index, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(kind / f"{index:02}.png")
    return path


def test_images_are_read_as_torchvision_reads_them(folder):
    images, labels = load_samples(folder / "images", limit=100, image_size=32, resize=36)
    preprocess = transforms.Compose(
        [
            transforms.Resize(36),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    expected = torchvision.datasets.ImageFolder(folder / "images", preprocess)
    assert labels.tolist() == [label for _, label in expected]
    assert images.shape == (12, 3, 32, 32)
    for image, (theirs, _) in zip(images, expected, strict=True):
        torch.testing.assert_close(image, theirs)


def test_labels_are_subfolders_where_all_images_lie_in_one(folder, tmp_path):
    assert load_samples(folder / "images", limit=4, image_size=16)[1].tolist() == [0, 0, 1, 1]
    assert load_samples(folder / "images", limit=4, image_size=16, labels=False)[1] is None
    assert load_samples(folder / "images" / "cat", limit=4, image_size=16)[1] is None


def test_one_mean_reads_grey_images(folder):
    images, _ = load_samples(folder / "images", limit=3, image_size=16, mean=[0.5], std=[0.25])
    assert images.shape == (3, 1, 16, 16)
    assert -2 <= images.min() < images.max() <= 2


@pytest.mark.parametrize(
    "options", [{"mean": [0.5, 0.5]}, {"mean": [0.5], "std": [0.0]}, {"resize": 8}], ids=["channels", "std", "resize"]
)
def test_preprocessing_that_cannot_be(options, folder):
    with pytest.raises(OptionError, match="give"):
        load_samples(folder / "images", limit=3, image_size=16, **options)


def test_a_label_for_every_input(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 2)), y=np.zeros(3))
    with pytest.raises(CalibrationDataError, match="4 inputs and 3 labels"):
        load_samples(tmp_path / "d.npz", limit=4)


def test_a_callable_takes_literal_arguments():
    assert load_model("torch.nn:Linear(in_features=3, out_features=2)").weight.shape == (2, 3)
    for call in ("Linear(3, 2)", "Linear(in_features=open('x'))", "Linear(in_features=", "Linear(**{})"):
        with pytest.raises(OptionError, match="cannot be read"):
            load_model(f"torch.nn:{call}")
    with pytest.raises(OptionError, match=r"cannot call .* give keyword arguments"):
        load_model("torch.nn:Linear(features=3)")


@pytest.mark.parametrize("form", ["bare", "checkpoint", "parallel"])
def test_weights_fill_a_callable(form, tmp_path):
    net = ResidualNet()
    state = net.state_dict()
    saved = {
        "bare": state,
        "checkpoint": {"state_dict": state, "epoch": 3},
        "parallel": nn.DataParallel(net).state_dict(),
    }
    torch.save(saved[form], tmp_path / "w.pt")
    loaded = load_model("networks:ResidualNet", weights=tmp_path / "w.pt").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in state.items())


def test_weights_that_do_not_fit(tmp_path):
    torch.save(ResidualNet(classes=7).state_dict(), tmp_path / "w.pt")
    with pytest.raises(OptionError, match=r"do not fit the model: .*head.weight.*num_classes=10"):
        load_model("networks:ResidualNet", weights=tmp_path / "w.pt")
    with pytest.raises(OptionError, match="cannot read --weights"):
        load_model("networks:ResidualNet", weights=tmp_path / "no.pt")
    torch.save(ResidualNet(), tmp_path / "whole.pt")
    with pytest.raises(OptionError, match="holds more than tensors"):
        load_model("networks:ResidualNet", weights=tmp_path / "whole.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(OptionError, match="is not a state dict"):
        load_model("networks:ResidualNet", weights=tmp_path / "list.pt")


def test_a_model_beside_the_command_is_found(tmp_path, monkeypatch):
    (tmp_path / "beside_the_command.py").write_text("import torch\n\ndef build():\n    return torch.nn.Linear(2, 2)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    assert isinstance(load_model("beside_the_command:build"), nn.Linear)


def test_arrays_and_images_are_read_as_the_help_says(folder):
    x, y = load_samples(folder / "data.npz", limit=10)
    assert (x.shape, y.shape, x.dtype) == ((10, 1, 8, 8), (10,), torch.float32)
    images, none = load_samples(folder / "images", limit=5, image_size=32)
    assert none.tolist() == [0, 0, 1, 1, 1]
    assert images.shape == (5, 3, 32, 32)
    low, high = (0 - 0.485) / 0.229, (1 - 0.406) / 0.225
    assert low - 1e-5 <= images.min() < images.max() <= high + 1e-5


def test_nothing_is_ever_unpickled(folder, tmp_path):
    np.savez(tmp_path / "evil.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(CalibrationDataError, match="save plain arrays"):
        load_samples(tmp_path / "evil.npz", limit=10)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.pt2", "no file 'missing.pt2'"),
        ("model", "give an exported"),
        ("no_such_package:f", "cannot import 'no_such_package'"),
        ("torchvision.models:resnet81", "nearest: 'resnet18'"),
        ("builtins:dict", "gave a dict"),
    ],
)
def test_models_that_cannot_be_loaded(name, message):
    with pytest.raises(OptionError, match=message):
        load_model(name)


@pytest.mark.parametrize("name", ["missing.npz", "other.npz", "broken.npz", "empty", "bad_image"])
def test_data_that_cannot_be_read(name, tmp_path):
    path = tmp_path / name
    if name == "other.npz":
        np.savez(path, pixels=np.zeros(3))
    elif name == "broken.npz":
        path.write_bytes(b"PK\x03\x04 truncated")
    elif name in ("empty", "bad_image"):
        path.mkdir()
        if name == "bad_image":
            (path / "a.png").write_bytes(b"no image")
    with pytest.raises(CalibrationDataError, match=r"give|inputs must|plain arrays|no image|cannot read"):
        load_samples(path, limit=10)
    assert issubclass(CalibrationDataError, InfoqError)


def test_a_broken_model_file(tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"not a program")
    with pytest.raises(OptionError, match="is not an exported program"):
        load_model(str(tmp_path / "model.pt2"))


class RunsCode:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_of_a_strangers_program_is_unpickled(tmp_path):
    program = torch.export.export(nn.Linear(3, 2), (torch.randn(2, 3),))
    torch.export.save(program, tmp_path / "sound.pt2")
    assert isinstance(load_model(str(tmp_path / "sound.pt2")), torch.export.ExportedProgram)
    held = io.BytesIO()
    torch.save(RunsCode(tmp_path / "ran"), held)
    with zipfile.ZipFile(tmp_path / "sound.pt2") as sound, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as bad:
        for name in sound.namelist():
            bad.writestr(name, held.getvalue() if name.endswith("sample_inputs/model.pt") else sound.read(name))
    with pytest.raises(OptionError, match=r"load a file that you trust in a callable of your own"):
        load_model(str(tmp_path / "bad.pt2"))
    assert not (tmp_path / "ran").exists()


def test_axes_that_stay_free_are_read_by_input():
    assert read_dynamic(None) == read_dynamic(["auto"]) == "auto"
    assert read_dynamic(["none"]) is None
    assert read_dynamic(["image=2,3", "mask=1"]) == {"image": (2, 3), "mask": (1,)}
    with pytest.raises(OptionError, match="image=2,3"):
        read_dynamic(["image"])

import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ResidualNet
from PIL import Image
from typer.testing import CliRunner

from infoq_fx import cli
from infoq_fx.demo import digits, run_demo
from infoq_fx.errors import CalibrationDataError, InfoqError, OptionError
from infoq_fx.model_files import load_model, load_samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model file, arrays and images."""
    path = tmp_path_factory.mktemp("cli")
    torch.manual_seed(1)
    x = torch.randn(40, 1, 8, 8)
    batch = torch.export.Dim("batch")
    torch.export.save(
        torch.export.export(ResidualNet().eval(), (x[:2],), dynamic_shapes=({0: batch},)), path / "model.pt2"
    )
    np.savez(path / "data.npz", x=x.numpy(), y=np.arange(40) % 5)
    for index in range(12):
        (path / "images" / "cat").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (50, 40 + index, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / "images" / "cat" / f"{index:02}.png")
    return path


def test_quantize_from_a_file_writes_a_model_that_runs(folder):
    out = folder / "model.onnx"
    arguments = [
        "quantize",
        str(folder / "model.pt2"),
        str(folder / "data.npz"),
        "--budget",
        "4",
        "-o",
        str(out),
    ]
    result = CliRunner().invoke(cli.app, [*arguments, "--no-progress"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "blocks.0.conv1" in result.stdout
    session = onnxruntime.InferenceSession(out)
    assert session.run(None, {"x": np.zeros((3, 1, 8, 8), np.float32)})[0].shape == (3, 5)


def test_quantize_from_a_callable_and_an_image_folder(folder):
    out = folder / "images.onnx"
    arguments = ["quantize", "torchvision.models:squeezenet1_1", str(folder / "images"), "--budget", "6"]
    page = folder / "report.html"
    options = ["-o", str(out), "--image-size", "64", "--bits", "4,8", "--report", str(page), "--no-progress"]
    result = CliRunner().invoke(cli.app, [*arguments, *options], catch_exceptions=False)
    assert result.exit_code == 0
    assert onnxruntime.InferenceSession(out).get_inputs()[0].shape == ["batch", 3, 64, 64]
    assert f"wrote {page} ({page.stat().st_size:,} bytes)" in result.stdout
    assert "the given allocation" in page.read_text()


def test_an_interrupt_says_how_to_go_on(folder, tmp_path, monkeypatch):
    def interrupted(*_, cache_dir, **__):
        raise KeyboardInterrupt(f"3 of 9 are kept; the same call with cache_dir={str(cache_dir)!r} goes on from there")

    monkeypatch.setattr("infoq_fx.api.score", interrupted)
    files = [str(folder / "model.pt2"), str(folder / "data.npz"), "-o", str(tmp_path / "x.onnx")]
    result = CliRunner().invoke(cli.app, ["quantize", *files, "--budget", "4", "--cache-dir", str(tmp_path)])
    assert result.exit_code == 130
    assert f"the same command with --cache-dir '{tmp_path}' goes on from there" in result.stderr
    assert not (tmp_path / "x.onnx").exists()


def test_the_command_keeps_its_scores(folder, tmp_path):
    files = [str(folder / "model.pt2"), str(folder / "data.npz"), "-o", str(tmp_path / "x.onnx"), "--no-progress"]
    options = ["--bits", "4,8", "--cache-dir", str(tmp_path / "scores")]
    for budget in ("4.5", "6"):
        result = CliRunner().invoke(cli.app, ["quantize", *files, *options, "--budget", budget], catch_exceptions=False)
        assert result.exit_code == 0
    assert len(list((tmp_path / "scores").rglob("*bit-*.json"))) == 12


def test_errors_are_one_paragraph_and_exit_code_1(folder):
    arguments = [
        "quantize",
        str(folder / "model.pt2"),
        str(folder / "data.npz"),
        "--budget",
        "1",
        "-o",
        "x.onnx",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "from infoq_fx.cli import main; main()", *arguments],
        capture_output=True, text=True, check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "all layers at 2 bits" in done.stderr
    assert "Traceback" not in done.stderr


def test_arrays_and_images_are_read_as_the_help_says(folder):
    x, y = load_samples(folder / "data.npz", limit=10)
    assert (x.shape, y.shape, x.dtype) == ((10, 1, 8, 8), (10,), torch.float32)
    images, none = load_samples(folder / "images", limit=5, image_size=32)
    assert none is None
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
    with pytest.raises(OptionError, match="is no exported program"):
        load_model(str(tmp_path / "model.pt2"))


def test_the_demo_keeps_the_accuracy_in_a_file_a_fraction_of_the_size(tmp_path):
    result = run_demo(tmp_path / "digits.onnx", progress=False)
    assert result.float_top1 > 97
    assert result.quantized_top1 > result.float_top1 - 3
    assert abs(result.onnx_top1 - result.quantized_top1) < 0.5
    assert result.allocation.cost.weight_bits <= 3
    assert result.onnx_bytes < result.float_bytes
    assert len(digits()[1][1]) == 597


def test_the_demo_command_prints_the_table(tmp_path):
    result = CliRunner().invoke(cli.app, ["demo", "-o", str(tmp_path / "demo.onnx")], catch_exceptions=False)
    assert result.exit_code == 0
    for text in ("blocks.1.conv1", "float32", "uniform 3 bits", "onnxruntime"):
        assert text in result.stdout
    assert (tmp_path / "demo.onnx").exists()

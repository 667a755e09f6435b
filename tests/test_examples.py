"""Every example and every Python block of the README runs as it stands."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import infoq_fx

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
REPRODUCTION = ROOT / "examples" / "reproduce_paper.py"
MADE = {
    "reproduce_paper.py": [
        "reproduction/table1_properties.md",
        *(
            f"reproduction/digits/{name}.{ending}"
            for name in ("figure1_correlations", "figure2_sensitivity", "figure3_images", "figure4_sizes")
            for ending in ("png", "csv", "md")
        ),
    ],
}


# The slowest examples, at seconds each; the README has the calls of the quickstart.
SLOW = {
    "detector.py",
    "language_model.py",
    "fpga.py",
    "quickstart.py",
    "image_folder.py",
    "transformer.py",
    "weights_and_activations.py",
    "your_own_criterion.py",
    "choose_a_budget.py",
    "finetune_in_your_own_loop.py",
    "reproduce_paper.py",
    "score_on_dask.py",
    "score_with_workers.py",
    "torch_compile_and_pt2e.py",
    "your_own_cost.py",
}


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] if path.name in SLOW else [], id=path.name) for path in EXAMPLES],
)
def test_the_example_runs(path, tmp_path):
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    for name in MADE.get(path.name, []):
        made = tmp_path / name
        if made.suffix == ".png":
            assert made.read_bytes().startswith(b"\x89PNG")
            assert made.stat().st_size > 10_000
        else:
            assert len(made.read_text().splitlines()) > 4


def run_reproduction(*arguments):
    spec = importlib.util.spec_from_file_location("reproduce_paper", REPRODUCTION)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    module.main(list(map(str, arguments)))
    return module


def test_the_reproduction_writes_the_protocol_for_imagenet(tmp_path, capsys):
    module = run_reproduction("--full", "--out", tmp_path)
    text = (tmp_path / "imagenet_protocol.md").read_text()
    assert text in capsys.readouterr().out
    assert all(row.network in text and str(row.top1) in text for row in module.PAPER)
    assert set(module.FACTS) == set(infoq_fx.CRITERIA)


def test_the_reproduction_says_where_it_looked_for_real_models(tmp_path):
    missing = tmp_path / "real_models.py"
    with pytest.raises(SystemExit, match=re.escape(f"{missing} does not exist: give --models-file")):
        run_reproduction("--model", "vit", "--models-file", missing, "--out", tmp_path)


@pytest.mark.slow
def test_the_readmes_python_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    from infoq_fx.demo import digits, train_digits_net

    (images, labels), (test_images, test_labels) = digits()
    names = {
        "model": train_digits_net(images, labels, epochs=2),
        "loader": [(images[:128], labels[:128])],
        "test_loader": [(test_images[:64], test_labels[:64])],
    }
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "model.onnx").exists()


def test_the_map_of_the_code_names_every_file():
    """And no other file, in the same order of rooms as in the README."""
    text = (ROOT / "docs" / "code_map.md").read_text()
    package = ROOT / "infoq_fx"
    files = [path.relative_to(package) for path in package.rglob("*.py") if path.name != "__init__.py"]
    named = set(re.findall(r"`([\w./]+)`", "".join(re.findall(r"^\| ?\d* ?\| .*", text, re.MULTILINE))))
    # The name of a subfolder stands for its files.
    missing = [path for path in files if not named & {path.name, *(f"{folder.name}/" for folder in path.parents[:-2])}]
    assert not missing
    known = {path.name + "/" * path.is_dir() for path in package.rglob("*")}
    assert {name for name in named if name.endswith((".py", "/"))} <= known
    rooms, of_readme = (re.findall(r"^\| \d+ \| `(.+?)` \|", page, re.MULTILINE) for page in (text, README))
    assert rooms == of_readme
    assert set(rooms) == {path.name for path in files if path.parent == Path()} | {
        f"{path.parts[0]}/" for path in files if path.parent != Path()
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]

"""Every example and every Python block of the README runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_example_runs(path, tmp_path):
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    from infoq_fx.demo import digits, train_digits_net

    (images, labels), _ = digits()
    names = {"model": train_digits_net(images, labels, epochs=2), "loader": [(images[:128], labels[:128])]}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "model.onnx").exists()


def test_the_readmes_map_of_the_code_is_the_code():
    from test_layout import FLOOR_OF

    mapped = set(re.findall(r"^\| \d+ \| (.+?) \|", README, re.MULTILINE))
    names = {name.removesuffix(".py").rstrip("/") for row in mapped for name in re.findall(r"`([\w./]+)`", row)}
    assert names == set(FLOOR_OF)

"""Text and notebook forms of what was found."""

import pickle
import re
from html import unescape

import pytest
import torch
from tables import SMALL

import infoq_fx
from infoq_fx import Allocation, Budget, FileSize, allocate, summarize
from infoq_fx.allocation.cost import measure_cost

pytestmark = pytest.mark.usefixtures("free_unpacking")  # their networks are tiny


@pytest.fixture(scope="module")
def quantized():
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    data = torch.randn(32, 6)
    return infoq_fx.quantize(model, 4.0, calibration_data=data, criterion="weight_mse", recovery="none", progress=False)


def cells(html):
    """Texts of all cells by row."""
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    return [[unescape(text) for text in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def test_a_line_a_site():
    found = allocate(SMALL, 3)
    header, *lines = summarize(found, SMALL.inventory).splitlines()
    assert re.split("  +", header) == ["layer", "kind", "elements", "bits", "score", "± error", "share of size"]
    share = 100 * (100 * 6 / 8 + 4) / found.cost.size_bytes
    assert re.split("  +", lines[0]) == ["conv", "weight", "100", "6", "0.00195", "0.0002", f"{share:.1f} %"]
    assert [line.split()[0] for line in lines[:3]] == ["conv", "fc", "relu"]
    assert lines[3].startswith("3 bits a weight (10.67x compression), 158 bytes without the graph (")
    whole = measure_cost(SMALL.inventory, dict.fromkeys(found.bits, 8)).size_bytes
    assert f"({whole} in 'int8')" in lines[3]
    assert "uniform 3 bits" in lines[4]
    assert "0.4062" in lines[4]


def test_a_file_is_told_in_tensors_and_graph():
    found = allocate(SMALL, 3)
    text = summarize(found, SMALL.inventory, file=FileSize(total_bytes=1234, tensor_bytes=150))
    assert "file: 1,234 bytes, 150 of tensors (158 counted, with 4 bytes a scale and a bias) and 1,084 of graph" in text


def test_bits_alone():
    text = summarize(Allocation(bits={"conv": 4, "fc": 4, "relu": 8, "input": 8}), SMALL.inventory)
    assert text.splitlines()[1].split()[:5] == ["conv", "weight", "100", "4", "-"]
    assert text.splitlines()[-1].startswith("4 bits a weight (8.00x compression)")


def test_the_notebook_shows_the_cells_of_the_text():
    found = summarize(allocate(SMALL, 3), SMALL.inventory)
    lines = [re.split("  +", line) for line in found.splitlines()]
    rows = cells(found._repr_html_())
    assert rows == lines[: len(rows)]
    assert "Bit-widths within weight_bits=3" in found._repr_html_()
    for form in (SMALL, allocate(SMALL, 3)):
        title, *lines = str(form).splitlines()
        rows = cells(form._repr_html_())
        assert rows == [re.split("  +", line) for line in lines[: len(rows)]]
        assert title in unescape(form._repr_html_())


def test_an_allocation_reads_as_text():
    found = allocate(SMALL, Budget(size_bytes=158))
    title, header, *lines = str(found).splitlines()
    assert title == "bit-widths by 'test' within size_bytes=158"
    assert header.split() == ["site", "bits", "score", "±", "error"]
    assert {line.split()[0]: int(line.split()[1]) for line in lines if line.split()[0] in found.scores} == {
        name: found.bits[name] for name in found.scores
    }
    assert lines[-2].endswith(f"{found.cost.size_bytes:,} bytes")
    assert str(Allocation(bits={"a": 3})).splitlines()[1:] == [
        "site  bits  score  ± error",
        "a        3      -        -",
    ]


def test_a_quantized_module_summarizes_itself_also_after_pickle(quantized):
    allocation = infoq_fx.allocation_of(quantized)
    text = summarize(quantized)
    for name in ("0.weight", "2.weight"):
        (line,) = [line for line in text.splitlines() if line.startswith(name)]
        assert line.split()[3] == str(allocation.bits[name])
    assert quantized._repr_html_() == text._repr_html_()
    assert summarize(pickle.loads(pickle.dumps(quantized))) == text
    exported = torch.export.export(quantized, (torch.randn(4, 6),), strict=False)
    assert "0.weight" in summarize(exported)


def test_what_is_no_quantized_module_is_refused():
    with pytest.raises(infoq_fx.OptionError, match="holds no quantized site"):
        summarize(torch.nn.Linear(2, 2))

"""The sensitivity table: exact round trips, and errors for files that cannot be read."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infoq_fx.errors import OptionError
from infoq_fx.table import SensitivityTable
from infoq_fx.types import Inventory, Operation, QuantSite, Score

INVENTORY = Inventory(
    sites=(
        QuantSite("layer1.0.conv1.weight", "weight", (64, 3, 3, 3), (2, 4, 8), channel_axis=0),
        QuantSite("relu", "activation", (64, 32, 32), (4, 8)),
        QuantSite("add", "activation", (64, 32, 32), (8,), is_searched=False),
    ),
    operations=(
        Operation("conv", 1_769_472, "relu", "layer1.0.conv1.weight"),
        Operation("head", 10, None, "relu"),
    ),
    float_bytes=256,
    ignored_weights=12,
)
SCORES = {
    "layer1.0.conv1.weight": {2: Score(0.1, 0.01), 4: Score(1 / 3, 5e-324), 8: Score(0.0)},
    "relu": {4: Score(-1e300), 8: Score(2.5e-9, 1e-12)},
}


def make_table(**changes: Any) -> SensitivityTable:
    settings = {"k": 5, "seed": 0, "encoder": None, "labels": True, "noise": 1e-3, "mode": "ä"}
    fields = {"criterion": "infoq", "inventory": INVENTORY, "scores": SCORES, "settings": settings}
    return SensitivityTable(**{**fields, **changes})


def test_round_trip_is_equal(tmp_path: Path) -> None:
    table = make_table()
    table.save(tmp_path / "table.json")
    assert SensitivityTable.load(tmp_path / "table.json") == table
    assert SensitivityTable.load(str(tmp_path / "table.json")).settings == table.settings
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(value=st.floats(allow_nan=False, allow_infinity=False), error=st.floats(0, 1e308))
def test_floats_come_back_bit_for_bit(tmp_path: Path, value: float, error: float) -> None:
    make_table(scores={"relu": {4: Score(value, error)}}).save(tmp_path / "t")
    score = SensitivityTable.load(tmp_path / "t").scores["relu"][4]
    assert (score.value.hex(), score.standard_error.hex()) == (value.hex(), error.hex())


def test_numpy_scores_are_written_as_numbers(tmp_path: Path) -> None:
    score = Score(np.float32(0.1), np.float64(0.2))  # type: ignore[arg-type]
    make_table(scores={"relu": {np.int64(4): score}}).save(tmp_path / "t")
    assert SensitivityTable.load(tmp_path / "t").scores == {"relu": {4: Score(float(np.float32(0.1)), 0.2)}}


def test_the_file_is_readable_and_marked(tmp_path: Path) -> None:
    make_table().save(tmp_path / "t")
    text = (tmp_path / "t").read_text(encoding="utf-8")
    document = json.loads(text)
    assert document["format"] == "infoq_fx.SensitivityTable"
    assert document["version"] == 1
    assert document["scores"]["relu"]["8"] == {"value": 2.5e-9, "standard_error": 1e-12}
    assert len(text.splitlines()) > 20


def test_every_cut_is_refused(tmp_path: Path) -> None:
    make_table().save(tmp_path / "whole")
    text = (tmp_path / "whole").read_text(encoding="utf-8").rstrip()
    for length in range(0, len(text), 7):
        (tmp_path / "cut").write_text(text[:length], encoding="utf-8")
        with pytest.raises(OptionError, match="cut"):
            SensitivityTable.load(tmp_path / "cut")


def without(key: str) -> Any:
    return lambda document: document.pop(key)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d.update(version=2), "version 2; this release reads version 1"),
        (without("format"), "format marker"),
        (without("scores"), "damaged.*scores"),
        (without("inventory"), "damaged.*inventory"),
        (lambda d: d["inventory"].update(colour="red"), "damaged"),
        (lambda d: d.update(scores=[1]), "damaged"),
        (lambda d: d["scores"].update(elsewhere={}), "unknown site 'elsewhere'"),
        (lambda d: d["scores"]["relu"]["8"].update(value="much"), "damaged"),
        (lambda d: d["scores"]["relu"]["8"].update(value=float("nan")), "NaN"),
    ],
    ids=["version", "marker", "scores", "inventory", "field", "type", "site", "text", "nan"],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, change: Any, reason: str) -> None:
    path = tmp_path / "t.json"
    make_table().save(path)
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(OptionError, match=f"t.json.*{reason}"):
        SensitivityTable.load(path)


@pytest.mark.parametrize("has_codebook", [False, True])
def test_a_table_of_an_earlier_version_keeps_its_levels(tmp_path: Path, has_codebook: bool) -> None:
    path = tmp_path / "t.json"
    make_table().save(path)
    document = json.loads(path.read_text(encoding="utf-8"))
    for site in document["inventory"]["sites"]:
        del site["levels"]
        site["has_codebook"] = has_codebook and site["kind"] == "weight"
    path.write_text(json.dumps(document), encoding="utf-8")
    sites = SensitivityTable.load(path).inventory.sites
    assert {site.levels for site in sites if site.kind == "weight"} == {"codebook" if has_codebook else "uniform"}
    assert all(site.levels == "uniform" for site in sites if site.kind == "activation")


@pytest.mark.parametrize(
    "content", [b"\x08\x07\xff\xfe\x00onnx", b"[]", b"3", b""], ids=["binary", "list", "int", "empty"]
)
def test_foreign_content_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "foreign").write_bytes(content)
    with pytest.raises(OptionError, match="foreign"):
        SensitivityTable.load(tmp_path / "foreign")


def test_a_missing_file_or_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"nowhere.*No such file"):
        SensitivityTable.load(tmp_path / "nowhere")
    with pytest.raises(OptionError, match=r"cannot write.*nowhere"):
        make_table().save(tmp_path / "nowhere" / "t")


@pytest.mark.parametrize(
    "score", [Score(float("nan")), Score(float("inf")), Score(0.0, float("nan"))], ids=["nan", "inf", "error"]
)
def test_scores_must_be_finite(score: Score) -> None:
    with pytest.raises(OptionError, match=r"'relu' at 4 bits is not finite"):
        make_table(scores={"relu": {4: score}})


def test_scores_of_an_unknown_site_are_refused() -> None:
    with pytest.raises(OptionError, match=r"unknown site 'relv'.*'relu'"):
        make_table(scores={"relv": {4: Score(1.0)}})


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t"
    table = make_table()
    table.save(path)
    with pytest.raises(OptionError, match="JSON"):
        make_table(settings={"x": float("nan")}).save(path)

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OptionError, match="disk full"):
        make_table(criterion="other").save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["t"]
    assert SensitivityTable.load(path) == table


def test_text_has_a_line_a_scored_site() -> None:
    title, header, *lines = str(make_table()).splitlines()
    assert title.startswith("sensitivity by 'infoq': 2 sites scored, 1 at fixed bits; ")
    rows = [re.split("  +", line) for line in (header, *lines)]
    assert rows == [
        ["site", "elements", "2 bits", "4 bits", "8 bits"],
        ["layer1.0.conv1.weight", "1,728", "0.1 ± 0.01", "0.333 ± 5e-324", "0"],
        ["relu", "65,536", "-", "-1e+300", "2.5e-09 ± 1e-12"],
    ]
    assert len({len(line) for line in [header, *lines]}) == 1


def test_text_of_an_empty_table() -> None:
    assert str(make_table(scores={})).startswith("sensitivity by 'infoq': 0 sites scored, 3 at fixed bits")

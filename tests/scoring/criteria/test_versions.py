"""The numbers of every measure belong to a version: caches of an earlier version are not used for other numbers.

``golden.json`` holds the measurements of a fixed small model by criterion, and the version that they are of. After a
change of a measure: raise its ``"algorithm_version"`` and write the file anew by

    INFOQ_FX_WRITE_GOLDEN=1 python -m pytest -n 0 tests/scoring/criteria/test_versions.py
"""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import infoq_fx
from infoq_fx.api import prepare
from infoq_fx.core.data import read_data
from infoq_fx.quantization.codebooks import CODEBOOK_VERSION, choose_codebook
from infoq_fx.recovery.candidates import Candidates
from infoq_fx.runtime.digest import digest_run
from infoq_fx.runtime.forward import RunOptions
from infoq_fx.scoring.criteria import CRITERIA, find_criterion
from infoq_fx.scoring.sensitivity import Resources, describe_measurements, measure_sensitivity

GOLDEN = Path(__file__).with_name("golden.json")
WRITES = bool(os.environ.get("INFOQ_FX_WRITE_GOLDEN"))
ROUNDING, CODEBOOKS = "rounding to second order", "codebooks"
SLICED = "infoq with observers"
TRAINED = {"alps"}


def wave(*shape, step):
    """Numbers without a pattern that no version of torch draws differently."""
    values = torch.arange(math.prod(shape), dtype=torch.float64) * step
    return torch.sin(values * values).reshape(shape).float()


@pytest.fixture(scope="module")
def case():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(0.5 * wave(*parameter.shape, step=0.7 + 0.1 * index))
        x = wave(64, 1, 6, 6, step=0.31)
        model[3].bias -= model(x).mean(0)
        labels = model(x).argmax(1)
    prepared = prepare(model, (x, labels), bits=(2, 4), levels="uniform")
    return prepared, read_data((x, labels)).named(prepared.input_names)


def criterion_of(name):
    if name == SLICED:
        return infoq_fx.InfoQ(observers=["output"], slices=16)
    return find_criterion(name)


def measure(name, prepared, data):
    """The version, and the numbers by site, bit-width and name."""
    if name == CODEBOOKS:
        found = {bits: choose_codebook(wave(8, 36, step=0.7).numpy(), bits) for bits in (2, 4)}
        values = {
            str(bits): {"levels": float(abs(q).sum()), "scales": float(s.sum())} for bits, (q, s) in found.items()
        }
        return CODEBOOK_VERSION, values
    if name == ROUNDING:
        candidates = Candidates(prepared, data)
        rounded = candidates.round(prepared.inventory.sites, RunOptions()).rounded
        values = {
            f"{site} {bits}": {"integers": float(found.q.abs().sum()), "scales": float(found.qparams.scale.sum())}
            for (site, bits), found in sorted(rounded.items())
        }
        return candidates.describe()["rounding_version"], values
    criterion = criterion_of(name)
    _, measurements = measure_sensitivity(prepared, data, criterion, Resources(progress=False))
    values = {f"{m.site} {m.bits}": {key: float(v) for key, v in m.values.items()} for m in measurements}
    described = describe_measurements(criterion, prepared, data)
    return [described["algorithm_version"], described.get("output_version")], values


def read_golden():
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}


def tolerances(name, number):
    """Relative and absolute; training adds up what processors round, and an image more or less is 1.6 points."""
    if name not in TRAINED:
        return 2e-3, 1e-6
    return 0.5, 4.0 if "accuracy" in number else 0.005


def differences(name, wanted, found):
    """The numbers of a measure that differ by more than machines do."""
    if {key: set(values) for key, values in wanted.items()} != {key: set(values) for key, values in found.items()}:
        return ["other numbers are measured"]
    changed = []
    for key, values in wanted.items():
        for number, value in values.items():
            relative, absolute = tolerances(name, number)
            if not math.isclose(value, found[key][number], rel_tol=relative, abs_tol=absolute):
                changed.append(f"{key} {number}: {value:.6g} is now {found[key][number]:.6g}")
    return changed


@pytest.mark.parametrize("name", [*CRITERIA, SLICED, ROUNDING, CODEBOOKS])
def test_numbers_change_only_with_their_version(name, case):
    version, found = measure(name, *case)
    golden = read_golden()
    kept = golden.get(name)
    changed = [] if kept is None else differences(name, kept["values"], found)
    if kept is not None and kept["version"] == version:
        assert not changed, f"{name} measures other numbers: raise its algorithm_version, then see the top of this file"
    elif WRITES:
        golden[name] = {"version": version, "values": found}
        GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    else:
        pytest.fail(f"{name} has no golden numbers of version {version}: see the top of this file")


@pytest.mark.parametrize("name", [*CRITERIA, SLICED])
def test_the_version_is_part_of_the_key_and_of_the_table(name, case):
    prepared, data = case
    described = describe_measurements(criterion_of(name), prepared, data)
    assert isinstance(described["algorithm_version"], int)
    raised = {**described, "algorithm_version": described["algorithm_version"] + 1}
    keys = {digest_run(prepared, data, settings, batch_size=8) for settings in (described, raised)}
    assert len(keys) == 2


def test_a_raised_version_is_measured_again(case, tmp_path, monkeypatch):
    prepared, data = case
    options = {"criterion": "eagl", "cache_dir": tmp_path, "progress": False}
    table = infoq_fx.score(prepared, data, **options)
    kept = {path.parent.name for path in tmp_path.rglob("*bit-*.json")}
    assert infoq_fx.score(prepared, data, **options) == table
    monkeypatch.setattr("infoq_fx.scoring.criteria.literature.eagl._ALGORITHM_VERSION", 2)
    again = infoq_fx.score(prepared, data, **options)
    assert again.scores == table.scores
    assert again.settings["algorithm_version"] == 2
    assert len({path.parent.name for path in tmp_path.rglob("*bit-*.json")} - kept) == 1


def test_differences_are_seen():
    values = {"site 2": {"loss": 1.0, "error": 0.0}}
    assert not differences("mse", values, {"site 2": {"loss": 1.0 + 1e-4, "error": 1e-9}})
    assert differences("mse", values, {"site 2": {"loss": 1.01, "error": 0.0}})
    assert differences("mse", values, {"site 2": {"loss": 1.0}})
    assert not differences("alps", values, {"site 2": {"loss": 1.4, "error": 0.001}})
    assert differences("alps", values, {"site 2": {"loss": 3.0, "error": 0.0}})

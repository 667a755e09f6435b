"""The command line: its eight commands, their files, options from TOML, exit codes, and what --json prints."""

import json
import re
import shlex
import subprocess
import sys
import tomllib

import numpy as np
import onnxruntime
import pytest
import torch
from networks import ResidualNet
from PIL import Image
from typer.testing import CliRunner

import infoq_fx
from infoq_fx import cli
from infoq_fx.demo import digits, run_demo
from infoq_fx.errors import OptionError
from infoq_fx.scoring.criteria import find_criterion

COMMANDS = ["demo", "score", "allocate", "quantize", "export", "verify", "audit", "report"]
FAST = ["--bits", "4,8", "--recovery", "none", "--no-refine", "--no-progress"]


def run(*arguments):
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


def done(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model file, arrays, images, a state dict, scores."""
    path = tmp_path_factory.mktemp("cli")
    torch.manual_seed(1)
    x = torch.randn(40, 1, 8, 8)
    batch = torch.export.Dim("batch")
    net = ResidualNet().eval()
    torch.export.save(torch.export.export(net, (x[:2],), dynamic_shapes=({0: batch},)), path / "model.pt2")
    torch.save(net.state_dict(), path / "weights.pt")
    np.savez(path / "data.npz", x=x.numpy(), y=net(x).argmax(1).numpy())
    for index in range(12):
        kind = path / "images" / ("cat" if index < 6 else "dog")
        kind.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (50, 40 + index, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(kind / f"{index:02}.png")
    score = ["score", path / "model.pt2", path / "data.npz", "-o", path / "scores.json", "--bits", "2,4,8"]
    done(*score, "--criterion", "output_kl", "--no-progress")
    return path


@pytest.fixture(scope="module")
def quantized(folder):
    """The file that ``quantize`` writes, and what it prints with ``--json``."""
    files = ["quantize", folder / "model.pt2", folder / "data.npz", "-o", folder / "first.onnx"]
    return folder / "first.onnx", done(*files, "--budget", 5, *FAST, "--json")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["score", "quantize"])
def test_the_seed_reaches_the_criterion_and_the_steps(command, folder, tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    given = {}

    def score(*_, criterion, recovery, seed, **options):
        given.update(criterion=find_criterion(criterion, seed), steps=recovery)
        raise Asked

    def quantize_prepared(prepared, limits, data, criterion, steps, *_, **options):
        given.update(criterion=criterion, steps=steps)
        raise Asked

    monkeypatch.setattr("infoq_fx.api.score", score)
    monkeypatch.setattr("infoq_fx.pipeline.quantize_prepared", quantize_prepared)
    limit = ["--budget", 5] if command == "quantize" else []
    output = ["-o", tmp_path / "x.onnx", "--seed", 7, "--criterion", "hawq_v2", "--recovery", "best", *limit]
    found = run(command, folder / "model.pt2", folder / "data.npz", *output, "--bits", "4,8", "--no-progress")
    assert "Asked" in found.output
    assert given["criterion"].seed == 7
    assert {step.seed for step in given["steps"] if hasattr(step, "seed")} == {7}


def started(code, *, name="infoq-fx", cwd=None):
    """Run code as the installed command would be started."""
    prologue = f"import sys; sys.argv = [{name!r}, *sys.argv[1:]]\n"
    return subprocess.run(
        [sys.executable, "-c", prologue + code], capture_output=True, text=True, check=False, cwd=cwd, timeout=120
    )


def test_help_lists_the_commands_in_the_order_of_the_work_and_the_exit_codes():
    text = done("--help").stdout
    places = [re.search(rf"│ {name} ", text).start() for name in COMMANDS]
    assert places == sorted(places)
    flat = " ".join(text.split())
    for code in cli.ExitCode:
        assert f" {int(code)} " in flat
    assert "4 no allocation fits the budget" in flat


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_the_shared_options(name):
    text = done(name, "--help").stdout
    for option in ("--config", "--json", "--debug"):
        assert option in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["quantize", "--help"],
        ["allocate", "SCORES", "--budget", "4"],
        ["allocate", "SCORES", "--budget", "1"],
    ],
    ids=["help", "help of a command", "allocate", "an error of allocate"],
)
def test_neither_help_nor_allocation_waits_for_torch(arguments, folder):
    given = [str(folder / "scores.json") if argument == "SCORES" else argument for argument in arguments]
    code = (
        f"sys.argv += {given!r}\nfrom infoq_fx.cli import app\n"
        "try:\n    app()\nfinally:\n    print('torch' in sys.modules, 'numba' in sys.modules, file=sys.stderr)"
    )
    assert started(code).stderr.splitlines()[-1] == "False False"


def test_the_package_has_its_names_where_the_command_runs():
    code = "import infoq_fx; print(infoq_fx.Budget, infoq_fx.__version__, 'torch' in sys.modules)"
    found = started(f"{code}; infoq_fx.budget")
    assert found.stdout.split() == ["<class", "'infoq_fx.types.Budget'>", infoq_fx.__version__, "False"], found.stderr
    assert "attribute budget" in found.stderr


def test_completion_is_there():
    assert "--install-completion" in done("--help").stdout


def test_quantize_writes_a_verified_file_and_keeps_what_made_it(folder, quantized):
    path, result = quantized
    session = onnxruntime.InferenceSession(path)
    assert session.run(None, {"x": np.zeros((3, 1, 8, 8), np.float32)})[0].shape == (3, 5)
    found = json.loads(result.stdout)
    assert found["verification"]["is_sound"]
    assert found["verification"]["verdict"]
    assert found["file_bytes"] == path.stat().st_size
    assert found["allocation"]["cost"]["weight_bits"] <= 5
    assert infoq_fx.SensitivityTable.load(found["scores"]).scores
    kept = tomllib.loads((folder / "first.onnx.toml").read_text())
    assert kept["command"] == "quantize"
    assert kept["quantize"]["budget"] == 5
    assert kept["quantize"]["bits"] == "4,8"


@pytest.mark.slow
def test_quantize_takes_a_tolerance_within_a_budget(folder, tmp_path):
    files = ["quantize", folder / "model.pt2", folder / "data.npz", "-o", tmp_path / "t.onnx"]
    result = done(*files, "--max-nats", 1, "--bitops", 1e9, "--minimize", "weight_bits", *FAST, "--json")
    allocation = json.loads(result.stdout)["allocation"]
    assert allocation["budget"]["weight_bits"] <= 8
    assert allocation["budget"]["bitops"] == 1e9
    assert allocation["loss"]["measure"] == "nats"
    assert allocation["loss"]["samples"] == 20
    assert allocation["loss"]["value"] <= 1
    kept = tomllib.loads((tmp_path / "t.onnx.toml").read_text())["quantize"]
    assert (kept["max_nats"], kept["minimize"]) == (1.0, "weight_bits")


@pytest.mark.slow
def test_a_tolerance_is_validated_on_samples_of_its_own(folder, tmp_path):
    files = ["quantize", folder / "model.pt2", folder / "data.npz", "-o", tmp_path / "t.onnx", *FAST]
    result = done(*files, "--max-drop", 60, "--validation-data", folder / "data.npz")
    assert "points of top-1 on 40 samples" in result.stdout
    failed = run(*files, "--max-nats", 1e-12)
    assert failed.exit_code == cli.ExitCode.INFEASIBLE
    assert "--max-nats 1e-12 is out of reach on 20 samples: with all sites at 8 bits it loses" in failed.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("always:the samples that are held back", "always:the scores behind this allocation")
def test_scores_that_may_have_seen_the_validation_samples_are_warned_of(folder, tmp_path):
    files = ["quantize", folder / "model.pt2", folder / "data.npz", "-o", tmp_path / "t.pt2", *FAST, "--max-nats", 9]
    first = done(*files)
    assert "held back" not in first.stderr
    again = done(*files, "--scores", tmp_path / "t.pt2.scores.json")
    assert "held back" not in again.stderr
    seen = run(*files, "--scores", folder / "scores.json").stderr  # then refused: they are of other bit-widths
    assert "warning: the samples that are held back to validate may be among those that" in " ".join(seen.split())
    own = run(*files, "--scores", folder / "scores.json", "--validation-data", folder / "data.npz")
    assert "held back" not in own.stderr


@pytest.mark.slow
def test_the_effective_configuration_makes_the_same_file_again(folder, quantized, tmp_path):
    path, _ = quantized
    done("quantize", "--config", f"{path}.toml", "-o", tmp_path / "again.onnx", "--no-progress")
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_another_budget_needs_no_scoring(folder, quantized, tmp_path, monkeypatch):
    monkeypatch.setattr("infoq_fx.api.measure_sensitivity", None)  # scoring would fail
    scores = json.loads(quantized[1].stdout)["scores"]
    files = ["quantize", folder / "model.pt2", folder / "data.npz", "-o", tmp_path / "b.onnx", "--scores", scores]
    result = done(*files, "--budget", 7, "--recovery", "none", "--no-refine", "--no-progress")
    assert "blocks.0.conv1" in result.stdout
    assert tomllib.loads((tmp_path / "b.onnx.toml").read_text())["quantize"]["bits"] == "4,8"


@pytest.mark.slow
def test_scores_of_other_options_are_refused(folder, tmp_path):
    files = ["quantize", folder / "model.pt2", folder / "data.npz", "-o", tmp_path / "b.onnx", "--budget", 5]
    scores = ["--scores", folder / "scores.json"]
    assert "not in the model; give the MODEL" in run(*files, *scores, "--ignore", "head", "--no-progress").stderr
    assert "with candidates (4, 8) here" in run(*files, *scores, "--bits", "4,8", "--no-progress").stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("always:the scores behind this allocation")
def test_ties_come_from_the_settings_and_hold_for_scores_without_them(folder, tmp_path):
    (tmp_path / "c.toml").write_text('[quantize]\ntie = [["*.conv1", "*.conv2"]]\n')
    files = ["quantize", folder / "model.pt2", folder / "data.npz", "-o", tmp_path / "b.pt2", "--budget", 4]
    quick = ["--scores", folder / "scores.json", "--recovery", "none", "--no-refine", "--no-progress"]
    found = done(*files, *quick, "--config", tmp_path / "c.toml", "--json")
    bits = json.loads(found.stdout)["allocation"]["bits"]
    for block in (0, 1):
        assert bits[f"blocks.{block}.conv1.weight"] == bits[f"blocks.{block}.conv2.weight"]
    assert tomllib.loads((tmp_path / "b.pt2.toml").read_text())["quantize"]["tie"] == ["*.conv1,*.conv2"]
    assert "--tie is '*.conv1,'; give globs" in run(*files, *quick, "--tie", "*.conv1,").stderr.replace("\n", " ")


@pytest.mark.slow
@pytest.mark.filterwarnings("always:the scores behind this allocation")
def test_the_stages_hand_files_to_each_other(folder, tmp_path):
    found = json.loads(
        done("allocate", folder / "scores.json", "--budget", 4, "-o", tmp_path / "a.json", "--json").stdout
    )
    allocation = infoq_fx.load_allocation(tmp_path / "a.json")
    assert dict(allocation.bits) == found["bits"]
    table = infoq_fx.SensitivityTable.load(folder / "scores.json")
    assert allocation == infoq_fx.allocate(table, 4.0)
    files = ["quantize", folder / "model.pt2", folder / "data.npz", "--allocation", tmp_path / "a.json"]
    # The scores are for weights rounded by the default recovery, and these are rounded to nearest.
    told = done(*files, "-o", tmp_path / "q.pt2", "--bits", "2,4,8", "--recovery", "none", "--no-progress").stderr
    assert "the scores behind this allocation are for weights rounded by" in told
    assert dict(infoq_fx.allocation_of(infoq_fx.load_quantized(tmp_path / "q.pt2")).bits) == found["bits"]
    done("export", tmp_path / "q.pt2", "-o", tmp_path / "q.onnx", "--container", "int8")
    verified = json.loads(done("verify", tmp_path / "q.onnx", tmp_path / "q.pt2", folder / "data.npz", "--json").stdout)
    assert verified["is_sound"]
    assert verified["samples"] == 40


@pytest.mark.slow
def test_verify_tells_a_file_of_another_model(folder, quantized, tmp_path):
    files = ["quantize", "networks:ResidualNet", folder / "data.npz", "-o", tmp_path / "q.pt2", "--budget", 5]
    done(*files, *FAST)
    result = run("verify", quantized[0], tmp_path / "q.pt2", folder / "data.npz")
    assert result.exit_code == cli.ExitCode.UNSOUND
    assert result.stdout


@pytest.mark.slow
def test_a_state_dict_fills_a_callable(folder, tmp_path):
    files = [folder / "data.npz", "-o", tmp_path / "s.json", "--weights", folder / "weights.pt", "--no-progress"]
    done("score", "networks:ResidualNet", *files, "--bits", "2,4,8", "--criterion", "output_kl")
    scores = [infoq_fx.SensitivityTable.load(path).scores for path in (tmp_path / "s.json", folder / "scores.json")]
    assert scores[0].keys() == scores[1].keys()
    for name, by_bits in scores[0].items():
        for bits, score in by_bits.items():
            assert score.value == pytest.approx(scores[1][name][bits].value, rel=1e-3, abs=1e-7)


@pytest.mark.slow
def test_quantize_from_a_callable_and_an_image_folder(folder):
    out = folder / "images.onnx"
    arguments = ["quantize", "torchvision.models:squeezenet1_1(num_classes=7)", folder / "images", "--budget", 6]
    done(*arguments, "-o", out, "--image-size", 64, *FAST)
    session = onnxruntime.InferenceSession(out)
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert session.get_outputs()[0].shape[1] == 7


@pytest.mark.slow
def test_audit_compares(folder, tmp_path):
    files = ["audit", folder / "model.pt2", folder / "data.npz", "-o", tmp_path / "audit.json", "--no-progress"]
    result = done(*files, "--criteria", "eagl,weight_mse", "--budgets", "6,5", "--bits", "4,8", "--no-correlate")
    found = json.loads((tmp_path / "audit.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["eagl", "weight_mse", "uniform"]
    assert found["recommended"] in result.stdout
    assert {found["leader"], found["recommended"]} <= {"eagl", "weight_mse"}
    assert found["rows"][0]["top1"].keys() == {"6 bits", "5 bits"}
    for row in found["rows"]:
        for budget, nats in row["lost_nats"].items():
            assert nats > row["lost_nats_error"][budget] > 0
    assert (tmp_path / "audit.json.toml").exists()


@pytest.mark.slow
def test_report_writes_a_page(folder, tmp_path):
    pytest.importorskip("vl_convert")
    done("report", folder / "scores.json", "-o", tmp_path / "page.html", "--title", "Cats & dogs")
    assert "Cats &amp; dogs" in (tmp_path / "page.html").read_text()


@pytest.mark.slow
def test_an_interrupt_says_how_to_go_on(folder, tmp_path, monkeypatch):
    def interrupted(prepared, data, criterion, resources, *_):
        call = f"the same call with cache_dir={str(resources.cache_dir)!r}"
        raise KeyboardInterrupt(f"3 of 9 are kept; {call} resumes from there")

    monkeypatch.setattr("infoq_fx.pipeline.measure_sensitivity", interrupted)
    files = [folder / "model.pt2", folder / "data.npz", "-o", tmp_path / "x.onnx"]
    result = run("quantize", *files, "--budget", 4, "--cache-dir", tmp_path)
    assert result.exit_code == cli.ExitCode.INTERRUPTED
    assert f"the same command with --cache-dir '{tmp_path}' resumes from there" in result.stderr
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.slow
def test_the_command_keeps_its_scores(folder, tmp_path):
    files = ["score", folder / "model.pt2", folder / "data.npz", "-o", tmp_path / "s.json", "--no-progress"]
    for _ in range(2):
        done(*files, "--bits", "4,8", "--cache-dir", tmp_path / "scores", "--criterion", "output_kl")
    assert len(list((tmp_path / "scores").rglob("*bit-*.json"))) == 12


def errors(folder):
    files = ["quantize", folder / "model.pt2", folder / "data.npz", "-o", folder / "x.onnx"]
    scores = folder / "scores.json"
    return {
        "infeasible": (["allocate", scores, "--budget", 1], 4, "all layers at 2 bits"),
        "infeasible before scoring": ([*files, "--budget", 1], 4, "raise it to that"),
        "no budget": (["allocate", scores], 1, "there is no budget; give --budget"),
        "bits": ([*files, "--budget", 4, "--bits", "two"], 1, "--bits is 'two'; give bit-widths"),
        "out of range": ([*files, "--budget", 4, "--bits", "1,4"], 1, "give integers from 2 to 8"),
        "criterion": ([*files, "--budget", 4, "--criterion", "inofq"], 1, "nearest of 14: 'infoq'"),
        "recovery": ([*files, "--budget", 4, "--recovery", "fsat"], 1, "'fast'"),
        "pin": (["allocate", scores, "--budget", 4, "--pin", "head"], 1, "--pin is 'head'; give a glob"),
        "two tolerances": (
            [*files, "--max-drop", 1, "--max-nats", 1],
            1,
            "--max-drop and --max-nats are given; give one",
        ),
        "tolerance below 0": ([*files, "--max-drop", -1], 1, "--max-drop is -1; give a finite number"),
        "minimized": (
            [*files, "--max-nats", 1, "--minimize", "size"],
            1,
            "cost in --minimize 'size'; nearest of 4: 's",
        ),
        "negative limit": (["allocate", scores, "--size-bytes", -5], 1, "--size-bytes -5.0 is not a valid limit; give"),
        "limit": (["allocate", scores, "--budget", 1], 4, "error: --budget 1 is below the smallest reachable 2 (all"),
        "alpha": (["allocate", scores, "--budget", 4, "--alpha", -1], 1, "error: --alpha -1.0 must be a finite number"),
        "two pins": (
            ["allocate", scores, "--budget", 4, "--pin", "a=4", "--pin", "a=8"],
            1,
            "--pin gives 'a' both 4 and 8",
        ),
        "no tolerance": (
            [*files, "--budget", 4, "--validation-data", scores],
            1,
            "--validation-data is for a tolerance",
        ),
        "no folder": ([*files[:3], "-o", folder / "no" / "x.onnx", "--budget", 4], 1, "make"),
        "no scores": (["allocate", folder / "no.json", "--budget", 4], 1, "No such file"),
        "no model": (["quantize", "no.pt2", *files[2:], "--budget", 4], 1, "save one with torch.export.save"),
        "no quantized": (["export", folder / "model.pt2", "-o", folder / "x.onnx"], 1, "save_quantized"),
        "search of nothing": (
            [*files, "--budget", 4, "--no-refine", "--search-passes", 9],
            1,
            "leave --no-refine out",
        ),
        "both": ([*files, "--scores", scores, "--allocation", scores], 1, "give one"),
        "usage": (["allocate"], 2, "Missing argument"),
        "no such option": (["allocate", scores, "--bugdet", 4], 2, "No such option"),
    }


@pytest.mark.parametrize("name", errors(pytest.importorskip("pathlib").Path()))
def test_errors_are_one_paragraph_with_an_exit_code(name, folder):
    arguments, code, text = errors(folder)[name]
    result = run(*arguments, "--no-progress") if "quantize" in arguments else run(*arguments)
    assert result.exit_code == code, result.output
    assert text in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert result.stdout == ""
    if code != 2:
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.splitlines()) == 1


def test_json_is_one_document_for_errors_too(folder):
    found = json.loads(run("allocate", folder / "scores.json", "--budget", 1, "--json").stdout)
    assert found["error"]["exit_code"] == 4
    assert found["error"]["kind"] == "InfeasibleBudgetError"
    assert "raise it" in found["error"]["message"]


def test_a_traceback_only_with_debug(folder, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the gears\njam")

    monkeypatch.setattr("infoq_fx.allocation.solver.allocate", fail)
    plain = run("allocate", folder / "scores.json", "--budget", 4)
    assert plain.exit_code == cli.ExitCode.FAULT
    assert plain.stderr.count("\n") == 1
    assert "internal error, RuntimeError: the gears jam; run it again with --debug" in plain.stderr
    shown = run("allocate", folder / "scores.json", "--budget", 4, "--debug")
    assert shown.exit_code == cli.ExitCode.FAULT
    assert "Traceback" in shown.stderr
    assert "in fail" in shown.stderr


CONFIGURATIONS = {
    "at the top": ("budget = 4.0\nbits = [2, 4]\n", None),
    "in the command's table": (
        "[allocate]\nbudget=4\n[allocate.pin]\n'head.weight'=8\n[quantize]\nbits='2'",
        None,
    ),
    "with hyphens": ("[allocate]\nsize-bytes = 1000000\n", None),
    "an unknown name": ("[allocate]\nbugdet = 4\n", "nearest of"),
    "a name of no command": ("bugdet = 4\n", "'budget'"),
    "not TOML": ("budget = = 4\n", "is not TOML"),
    "no value": ("[allocate]\nbudget = 2026-01-01\n", "give a number, a text"),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_options_come_from_a_file(name, folder, tmp_path):
    text, message = CONFIGURATIONS[name]
    (tmp_path / "c.toml").write_text(text)
    result = run("allocate", folder / "scores.json", "--config", tmp_path / "c.toml", "--json")
    if message is None:
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        if "pin" in text:
            assert found["bits"]["head.weight"] == 8
    else:
        assert result.exit_code == 1
        assert message in result.stderr


def test_the_command_line_goes_before_the_file(folder, tmp_path):
    (tmp_path / "c.toml").write_text("budget = 4\n")
    result = done("allocate", folder / "scores.json", "--config", tmp_path / "c.toml", "--budget", 6, "--json")
    assert json.loads(result.stdout)["budget"]["weight_bits"] == 6


@pytest.mark.slow
def test_text_survives_the_configuration(folder, tmp_path):
    pytest.importorskip("vl_convert")
    title = 'a "quoted" \\ title,\u00e9\n\U0001f600\x7f'
    done("report", folder / "scores.json", "-o", tmp_path / "p.html", "--title", title)
    assert tomllib.loads((tmp_path / "p.html.toml").read_text())["report"]["title"] == title


def test_bits_are_read_as_lists_and_ranges():
    from infoq_fx.cli.options import read_bits

    assert read_bits("2,4,8", "--bits") == (2, 4, 8)
    assert read_bits("2-4, 8", "--bits") == (2, 3, 4, 8)
    assert read_bits("none", "--bits") is None
    with pytest.raises(OptionError):
        read_bits("2;4", "--bits")


@pytest.mark.slow
def test_the_demo_keeps_the_accuracy_in_a_file_a_fraction_of_the_size(tmp_path):
    result = run_demo(tmp_path, progress=False)
    assert result.float_top1 > 97
    assert result.quantized_top1 > result.float_top1 - 3
    assert abs(result.onnx_top1 - result.quantized_top1) < 0.5
    assert infoq_fx.allocation_of(result.quantized).cost.weight_bits <= 3
    assert result.onnx_bytes < result.float_bytes
    assert len(digits()[1][1]) == 597


@pytest.mark.slow
def test_the_demo_command_leaves_its_results_where_it_is_run(tmp_path):
    code = "import sys; sys.argv[0] = 'infoq-fx'; from infoq_fx.cli import main; main()"
    command = [sys.executable, "-c", code, "demo", "--no-progress"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for text in ("blocks.1.conv1", "float32", "uniform 3 bits", "onnxruntime"):
        assert text in result.stdout
    left = {path.name for path in (tmp_path / "infoq-demo").iterdir()}
    assert left == {"digits.onnx", "scores.json", "report.html", "settings.toml"}
    assert "Results in infoq-demo/:" in result.stdout
    following = shlex.split(result.stdout.strip().splitlines()[-1].removeprefix("Next: infoq-fx "))
    again = [sys.executable, "-c", code, *following]
    allocated = subprocess.run(again, capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path)
    assert allocated.returncode == 0, allocated.stderr
    assert "2.5 bits a weight" in allocated.stdout or "2.5 bits per weight" in allocated.stdout

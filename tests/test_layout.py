"""The direction of the imports: every file stands on a floor and imports only from floors below."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "infoq_fx"

# Files of one line share a floor and do not import each other.
FLOORS = [
    ["errors", "version", "tabular"],
    ["targets"],
    ["spec", "files", "jit"],
    [
        "machine",
        "kernels",
        "pointwise",
        "error_feedback",
        "histogram",
        "cost",
        "table",
        "allocation_file",
        "data",
        "encoders",
    ],
    ["mutual_info", "numerics", "relaxation", "summary"],
    ["core_search", "integer_program"],
    ["allocation"],
    ["quantizers"],
    ["prepared", "capture"],
    ["run_plan", "integer_convolution"],
    ["passes", "interpreter"],
    ["runs", "quantized", "trainable", "calibration"],
    ["criteria", "retraining", "training_data"],
    ["cache", "workers", "training_loop"],
    ["recovery"],
    ["sensitivity", "refinement", "finetuning", "onnx_export", "quantized_files", "verification"],
    ["api", "model_files", "audit_result"],
    ["demo", "auditing", "compile_flows", "pt2e"],
    ["report"],
    ["cli", "names"],
    ["__init__"],
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
ONLY_IN = {
    "numba": {"jit"},
    "pulp": {"integer_program"},
    "onnx": {"onnx_export"},
    "onnx_ir": {"onnx_export"},
    "onnxscript": {"onnx_export"},
    "onnxruntime": {"onnx_export", "verification", "demo"},
    "openvino": {"verification"},
    "typer": {"cli"},
    "tqdm": {"sensitivity", "auditing", "recovery", "finetuning"},
    "psutil": {"machine"},
    "sklearn": {"demo"},
    "matplotlib": {"report"},
    "vl_convert": {"report"},
    "torchao": {"pt2e"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    for node in ast.runner(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            yield from ([f"{node.module}.{a.name}" for a in node.names] if node.module == "infoq_fx" else [node.module])
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = room(path)
    assert here in FLOOR_OF, f"{here} stands on no floor"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "infoq_fx" and parts[1] != here:
            assert FLOOR_OF[parts[1]] < FLOOR_OF[here], f"{here} imports {parts[1]}"
        assert here in ONLY_IN.get(parts[0], {here}), f"{here} imports {parts[0]}"
        assert not name.startswith("torch.ao"), "torch.ao.quantization is deprecated"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_read_in_one_sitting(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 450, f"{path.name} has {len(lines)} lines"
    assert not [line for line in lines if line.lstrip().startswith("print(")]


def test_every_public_name_is_there_and_documented():
    import infoq_fx

    for name in infoq_fx.__all__:
        assert getattr(infoq_fx, name) is not None
        assert isinstance(getattr(infoq_fx, name), dict) or getattr(infoq_fx, name).__doc__

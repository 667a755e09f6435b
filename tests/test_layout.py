"""The rooms of the package in the order of the data: imports go to earlier rooms only, and a room is not crowded."""

import ast
import importlib
from inspect import isroutine
from pathlib import Path

import infoq_fx

PACKAGE = Path(__file__).parents[1] / "infoq_fx"

# What happens to a model, in order; a room imports those before it.
ROOMS = [
    "errors",
    "core",
    "types",
    "table",
    "quantization",
    "graph",
    "runtime",
    "allocation",
    "conversion",
    "finetuning",
    "recovery",
    "scoring",
    "tolerance",
    "pipeline",
    "api",
    "auditing",
    "export",
    "latency",
    "demo",
    "report",
    "cli",
]
# Optional or heavy packages, and the only rooms that may import them.
ONLY_IN = {
    "numba": {"core"},
    "psutil": {"core"},
    "pulp": {"allocation"},
    "onnx": {"export", "latency"},
    "onnx_ir": {"export"},
    "onnxscript": {"export"},
    "onnxruntime": {"export", "latency", "demo"},
    "openvino": {"export"},
    "qonnx": {"export"},
    "torchao": {"export"},
    "matplotlib": {"report"},
    "vl_convert": {"report"},
    "typer": {"cli"},
}
MOST_MODULES_AT_THE_TOP = 8
MOST_FILES_IN_A_FOLDER = 12
MOST_LINES = 450


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room != "__init__":
            yield path, room


def imported_names(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (
                [f"infoq_fx.{alias.name}" for alias in node.names] if node.module == "infoq_fx" else [node.module]
            )
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_go_to_earlier_rooms():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path, room in modules()
        for name in imported_names(path)
        if name.startswith("infoq_fx.") and (other := name.split(".")[1]) != room
        if other in ROOMS and ROOMS.index(other) > ROOMS.index(room)
    ]
    assert not wrong
    assert {room for _, room in modules()} == set(ROOMS)


def test_heavy_packages_stay_in_their_rooms():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path, room in modules()
        for name in imported_names(path)
        if room not in ONLY_IN.get(name.split(".")[0], {room}) or name.startswith("torch.ao")
    ]
    assert not wrong


def test_folders_and_files_stay_small():
    folders = [folder for folder in (PACKAGE, *PACKAGE.rglob("*")) if folder.is_dir() and folder.name != "__pycache__"]
    files = {
        folder: [path for path in folder.iterdir() if path.is_file() and path.suffix != ".pyc"] for folder in folders
    }
    most = {PACKAGE: MOST_MODULES_AT_THE_TOP + 2}  # with __init__.pyi and py.typed
    assert not {
        folder: len(found) for folder, found in files.items() if len(found) > most.get(folder, MOST_FILES_IN_A_FOLDER)
    }
    long = {path: len(path.read_text().splitlines()) for path, _ in modules()}
    assert not {path: lines for path, lines in long.items() if lines > MOST_LINES}


def test_every_public_name_can_be_imported_and_is_documented():
    faces = [infoq_fx, *(importlib.import_module(f"infoq_fx.{room}") for room in ROOMS if (PACKAGE / room).is_dir())]
    for face in faces:
        assert (face.__doc__ or "").strip()
        for name in getattr(face, "__all__", ()):
            value = getattr(face, name)
            is_documented = (getattr(value, "__doc__", None) or "").strip() or not (
                isinstance(value, type) or isroutine(value)
            )
            assert is_documented, f"{face.__name__}.{name}"

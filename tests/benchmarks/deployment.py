"""Measure exported files of pretrained models in runtimes: bytes, equality, kernels, accuracy, speed and loading.

    python tests/benchmarks/deployment.py [resnet20 vit mobilenet_v2 fastestdet] [--means 4 3 2.5] [--data FOLDER]
        [--criterion infoq] [--cache-dir FOLDER] [--runs 60] [--oldest other/bin/python] [--loading]

Needs the models and images of a folder with ``real_models.py`` and ``real_tasks.py`` (--data), and
``infoq-fx[openvino]``. Activations are at 8 bits, weights recovered as by ``quantize()``. Every file in container exact
is compared with the int8 file: outputs at three levels of onnxruntime, in OpenVINO, and in the onnxruntime of another
environment (--oldest); convolutions in integers; CPU time on one thread in alternating runs. --loading measures time
and peak memory of loads, each in a process of its own, also of a ResNet-50 with random weights.
"""

import argparse
import collections
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

DATA = Path(__file__).parents[3] / "shared" / "data"
BITS = (2, 3, 4, 5, 6, 7, 8)
PAPER = {"mobilenet_v2": 14.0}  # compression in the paper


def load_case(folder, name):
    """Load a model, calibration data and evaluation data (labels are None where the metric is not top-1)."""
    import real_models  # with torch, which the environment of --oldest does not have

    if name != "fastestdet":
        return real_models.load_case(real_models.load_real_models(folder / "real_models.py"), name, 0)
    sys.path.insert(0, str(folder))  # before this folder, which has a real_tasks too
    tasks = importlib.import_module("real_tasks")
    return tasks.fastestdet(), tasks.coco128("train")[0], (tasks.coco128("val")[0], None)


def open_session(path, level="ORT_ENABLE_ALL", optimised=None):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    if optimised:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_session(session, images, size=25):
    name = session.get_inputs()[0].name
    parts = [session.run(None, {name: images[start : start + size]}) for start in range(0, len(images), size)]
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def run_openvino(path, images, size=25):
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU")
    parts = []
    for start in range(0, len(images), size):
        found = compiled(images[start : start + size])
        parts.append([np.array(found[key]) for key in compiled.outputs])
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def are_equal(first, second):
    return "equal" if all(map(np.array_equal, first, second)) else "DIFFERENT"


def count_convolutions(path, folder):
    """Count integer convolutions, and all convolutions, in the graph that onnxruntime runs."""
    import onnx

    open_session(path, optimised=folder / "optimised.onnx")
    kinds = collections.Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)
    integer = kinds["QLinearConv"] + kinds["ConvInteger"]
    return integer, integer + kinds["Conv"] + kinds["FusedConv"]


def compare_speed(first, second, images, runs):
    """Measure how many times faster the second file is, in CPU time of one thread."""
    sessions, spent = [open_session(first), open_session(second)], ([], [])
    feeds = [{session.get_inputs()[0].name: images} for session in sessions]
    for run in range(runs):
        for session, feed, seconds in zip(sessions, feeds, spent, strict=True):
            start = time.thread_time()
            session.run(None, feed)
            if run >= runs // 5:
                seconds.append(time.thread_time() - start)
    return statistics.median(spent[0]) / statistics.median(spent[1])


def export_float(model, images, path):
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = torch.export.Dim("batch")
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},), strict=False)
        torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False).save(path, external_data=False)


def compare_files(exact, int8, quantized, images, options, folder):
    """Print how the exact file runs beside the int8 file."""
    import torch

    array = images.numpy()
    with torch.no_grad():
        parts = [quantized(part) for part in images.split(25)]
    parts = [part if isinstance(part, tuple | list) else (part,) for part in parts]
    module = [torch.cat(part).numpy() for part in zip(*parts, strict=True)]
    found = {}
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"):
        found[level], whole = (run_session(open_session(path, level), array) for path in (exact, int8))
        own, other = are_equal(found[level], module), are_equal(whole, module)
        print(f"  {level}: {are_equal(found[level], whole)} to int8; to torch: exact {own}, int8 {other}")
    print(f"  OpenVINO: {are_equal(run_openvino(exact, array), run_openvino(int8, array))} to int8")
    if options.oldest:
        np.save(folder / "x.npy", array)
        np.savez(folder / "y.npz", *found["ORT_ENABLE_ALL"])
        told = [options.oldest, __file__, "--run", str(exact), str(int8), str(folder)]
        print("  " + subprocess.run(told, check=True, capture_output=True, text=True).stdout.strip())
    counts = [count_convolutions(path, folder) for path in (exact, int8)]
    print(f"  convolutions in integers: {counts[0][0]} of {counts[0][1]}, int8 {counts[1][0]} of {counts[1][1]}")
    speed = [compare_speed(int8, exact, array[:batch], options.runs) for batch in (1, 16)]
    print(f"  speed, times that of int8, batch 1 and 16: {speed[0]:.3f}, {speed[1]:.3f}", flush=True)


def run_case(name, options, folder):
    import infoq_fx

    model, calibration, (images, labels) = load_case(options.data, name)
    prepared = infoq_fx.prepare(model, calibration, bits=BITS)
    table = infoq_fx.score(
        prepared, calibration, criterion=options.criterion, cache_dir=options.cache_dir, progress=False
    )
    float_path = folder / "float.onnx"
    export_float(model, images[:2], float_path)
    budgets = [infoq_fx.Budget(weight_bits=mean) for mean in options.means]
    budgets += [infoq_fx.Budget(compression=PAPER[name])] if name in PAPER else []
    for budget in budgets:
        allocation = infoq_fx.allocate(table, budget)
        recovered = infoq_fx.recover(prepared, allocation, calibration, progress=False)
        quantized = infoq_fx.convert(recovered, allocation)
        exact, int8 = (infoq_fx.export_onnx(quantized, folder / f"{c}.onnx", container=c) for c in ("exact", "int8"))
        size, counted = infoq_fx.measure_file(exact), allocation.cost.size_bytes
        print(f"\n{name}, {budget}: {size.total_bytes:,} bytes = {size.tensor_bytes:,} of tensors + "
              f"{size.graph_bytes:,} of graph; counted {counted:,} ({size.total_bytes / counted:.3f} times); int8 "
              f"{int8.stat().st_size:,}; float {float_path.stat().st_size:,} "
              f"({float_path.stat().st_size / size.total_bytes:.2f} times)", flush=True)  # fmt: skip
        compare_files(exact, int8, quantized, images[:500], options, folder)
        for target in ("onnxruntime", "openvino"):
            path = infoq_fx.export_onnx(quantized, folder / "own.onnx", target=target)
            data = images if labels is None else (images, labels)
            print(infoq_fx.verify_onnx(path, quantized, data, target=target), flush=True)
        speed = [compare_speed(float_path, exact, images[:batch].numpy(), options.runs) for batch in (1, 16)]
        print(f"  speed, times that of float, batch 1 and 16: {speed[0]:.2f}, {speed[1]:.2f}", flush=True)
        if options.loading and budget.weight_bits == 3:
            print_loading(folder)


def print_loading(folder):
    for runtime in ("onnxruntime", "openvino"):
        for container in ("int8", "exact"):
            told = [sys.executable, __file__, "--load", str(folder / f"{container}.onnx"), runtime]
            found = [json.loads(subprocess.run(told, check=True, capture_output=True).stdout) for _ in range(3)]
            least = {key: min(one[key] for one in found) for key in ("ms", "mb", "after")}
            print(f"  load in {runtime}, {container}: {least['ms']:.0f} ms, peak {least['mb']:.0f} MB more, "
                  f"{least['after']:.0f} MB after it", flush=True)  # fmt: skip


def load_large(folder):
    """A ResNet-50 with random weights of 2, 3 and 4 bits."""
    import torch
    import torchvision

    import infoq_fx

    torch.manual_seed(0)
    model, images = torchvision.models.resnet50().eval(), torch.randn(16, 3, 64, 64)
    prepared = infoq_fx.prepare(model, images, bits=(2, 3, 4))
    weights = [site.name for site in prepared.inventory.sites if site.kind == "weight"]
    bits = {**{site.name: 8 for site in prepared.inventory.sites}, **{n: 2 + i % 3 for i, n in enumerate(weights)}}
    quantized = infoq_fx.convert(prepared, infoq_fx.Allocation(bits=bits))
    for container in ("exact", "int8"):
        path = infoq_fx.export_onnx(quantized, folder / f"{container}.onnx", container=container)
        print(f"\nResNet-50, 2 to 4 bits, {container}: {path.stat().st_size:,} bytes")
    print_loading(folder)


def load(path, runtime):
    """Load a file and print time and memory; runs in a process of its own."""
    if runtime == "openvino":
        import openvino
    else:
        import onnxruntime  # noqa: F401
    before, start = read_status("VmRSS"), time.process_time()
    if runtime == "openvino":
        core = openvino.Core()
        held = core.compile_model(core.read_model(path), "CPU")
    else:
        held = open_session(path)
    spent, peak, after = time.process_time() - start, read_status("VmHWM"), read_status("VmRSS")
    print(json.dumps({"ms": 1e3 * spent, "mb": peak - before, "after": after - before}))
    del held


def read_status(name):
    """Memory of this process in MB: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def run_oldest(exact, int8, folder):
    """Compare both files with what the newer onnxruntime found; needs onnxruntime and numpy only."""
    import onnxruntime

    array = np.load(Path(folder) / "x.npy")
    newer = list(np.load(Path(folder) / "y.npz").values())
    found, whole = (run_session(open_session(path), array) for path in (exact, int8))
    print(f"onnxruntime {onnxruntime.__version__}: {are_equal(found, whole)} to int8, {are_equal(found, newer)} to the "
          "newer one's result")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["resnet20", "vit", "mobilenet_v2", "fastestdet"])
    parser.add_argument("--means", type=float, nargs="+", default=[4.0, 3.0, 2.5])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--criterion", default="infoq")
    parser.add_argument("--cache-dir")
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--oldest", help="a Python with the oldest supported onnxruntime")
    parser.add_argument("--loading", action="store_true")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        return load(*options.load)
    if options.run:
        return run_oldest(*options.run)
    if not (options.data / "real_models.py").is_file():
        raise SystemExit(f"no real_models.py in {options.data}; give the folder of models and data by --data")
    import torch

    torch.manual_seed(0)
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            run_case(name, options, Path(folder))
    if options.loading:
        with tempfile.TemporaryDirectory() as folder:
            load_large(Path(folder))
    return None


if __name__ == "__main__":
    main()

"""Measure exported files of pretrained models in runtimes: agreement, accuracy, kernels, speed and size.

    python tests/benchmarks/deployment.py [resnet20] [vit] [mobilenet_v2] [--cache-dir FOLDER] [--runs 60]

Needs the models and images next to the project (``../shared/data/real_models.py``), and ``infoq-fx[openvino]`` for that
runtime. Weights at a mean of 4 bits in container int8 (agreement, kernels, speed) and of 3 bits in container packed
(size), activations at 8 bits, recovered as by ``quantize()``. Speed is the CPU time of
the float model over that of the file, on one thread, in alternating runs.
"""

import argparse
import collections
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import onnx
import onnxruntime
import torch
from real_models import LEVELS, load_case, load_real_models

import infoq_fx
from infoq_fx.allocation.cost import measure_cost

BITS = (2, 3, 4, 5, 6, 8)


def quantize(prepared, table, budget, images):
    allocation = infoq_fx.refine(prepared, table, budget, images)
    recovered = infoq_fx.recover(prepared, allocation, images, progress=False)
    return infoq_fx.convert(recovered, allocation)


def open_session(path, optimised=None):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level, options.graph_optimization_level = 3, LEVELS.ORT_ENABLE_ALL
    if optimised:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def count_convolutions(path, folder):
    """Count integer convolutions, and all convolutions, in the graph that onnxruntime runs."""
    open_session(path, folder / "optimised.onnx")
    kinds = collections.Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)
    integer = kinds["QLinearConv"] + kinds["ConvInteger"]
    return integer, integer + kinds["Conv"] + kinds["FusedConv"]


def measure_speed(float_path, path, images, runs):
    """Measure how many times faster the file is, in CPU time of one thread."""
    sessions, spent = [open_session(float_path), open_session(path)], ([], [])
    feeds = [{session.get_inputs()[0].name: images.numpy()} for session in sessions]
    for run in range(runs):
        for session, feed, seconds in zip(sessions, feeds, spent, strict=True):
            start = time.thread_time()
            session.run(None, feed)
            if run >= runs // 5:
                seconds.append(time.thread_time() - start)
    return statistics.median(spent[0]) / statistics.median(spent[1])


def export_float(model, images, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = torch.export.Dim("batch")
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},), strict=False)
        torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False).save(path)


def run_case(name, case, arguments, folder):
    model, calibration, (images, labels) = case
    prepared = infoq_fx.prepare(model, calibration, bits=BITS)
    table = infoq_fx.score(prepared, calibration, cache_dir=arguments.cache_dir, progress=False)
    quantized = quantize(prepared, table, 4.0, calibration[0])
    float_path, path = folder / "float.onnx", infoq_fx.export_onnx(quantized, folder / "int8.onnx")
    export_float(model, images[:2], float_path)
    print(f"\n{name}, 4 bits, int8: {path.stat().st_size:,} bytes, float {float_path.stat().st_size:,}")
    for target in ("onnxruntime", "openvino"):
        own = infoq_fx.export_onnx(quantized, folder / f"{target}.onnx", target=target)
        print(infoq_fx.verify_onnx(own, quantized, (images, labels), target=target), flush=True)
    print("convolutions in integers: {} of {}".format(*count_convolutions(path, folder)))
    for batch in (1, 16):
        print(f"batch {batch}: {measure_speed(float_path, path, images[:batch], arguments.runs):.2f} times the speed")
    small = quantize(prepared, table, 3.0, calibration[0])
    infoq_fx.export_onnx(small, folder / "packed.onnx", container="packed")
    size, tensors = (folder / "packed.onnx").stat().st_size, onnx.load(folder / "packed.onnx").graph.initializer
    counted = measure_cost(prepared.inventory, infoq_fx.allocation_of(small).bits, "packed").size_bytes
    stored = sum(len(tensor.raw_data) for tensor in tensors)
    print(f"3 bits, packed: {size:,} bytes; parameters by count {counted:,} ({100 * (size / counted - 1):+.1f} %)")
    print(f"  integers, scales and zero points in the file {stored:,} ({100 * (size / stored - 1):+.1f} %)")
    print(infoq_fx.verify_onnx(folder / "packed.onnx", small, (images, labels)), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["resnet20", "vit", "mobilenet_v2"])
    parser.add_argument("--cache-dir")
    parser.add_argument("--runs", type=int, default=60)
    arguments = parser.parse_args()
    real = load_real_models()
    torch.manual_seed(0)
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            run_case(name, load_case(real, name, 0), arguments, Path(folder))


if __name__ == "__main__":
    main()

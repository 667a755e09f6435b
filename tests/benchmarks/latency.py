"""Predict the latency of files by the sum of their layers, and measure it.

    python tests/benchmarks/latency.py [resnet20 mobilenet_v2] [--data FOLDER] [--runs 60]

Needs the models and images of a folder with ``real_models.py`` (--data). The layers are timed once, by
``measure_latency`` on one thread. Each of the predicted files is an export of its own, with layers left in float by
``ignore``: none, the second half, all but the last quarter, and every second row of four. All files run in turns; the
latency is the median CPU time of a batch of one sample.
"""

import argparse
import glob
import statistics
import tempfile
import time
from pathlib import Path

import real_models
from deployment import open_session

import infoq_fx

DATA = Path(__file__).parents[3] / "shared" / "data"
TURNS = 5


def choose_ignored(names):
    """Layers to leave in float, by what to call them; layers in a row, as a float layer alone may not stay one."""
    count = len(names)
    return {
        "8 bits": [],
        "second half in float": names[count // 2 :],
        "all but the last quarter in float": names[: 3 * count // 4],
        "every second row of four in float": [name for i, name in enumerate(names) if i // 4 % 2],
    }


def export_files(model, calibration, names, cost, folder):
    """Write the files, and predict their latencies."""
    infoq_fx.COSTS["latency_ms"] = cost
    files = {}
    for index, (title, ignored) in enumerate(choose_ignored(names).items()):
        prepared = infoq_fx.prepare(model, calibration, bits=(4, 8), ignore=[glob.escape(name) for name in ignored])
        bits = {site.name: 8 for site in prepared.inventory.sites}
        quantized = infoq_fx.convert(prepared, infoq_fx.Allocation(bits=bits))
        path = infoq_fx.export_onnx(quantized, folder / f"{index}.onnx")
        predicted = infoq_fx.allocation.measure_cost(prepared.inventory, bits, ["latency_ms"])["latency_ms"]
        files[title] = (path, predicted)
    return files


def measure_files(paths, images, runs):
    """The median CPU time of each file in milliseconds; the files run in turns."""
    sessions, spent = [open_session(path) for path in paths], [[] for _ in paths]
    feed = {sessions[0].get_inputs()[0].name: images[:1].numpy()}
    for _ in range(TURNS):
        for session, found in zip(sessions, spent, strict=True):
            for run in range(3 + runs // TURNS):
                start = time.thread_time()
                session.run(None, feed)
                found += [1e3 * (time.thread_time() - start)] if run >= 3 else []
    return [statistics.median(found) for found in spent]


def run_case(name, options, folder):
    real = real_models.load_real_models(options.data / "real_models.py")
    model, (images, _), _ = real_models.load_case(real, name, 0)
    calibration = images[:64]
    prepared = infoq_fx.prepare(model, calibration, bits=(4, 8))
    start = time.process_time()
    cost = infoq_fx.measure_latency(prepared, runs=options.runs)
    print(f"\n{name}: layers timed in {time.process_time() - start:.0f} s CPU\n" + "\n".join(cost._notes()))
    names = [operation.name for operation in prepared.inventory.operations]
    files = export_files(model, calibration, names, cost, folder)
    measured = measure_files([path for path, _ in files.values()], images, options.runs)
    for (title, (_, predicted)), whole in zip(files.items(), measured, strict=True):
        print(
            f"  {title}: predicted {predicted:.3f} ms, measured {whole:.3f} ms, {100 * (predicted / whole - 1):+.1f} %"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["resnet20", "mobilenet_v2"])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--runs", type=int, default=60)
    options = parser.parse_args()
    if not (options.data / "real_models.py").is_file():
        raise SystemExit(f"no real_models.py in {options.data}; give the folder of models and data by --data")
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            run_case(name, options, Path(folder))


if __name__ == "__main__":
    main()

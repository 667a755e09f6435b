"""Compare the CPU time of scoring with that of a straightforward implementation.

    python tests/benchmarks/scoring.py [kernel] [resnet20] [tried] [memory] [--float]

``kernel`` needs no data; the others need the models next to the project (``../shared/data/real_models.py``).
All run on one thread. The kernel's times are the least of many short rounds, alternating with ``numpy.argsort``, since
other programs on the machine can only increase a time.

The straightforward implementation runs the whole prepared module, with hooks at the observers, for every (site,
bit-width), and calls scikit-learn's ``mutual_info_regression`` and ``mutual_info_classif`` on the same projections. It
is measured on a sample of runs and slices and extrapolated.

Alternatives tried, on ResNet-20 unless another model is named (``tried`` measures the first three again):

- Convolutions over integers (oneDNN, VNNI): the same values to the last bit in two thirds of the CPU of a forward
  pass, on MobileNetV2 in half of it. Kept; a trial on values that saturate elsewhere decides whether to use them.
- channels_last: without it the float convolutions take 1.4 to 3 times as long, depending on the processor. Kept.
- bf16 convolutions: three times slower than float32 on a processor without instructions for them, and the logits move
  by 1.7 % of their deviation, as they do at 7 bits. Not kept.
- ReLU, clamps and residual additions merged into the quantizer that reads them, one pass over memory; two quantizers
  of one value with the same qparams computed once: 0.65 of the CPU of a forward pass. Kept.
- All perturbed variants of a site as one larger batch: slower, the values leave the cache. Not kept.
- Runs at 8 bits are not run, nothing is perturbed. Bounding other bit-widths from their neighbours': a quarter of the
  neighbouring pairs are out of order (all within two standard errors), so that no bound is exact. Not kept.
- Neighbours by sweeps over the whole plane grow with N ** 1.5, in bands of y with N ** 1.1, and 2.6 times less CPU at
  N = 2,048. Kept. Bisection in a window of places for the counts in x: branches, slower. Not kept.
"""

import argparse
import importlib.util
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"

import numpy as np
import torch

import infoq_fx
from infoq_fx.core.data import read_data
from infoq_fx.core.threads import one_torch_thread
from infoq_fx.runtime import integer_convolution
from infoq_fx.runtime.forward import RunOptions, choose_batch_size
from infoq_fx.runtime.integer_convolution import find_integer_nodes
from infoq_fx.runtime.interpreter import SiteInterpreter
from infoq_fx.runtime.outputs import read_nodes
from infoq_fx.runtime.run_plan import plan_whole_run
from infoq_fx.scoring.information.measurement import InformationMeasure
from infoq_fx.scoring.information.mutual_info import estimate_ksg, estimate_ross, rank_samples, unit_projections
from infoq_fx.scoring.information.observers import choose_default_observers, pool_features
from infoq_fx.scoring.sensitivity import Resources, measure_sensitivity

DATA = Path(__file__).parents[3] / "shared" / "data" / "real_models.py"
SAMPLES, SLICES = 1024, 256


def cpu_seconds(function, *arguments):
    start = time.process_time()
    result = function(*arguments)
    return time.process_time() - start, result


def load_real_models():
    if not DATA.exists():
        sys.exit(f"the pretrained models are missing: no {DATA.name} in a folder shared/data next to the project")
    spec = importlib.util.spec_from_file_location("real_models", DATA)
    real = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(real)
    return real


def run_kernel():
    print(
        "kernel, one thread, k = 5, microseconds a slice and in multiples of numpy.argsort of the same float32 points"
    )
    generator, least = np.random.default_rng(0), {}
    for samples in (1024, 2048, 4096, 8192):
        slices = max(2, (1 << 14) // samples)
        x = generator.standard_normal((slices, samples)).astype(np.float32)
        y = (0.5 * x + generator.standard_normal(x.shape)).astype(np.float32)
        labels, ranked = generator.integers(0, 10, samples), rank_samples(x)
        run_options = {
            "argsort": lambda x=x: [np.argsort(row) for row in x],
            "KSG, x sorted once": lambda ranked=ranked, y=y: estimate_ksg(ranked, y, threads=1),
            "KSG with the sort": lambda x=x, y=y: estimate_ksg(x, y, threads=1),
            "Ross": lambda x=x, labels=labels: estimate_ross(x, labels, threads=1),
        }
        for _ in range(200):
            for name, function in run_options.items():
                took = cpu_seconds(function)[0] / slices
                least[samples, name] = min(took, least.get((samples, name), took))
        cells = [
            f"{n} {1e6 * least[samples, n]:.0f} ({least[samples, n] / least[samples, 'argsort']:.1f})"
            for n in run_options
        ]
        print(f"  N = {samples}: " + ", ".join(cells), flush=True)
    growth = np.log(least[8192, "KSG, x sorted once"] / least[1024, "KSG, x sorted once"]) / np.log(8)
    print(f"  growth from 1,024 to 8,192: N ** {growth:.2f}")


def prepare_resnet20(real):
    images, labels = real.cifar10("train")
    data = images[:SAMPLES], labels[:SAMPLES]
    prepared = infoq_fx.prepare(real.cifar_resnet20(), data)
    return prepared, read_data(data).named(prepared.input_names)


def run_resnet20(real):
    prepared, data = prepare_resnet20(real)
    sites = [site for site in prepared.inventory.sites if site.is_searched and len(site.bits) > 1]
    runs = sum(len(site.bits) for site in sites)
    forward_seconds, run = [], InformationMeasure._run

    def timed(self, *arguments):
        took, records = cpu_seconds(run, self, *arguments)
        forward_seconds.append(took)
        return records

    InformationMeasure._run = timed
    criterion = infoq_fx.InfoQPaper(slices=SLICES)
    with one_torch_thread():
        criterion.begin(prepared, data.take(64), batch_size=64, run_options=RunOptions())  # kernels compiled or loaded
    ours, _ = cpu_seconds(measure_sensitivity, prepared, data, criterion, Resources(progress=False))
    InformationMeasure._run = run
    module_pass, seen = cpu_seconds(run_whole, prepared, data)
    interpreter_pass, _ = cpu_seconds(run_whole_in_interpreter, prepared, data)
    estimates = estimate_with_scikit_learn(prepared, data, seen)
    theirs = runs * (module_pass + estimates)
    forward = sum(forward_seconds)
    print(f"ResNet-20, {runs} bit-widths, {SAMPLES} images, {SLICES} slices, default observers, CPU seconds")
    print(f"  straightforward {theirs:.0f}: {runs} x ({module_pass:.2f} forward + {estimates:.1f} scikit-learn)")
    print(
        f"  infoq_fx {ours:.0f}: forward {forward:.0f}, the rest {ours - forward:.0f}; {theirs / ours:.1f} times less"
    )
    print(
        f"  forward: {runs * module_pass / forward:.1f} times less than whole passes of the module, "
        f"{runs * interpreter_pass / forward:.2f} times less than whole passes with the same kernels"
    )


def run_whole(prepared, data):
    """Run the whole prepared module with hooks at the observers, and return pooled values by observer."""
    observers, seen = choose_default_observers(prepared), {}
    handles = [
        prepared.graph_module.get_submodule(str(node.target)).register_forward_hook(
            lambda module, args, out, observer=observer, node=node: seen.setdefault(observer, []).append(
                pool_features(out, node)
            )
        )
        for observer, node in observers.items()
    ]
    with torch.no_grad():
        for batch in data.batches(64):
            prepared.graph_module(*batch.values())
    for handle in handles:
        handle.remove()
    return {observer: torch.cat(values).numpy() for observer, values in seen.items()}


def run_whole_in_interpreter(prepared, data):
    with one_torch_thread():
        integers, output = find_integer_nodes(prepared), read_nodes(prepared)[0]
        interpreter, plan = SiteInterpreter(prepared, integers), plan_whole_run(prepared, [output], integers)
        for batch in data.batches(choose_batch_size(prepared)):
            interpreter.run_plan(plan, {}, inputs=batch)


def estimate_with_scikit_learn(prepared, data, seen, sample=4):
    """CPU seconds for all observers and slices of one run, from a sample of slices.

    Observers that are not downstream of a site are not estimated for it: the mean over sites is taken.
    """
    from sklearn.feature_selection import mutual_info_classif, mutual_info_regression  # the memory is measured without

    features, total = np.random.default_rng(0).standard_normal((SAMPLES, sample)), 0.0
    sites = [site for site in prepared.inventory.sites if site.is_searched and len(site.bits) > 1]
    order = {node: index for index, node in enumerate(prepared.graph_module.graph.nodes)}
    quantizers = {module.site.name: node for node, module in prepared.quantizer_nodes()}
    layers = {site.name: min(order[user] for user in quantizers[site.name].users) for site in sites}
    for observer, node in choose_default_observers(prepared).items():
        share = sum(layers[site.name] < order[node] for site in sites) / len(sites)
        projected = seen[observer] @ unit_projections(seen[observer].shape[1], sample, 0)
        for column, x in zip(projected.T, features.T, strict=True):
            if observer.measure == "task":
                took, _ = cpu_seconds(
                    lambda c=column: mutual_info_classif(c[:, None], data.labels.numpy(), discrete_features=False)
                )
            else:
                took, _ = cpu_seconds(lambda c=column, x=x: mutual_info_regression(x[:, None], c, n_neighbors=5))
            total += share * took * SLICES / sample
    return total


def run_tried(real):
    prepared, data = prepare_resnet20(real)
    data = data.take(256)
    with one_torch_thread():
        plan, interpreter = plan_whole_run(prepared, [read_nodes(prepared)[0]]), SiteInterpreter(prepared)
        batches = list(data.batches(64))

        def run_all():
            return torch.cat([interpreter.run_plan(plan, {}, inputs=b)[read_nodes(prepared)[0]] for b in batches])

        run_all()
        last, expected = cpu_seconds(run_all)
        integers = find_integer_nodes(prepared)
        interpreter, plan = (
            SiteInterpreter(prepared, integers),
            plan_whole_run(prepared, [read_nodes(prepared)[0]], integers),
        )
        run_all()
        whole, found = cpu_seconds(run_all)
        print(
            f"integers: {whole / last:.2f} times the CPU of float32 convolutions in the forward pass, values "
            f"{'equal' if torch.equal(found, expected) else 'NOT equal'} ({len(integers)} nodes)"
        )
        interpreter, plan = SiteInterpreter(prepared), plan_whole_run(prepared, [read_nodes(prepared)[0]])
        import infoq_fx.runtime.interpreter as module

        module._channels_last = lambda x: x.contiguous()
        interpreter = SiteInterpreter(prepared)
        run_all()
        first, _ = cpu_seconds(run_all)
        print(f"channels_last: without it {first / last:.2f} times the CPU in the forward pass")
        module._channels_last = lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
        interpreter = SiteInterpreter(prepared)
        with torch.autocast("cpu", torch.bfloat16):
            run_all()
            narrow, found = cpu_seconds(run_all)
    error = float((found.float() - expected).abs().mean() / expected.std())
    print(
        f"bf16: {narrow / last:.2f} times the CPU of float32, logits off by {error:.1%} of their deviation on average"
    )


def run_memory(real):
    """Peak memory of scoring MobileNetV2 in a process of its own; six sites, since it does not grow with them.

    The images are decoded by another process into a file and mapped, so that the decoder's memory is not counted.
    """
    with tempfile.TemporaryDirectory() as folder:
        for step in ("write_images", "score_mobilenet_v2"):
            code = f"import sys; sys.path.insert(0, sys.argv[1]); import scoring; scoring.{step}(sys.argv[2])"
            subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), folder], check=True)


def write_images(folder):
    real = load_real_models()
    images, labels = real.imagenet_sample(range(1000))
    np.save(Path(folder) / "images.npy", images.numpy())
    np.save(Path(folder) / "labels.npy", labels.numpy())
    prepared = infoq_fx.prepare(real.imagenet_mobilenet_v2(), images[:8], activation_bits=(2, 8))
    pinned = []
    for kind in ("weight", "activation"):
        names = [site.name for site in prepared.inventory.sites if site.kind == kind and site.is_searched]
        kept = names[:: len(names) // 2]  # the first, the middle, the last
        pinned += [name for name in names if name not in kept]
    (Path(folder) / "pinned.txt").write_text("\n".join(pinned))


def score_mobilenet_v2(folder):
    """Score three weight and three activation sites at all bit-widths: in the first, the middle and the last layer."""
    model = load_real_models().imagenet_mobilenet_v2()
    images, labels = np.load(Path(folder) / "images.npy", mmap_mode="c"), np.load(Path(folder) / "labels.npy")
    data = read_data((torch.from_numpy(images), torch.from_numpy(labels)))
    pin = dict.fromkeys((Path(folder) / "pinned.txt").read_text().split(), 8)
    prepared = infoq_fx.prepare(model, data, activation_bits=(2, 3, 4, 5, 6, 7, 8), pin=pin)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    table = infoq_fx.score(prepared, data, criterion=infoq_fx.InfoQPaper(slices=SLICES), progress=False)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"MobileNetV2, 224 pixels, {data.samples} images, {SLICES} slices, {len(table.scores)} sites of both kinds at "
        f"2 to 8 bits: peak resident memory {after:.0f} MiB ({before:.0f} MiB before scoring)"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["kernel", "resnet20", "tried", "memory"])
    parser.add_argument("--float", action="store_true", help="as on a processor without exact 8-bit products")
    arguments = parser.parse_args()
    parts = arguments.parts
    if arguments.float:
        integer_convolution.can_convolve_integers = lambda: False
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if "kernel" in parts:
        run_kernel()
    real = load_real_models() if set(parts) - {"kernel"} else None
    for name, run in (("resnet20", run_resnet20), ("tried", run_tried), ("memory", run_memory)):
        if name in parts:
            run(real)


if __name__ == "__main__":
    main()

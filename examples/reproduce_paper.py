"""Reproduce the paper's figures and tables on small models.

Run it:  python examples/reproduce_paper.py                      a small network on handwritten digits, half a minute
         python examples/reproduce_paper.py --model resnet20     a pretrained model, if available (see --models-file)
         python examples/reproduce_paper.py --full               the protocol for ImageNet; --imagenet PATH runs it

Figures (PNG) and tables (CSV and Markdown) are written to the folder --out. Scores are kept there too, so that an
interrupted run resumes. Needs matplotlib: pip install "infoq-fx[plots]".
"""

import argparse
import csv
import importlib.util
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torchvision
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.utils.data import DataLoader, Subset

import infoq_fx
from infoq_fx import CRITERIA, Allocation, Budget, InfoQPaper
from infoq_fx.core.data import CalibrationData, read_data
from infoq_fx.demo import digits, train_digits_net
from infoq_fx.quantization.prepared import PreparedModel as Prepared
from infoq_fx.scoring.sensitivity import Resources, measure_sensitivity

BITS = (2, 3, 4, 5, 6, 7, 8)  # the paper's candidates
MODELS_FILE = Path(__file__).parents[2] / "shared" / "data" / "real_models.py"
OURS = ("infoq", "infoq_paper")
CHEAP = (*OURS, "output_kl", "output_sqnr", "weight_mse", "eagl")
Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """A trained model, calibration and evaluation images, and the settings to try."""

    name: str
    model: torch.nn.Module
    calibration: CalibrationData
    evaluation: Batches
    budgets: tuple[float, ...]  # mean bits per weight
    tight: float  # a budget at which criteria differ
    bits: tuple[int, ...] = BITS
    slices: int = 256
    encoder: infoq_fx.scoring.information.encoders.Encoder | None = None
    image_counts: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    device: str = "cpu"


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's Tables 2 to 4, whose top-1 is after training with the bit-widths found."""

    table: str
    network: str
    budget: Budget
    activation_bits: int | tuple[int, ...]
    alpha: float
    images: int
    top1: float
    float_top1: float


PAPER = (
    PaperRow("Table 2", "resnet18", Budget(weight_bits=3.0), 8, 1.0, 4800, 70.94, 70.60),
    PaperRow("Table 2", "resnet18", Budget(bitops=23.04e9), BITS, 0.1, 4800, 69.99, 70.60),
    # BitOps of 3/4 bits, first and last layer 8/8, as counted by the methods compared in the table.
    PaperRow("Table 3", "resnet50", Budget(compression=12.2, bitops=55.31e9), BITS, 2.0, 6000, 77.03, 77.37),
    PaperRow("Table 4", "mobilenet_v2", Budget(compression=14.0), 8, 1.0, 1024, 69.83, 72.02),
)

# What a criterion looks at, whether it trains, its forward and backward passes, and its use of labels.
GLOBAL, LOCAL, GUESSED = "whole network", "the layer only", "its own predictions without"
FACTS = {
    "infoq": (GLOBAL, "no", "one per (layer, bits)", "none", "not used"),
    "infoq_paper": (GLOBAL, "no", "one per (layer, bits)", "none", GUESSED),
    "eagl": (LOCAL, "no", "none", "none", "not used"),
    "weight_mse": (LOCAL, "no", "none", "none", "not used"),
    "output_sqnr": (GLOBAL, "no", "one per (layer, bits)", "none", "not used"),
    "output_kl": (GLOBAL, "no", "one per (layer, bits)", "none", "not used"),
    "loss": (GLOBAL, "no", "one per (layer, bits)", "none", GUESSED),
    "accuracy": (GLOBAL, "no", "one per (layer, bits)", "none", GUESSED),
    "hawq_v2": ("the layer's block of the Hessian", "no", "one", "probes x layers, of second order", GUESSED),
    "mpqco": ("the layer's block of the Hessian", "no", "one", "one per sample", GUESSED),
    "ompq": ("similarity of layers' outputs", "no", "one", "none", "not used"),
    "limpq": (LOCAL, "yes: its step sizes", "bits + 1 per step", "bits + 1 per step", GUESSED),
    "alps": (GLOBAL, "yes: each (layer, bits)", "steps per (layer, bits)", "steps per (layer, bits)", GUESSED),
    "clado": ("pairs of layers", "no", "one per pair of (layer, bits)", "none", "not used"),
}


def main(given: list[str] | None = None) -> None:
    arguments = read_arguments(given)
    out = Path(arguments.out)
    write_properties(out)
    if arguments.full:
        print(write_protocol(out))
        if arguments.imagenet is None:
            print("Add --imagenet PATH (a folder with train/ and val/) to run it; this takes hours with --device cuda.")
            return
    for case in load_cases(arguments):
        # A model with configurable quantizers: the paper lowers one layer at a time and leaves the others at 8 bits.
        print(f"\n{case.name}: float top-1 {evaluate(case, case.model)[0]:.1f} %, {case.calibration.samples} images")
        lab = Laboratory(case, out / case.name, arguments.cache_dir)
        prepared = lab.prepare()

        # 1. At which observer does the loss of information correlate best with the loss of accuracy?
        show_correlations(lab, prepared)
        # 2. Layers differ in sensitivity. These tables are the input of the integer program.
        tables = {name: lab.score(prepared, name) for name in dict.fromkeys((*OURS, *arguments.criteria))}
        show_profiles(lab, prepared, tables)
        # 3. The purpose of the scores: more accuracy at the same size, without training.
        show_sizes(lab, prepared, tables)
        # 4. How many images the scores need.
        show_image_counts(lab, prepared)
        # 5. The rows of the paper's tables, if the data is available.
        show_paper_rows(lab, [row for row in PAPER if arguments.imagenet and row.network == case.name])
    print(f"\nFigures and tables are in {out}")


class Laboratory:
    """A case with a folder for results, and scores that are computed only once."""

    def __init__(self, case: Case, folder: Path, cache_dir: str | None) -> None:
        self.case, self.folder = case, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.resources = Resources(cache_dir=cache_dir or folder / "scores", progress=sys.stderr.isatty())

    def prepare(self, images: int = sys.maxsize, activation_bits: int | tuple[int, ...] = 8) -> Prepared:
        """Prepare the model, calibrated with at most ``images`` images."""
        case, data = self.case, self.case.calibration.spread(images)
        return infoq_fx.prepare(case.model, data, bits=case.bits, activation_bits=activation_bits, device=case.device)

    def measure(self, prepared: Prepared, criterion: infoq_fx.Criterion, images: int = sys.maxsize) -> tuple:
        """Measure the table of a criterion with its measurements, from at most ``images`` images."""
        data = self.case.calibration.spread(images).named(prepared.input_names).to(self.case.device)
        return measure_sensitivity(prepared, data, criterion, self.resources)

    def score(self, prepared: Prepared, name: str, images: int = sys.maxsize) -> infoq_fx.SensitivityTable:
        """Compute the table of a criterion by name."""
        paper = InfoQPaper(slices=self.case.slices, encoder=self.case.encoder)
        return self.measure(prepared, paper if name == paper.name else CRITERIA[name](), images)[0]


def evaluate(case: Case, model: torch.nn.Module) -> tuple[float, float]:
    """Return the top-1 accuracy in percent and its standard error."""
    model = model.to(case.device).eval()
    with torch.no_grad():
        found = [model(images.to(case.device)).argmax(1).cpu() == labels for images, labels in case.evaluation]
    right = torch.cat(found).double()
    return 100 * float(right.mean()), 100 * float(right.std()) / math.sqrt(len(right))


def show_correlations(lab: Laboratory, prepared: Prepared) -> None:
    """Figure 1: correlation of SMI at every observer with accuracy, over every layer at every bit-width."""
    criterion = InfoQPaper(observers="auto", slices=lab.case.slices, encoder=lab.case.encoder)
    measurements = [m for m in lab.measure(prepared, criterion)[1] if m.bits < 8]
    found = criterion.correlations(measurements)
    low = criterion.correlations([m for m in measurements if m.bits <= 4])
    order = {node: index for index, node in enumerate(prepared.graph_module.graph.nodes)}
    depth = {name: order[node] for name, node in prepared.observer_nodes().items()}
    rows, best = [], {}
    for key in sorted(found, key=lambda key: depth[key.partition(":")[2]]):
        measure, _, place = key.partition(":")
        runs = [m for m in measurements if f"{key}:change" in m.values]
        row = {"information": measure, "place": place, "runs upstream": len(runs)}
        rows.append(row | {"r": found[key], "r, 2 to 4 bits": low.get(key, math.nan)})
        # Observers with fewer than five layers upstream are excluded, since a few points correlate by chance.
        if len({m.site for m in runs}) >= 5 and found[key] > found.get(best.get(measure), -1):
            best[measure] = key
    if not best:
        print("  Figure 1: no single layer loses accuracy on these images; use more of them")
        return
    write_table(lab.folder, "figure1_correlations", rows)
    chosen = {best[measure]: found[best[measure]] for measure in ("task", "input") if measure in best}
    for key, r in chosen.items():
        print(f"  Figure 1: {key.replace(':', ' information correlates best with accuracy at ')}, r = {r:.2f}")
    draw_correlations(lab, rows, chosen, measurements)


def draw_correlations(lab: Laboratory, rows: list[dict], best: dict[str, float], measurements: list) -> None:
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    bars, *panels = figure.subplots(1, 1 + len(best), width_ratios=(1.7, *(1 for _ in best)))
    places = list(dict.fromkeys(row["place"] for row in rows))
    for measure, shift, colour in (("task", -0.2, "tab:orange"), ("input", 0.2, "tab:blue")):
        mine = [row for row in rows if row["information"] == measure]
        positions = [places.index(row["place"]) + shift for row in mine]
        bars.bar(positions, [row["r"] for row in mine], 0.4, color=colour, label=f"{measure} information")
    bars.axhline(0.7, color="black", linewidth=0.8, linestyle="--", label="the paper's threshold, 0.70")
    bars.set_xticks(range(len(places)), places, rotation=90, fontsize=6 if len(places) > 25 else 8)
    bars.set(ylabel="Pearson r with the accuracy drop", title="every observer, input to output", xlim=(-1, len(places)))
    figure.legend(*bars.get_legend_handles_labels(), fontsize=8, loc="outside upper left", ncols=3)
    for panel, (key, r) in zip(panels, best.items(), strict=True):
        shown = [m for m in measurements if f"{key}:change" in m.values]
        x, y = ([m.values[name] for m in shown] for name in (f"{key}:change", "accuracy_drop"))
        dots = panel.scatter(x, y, c=[m.bits for m in shown], cmap="viridis", vmin=2, vmax=7, s=16)
        panel.locator_params(axis="x", nbins=4)
        panel.set(xlabel="change of SMI [nats]", ylabel="accuracy drop [points]")
        panel.set_title(f"{key.replace(':', ' information at ')}\nr = {r:.2f}", fontsize=10)
    figure.colorbar(dots, ax=panels[-1], label="bits")
    figure.savefig(lab.folder / "figure1_correlations.png", dpi=130)


def show_profiles(lab: Laboratory, prepared: Prepared, tables: dict[str, infoq_fx.SensitivityTable]) -> None:
    """Figure 2: sensitivity of every layer at every bit-width, with standard errors."""
    weights = [site.name for site in prepared.inventory.sites if site.kind == "weight"]
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    units = {"infoq_paper": "share of SMI / bits (Eq. 4)", "infoq": "information lost at the output [nats]"}
    rows = []
    for panel, (name, unit) in zip(figure.subplots(1, 2), units.items(), strict=True):
        scores, low_bits = tables[name].scores, [bits for bits in lab.case.bits if bits < 8]
        for index, bits in enumerate(low_bits):
            found = [scores[weight][bits] for weight in weights]
            y, errors = ([getattr(score, part) for score in found] for part in ("value", "standard_error"))
            x = np.arange(len(weights)) + 0.06 * index
            panel.errorbar(
                x, y, errors, label=f"{bits} bits", color=f"C{index}", marker="o", ms=3, lw=1, elinewidth=0.8
            )
            for weight, score in zip(weights, found, strict=True):
                row = {"criterion": name, "layer": weight.removesuffix(".weight"), "bits": bits}
                rows.append(row | {"score": score.value, "standard error": score.standard_error})
        values = [row["score"] for row in rows if row["criterion"] == name and row["score"] > 0]
        panel.locator_params(axis="x", integer=True)
        panel.set(yscale="log", ylim=(min(values) / 2, max(values) * 2), xlabel="layer", ylabel=unit, title=name)
        lowest = {weight: scores[weight][low_bits[0]].value for weight in weights}
        print(f"  Figure 2: most sensitive for {name}: {', '.join(sorted(lowest, key=lowest.get)[:-4:-1])}")
    panel.legend(fontsize=8, ncols=2)
    figure.savefig(lab.folder / "figure2_sensitivity.png", dpi=130)
    write_table(lab.folder, "figure2_sensitivity", rows)


def show_image_counts(lab: Laboratory, prepared: Prepared) -> None:
    """Figure 3: top-1 at one budget over the number of calibration images; ``prepared`` was calibrated with all."""
    most, rows = lab.case.calibration.samples, []
    for images in [most, *(count for count in lab.case.image_counts if count < most)]:
        if images < most:
            prepared = lab.prepare(images)
        for name in OURS:
            allocation = infoq_fx.allocate(lab.score(prepared, name, images), lab.case.tight)
            top1, error = evaluate(lab.case, infoq_fx.convert(prepared, allocation))
            rows.append({"criterion": name, "images": images, "top-1": top1, "standard error": error})
    rows.sort(key=lambda row: row["images"])
    write_table(lab.folder, "figure3_images", rows)
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    panel = figure.subplots()
    draw_lines(panel, rows, "images")
    panel.set_xscale("log", base=2)
    panel.set_xticks(sorted({row["images"] for row in rows}), sorted({row["images"] for row in rows}))
    panel.minorticks_off()
    panel.set(xlabel="calibration images", ylabel="top-1 [%]", title=f"a mean of {lab.case.tight:g} bits per weight")
    panel.legend()
    figure.savefig(lab.folder / "figure3_images.png", dpi=130)
    for images in sorted({row["images"] for row in rows}):
        found = {row["criterion"]: row["top-1"] for row in rows if row["images"] == images}
        print(f"  Figure 3: at {lab.case.tight:g} bits, {images} images: {by_name(found)}")


def show_sizes(lab: Laboratory, prepared: Prepared, tables: dict) -> None:
    """Figure 4, top: top-1 without training over the size of all weights, for criteria and uniform bit-widths."""
    allocations = [(name, infoq_fx.allocate(t, b)) for name, t in tables.items() for b in lab.case.budgets]
    rows = []
    for bits in set(lab.case.budgets) & set(lab.case.bits):
        uniform = {site.name: int(bits) if site.kind == "weight" else 8 for site in prepared.inventory.sites}
        allocations.append(("uniform", Allocation(bits=uniform)))
    for name, allocation in allocations:
        cost = infoq_fx.allocation.cost.measure_cost(prepared.inventory, allocation.bits)
        top1, error = evaluate(lab.case, infoq_fx.convert(prepared, allocation))
        row = {"criterion": name, "megabytes": cost.size_bytes / 1e6, "mean bits": cost.weight_bits}
        rows.append(row | {"compression": cost.compression, "top-1": top1, "standard error": error})
    write_table(lab.folder, "figure4_sizes", rows)
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    panel = figure.subplots()
    draw_lines(panel, rows, "megabytes")
    panel.axhline(evaluate(lab.case, lab.case.model)[0], color="black", linewidth=0.8, linestyle=":", label="float")
    panel.set(xlabel="model size [MB]", ylabel="top-1 without training [%]", title=lab.case.name)
    panel.legend(fontsize=8)
    figure.savefig(lab.folder / "figure4_sizes.png", dpi=130)
    low = {row["criterion"]: row["top-1"] for row in rows if row["mean bits"] <= lab.case.tight}
    print(f"  Figure 4: at {lab.case.tight:g} bits: {by_name(low)}")


def show_paper_rows(lab: Laboratory, rows: list[PaperRow]) -> None:
    """Tables 2 to 4 with the paper's budgets, without the training that the paper adds."""
    found = []
    for row in rows:
        prepared = lab.prepare(row.images, row.activation_bits)
        for name in OURS:
            table = lab.score(prepared, name, row.images)
            allocation = infoq_fx.allocate(table, row.budget, alpha=row.alpha)
            top1, error = evaluate(lab.case, infoq_fx.convert(prepared, allocation))
            line = {
                "table": row.table,
                "budget": str(row.budget),
                "criterion": name,
                "images": min(row.images, lab.case.calibration.samples),
            }
            line |= {"compression": allocation.cost.compression, "G BitOps": allocation.cost.bitops / 1e9}
            line |= {"top-1": top1, "standard error": error, "paper's after training": row.top1}
            found.append(line)
            print(f"  {row.table}: {row.budget}, {name}: {top1:.1f} %")
    if found:
        write_table(lab.folder, "tables_2_to_4", found)


def write_properties(out: Path) -> None:
    """Write Table 1 for this package; all criteria use the same integer program, so none of them searches."""
    rows = []
    for name, make in CRITERIA.items():
        criterion = make()
        looks_at, trains, forward, backward, labels = FACTS.get(name, ("?",) * 5)
        row = {"criterion": name, "looks at": looks_at, "trains": trains}
        row |= {"forward passes": forward, "backward passes": backward}
        row |= {"images": getattr(criterion, "samples", "all given") if criterion.needs_data else "none"}
        rows.append(row | {"labels": labels, "scores": " and ".join(f"{kind}s" for kind in criterion.kinds)})
    write_table(out, "table1_properties", rows)
    print(f"Table 1: {len(rows)} criteria, {sum(row['trains'] == 'no' for row in rows)} of them without training")


def write_protocol(out: Path) -> str:
    """Write the paper's experiments on ImageNet, and which of them can be compared with this package."""
    lines = [
        "# The paper's experiments on ImageNet",
        "",
        "1. Networks: torchvision's ResNet-18, ResNet-34, ResNet-50 and MobileNetV2 with weights IMAGENET1K_V1 (top-1",
        "   69.76, 73.31, 76.13, 71.88). The paper started from others, see the last column: compare *drops*.",
        "2. Calibration: training images evenly spread over the classes, with labels, transformed as for evaluation.",
        "3. X_E: `infoq_fx.load_dinov2()`, that is `InfoQPaper(encoder=...)`. It is downloaded.",
        "4. Evaluation: all 50,000 validation images.",
        "5. Figures 1 and 2: ResNet-50 and ResNet-18. The paper finds r = 0.95 at global pooling for task information.",
        "6. Figure 4, top: ResNet-18, 34 and 50 without training, down to about 3 bits (4.5 MB for ResNet-18), where",
        "   the paper's criterion leads others by up to 25 points. These results can be compared directly.",
        "7. Tables 2 to 4 are after training (LSQ) with the bit-widths found. This package does not train: its top-1",
        "   is the starting point of such a training. Budgets are the paper's:",
        "",
        "| table | network | budget | activation bits | alpha | images | paper: top-1 (float) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in PAPER:
        bits = row.activation_bits if isinstance(row.activation_bits, int) else "2 to 8"
        cells = (row.table, row.network, row.budget, bits, row.alpha, row.images, f"{row.top1} ({row.float_top1})")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    text = "\n".join(lines) + "\n"
    (out / "imagenet_protocol.md").write_text(text)
    return text


# ---- Files ----


def write_table(folder: Path, name: str, rows: list[dict]) -> None:
    """Write the rows as CSV in full precision, and as Markdown rounded."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")


def draw_lines(panel: Axes, rows: list[dict], x: str) -> None:
    """Draw top-1 with its standard error over a column, a line per criterion, the uniform allocation in black."""
    for index, name in enumerate(dict.fromkeys(row["criterion"] for row in rows)):
        mine = sorted((row for row in rows if row["criterion"] == name), key=lambda row: row[x])
        columns = ([row[key] for row in mine] for key in (x, "top-1", "standard error"))
        style = {"color": "black", "ls": "--", "marker": "s"} if name == "uniform" else {"color": f"C{index}"}
        panel.errorbar(*columns, label=name, **{"marker": "o", "ms": 4, "lw": 1.4, "elinewidth": 0.8} | style)


def by_name(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f} %" for name, value in values.items())


# ---- Models ----


def load_cases(arguments: argparse.Namespace) -> Iterable[Case]:
    if arguments.imagenet:
        for name in ("resnet18", "resnet34", "resnet50", "mobilenet_v2"):
            yield load_imagenet(name, Path(arguments.imagenet), arguments.images or 4800, arguments.device)
    elif arguments.model == "digits":
        images = arguments.images or 256
        (x, y), test = digits()
        model = train_digits_net(x[images:], y[images:], epochs=6)
        data = read_data((x[:images], y[:images]))
        yield Case("digits", model, data, [test], (2.5, 3, 4), 3, bits=(2, 3, 4, 8), slices=64, image_counts=(64,))
    else:
        yield load_real(arguments.model, Path(arguments.models_file), arguments.images or 1024)


def load_real(name: str, path: Path, images: int) -> Case:
    if not path.exists():
        sys.exit(f"{path} does not exist: give --models-file, or leave --model out for the built-in digits")
    spec = importlib.util.spec_from_file_location("real_models", path)
    real = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(real)
    if name == "mobilenet_v2":
        train, test = real.imagenet_sample(range(0, 1000, 2)), real.imagenet_sample(range(1, 1000, 2))
        model, budgets, tight = real.imagenet_mobilenet_v2(), (3.5, 4, 4.5, 5, 6), 4
    else:
        norm = (real.CIFAR_MEAN, real.CIFAR_STD) if name == "vit" else ()
        train, test = real.cifar10("train", *norm), real.cifar10("test", *norm)
        model = real.cifar_vit() if name == "vit" else real.cifar_resnet20()
        budgets, tight = (2.5, 3, 3.5, 4, 5), 3
    batches = list(zip(*(tensor.split(50) for tensor in test), strict=True))
    return Case(name, model, read_data(train).spread(images), batches, budgets, tight)


def load_imagenet(name: str, path: Path, images: int, device: str) -> Case:
    """Load a torchvision network, ``images`` of ``path/train`` evenly spread over classes, and all of ``path/val``."""
    weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    train, val = (torchvision.datasets.ImageFolder(path / part, weights.transforms()) for part in ("train", "val"))
    most = min(len(train), max(images, *(row.images for row in PAPER if row.network == name), 0))
    chosen = Subset(train, [index * len(train) // most for index in range(most)])
    data = read_data(DataLoader(chosen, batch_size=64, num_workers=4))
    evaluation = DataLoader(val, batch_size=64, num_workers=4)
    model = torchvision.models.get_model(name, weights=weights).eval()
    dinov2 = infoq_fx.load_dinov2()  # on the CPU, also if the network is not
    case = Case(name, model, data, evaluation, (2.5, 3, 3.5, 4, 5, 6), 3, device=device)
    return replace(case, encoder=lambda batch: dinov2(batch.cpu()))


def read_arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", choices=["digits", "resnet20", "mobilenet_v2", "vit"])
    parser.add_argument("--models-file", default=MODELS_FILE, help="Python file that loads the pretrained models")
    parser.add_argument("--images", type=int, help="number of calibration images; the default depends on the model")
    parser.add_argument("--criteria", nargs="+", default=CHEAP, choices=CRITERIA, metavar="NAME", help="for Figure 4")
    parser.add_argument("--out", default="reproduction", help="folder for figures and tables")
    parser.add_argument("--cache-dir", help="folder for scores; by default in the folder --out")
    parser.add_argument("--full", action="store_true", help="write the protocol for ImageNet")
    parser.add_argument("--imagenet", help="with --full: folder with train/ and val/ to run the protocol on")
    parser.add_argument("--device", default="cpu", help="for --imagenet: device of the computations")
    arguments = parser.parse_args(given)
    return arguments if arguments.full or not arguments.imagenet else parser.error("--imagenet goes with --full")


if __name__ == "__main__":
    main()

"""Compare criteria on pretrained models: correlation, top-1 of their allocations, CPU time; means over seeds.

    python tests/benchmarks/audit.py [resnet20] [vit] [mobilenet_v2] [--seeds 3] [--criteria infoq hawq_v2 ...]
                                     [--references evolutionary differentiable] [--budgets 4 3 2.5]
                                     [--bits 2 3 4 5 6 8] [--recovery fast] [--cache-dir FOLDER]

Needs the models and images next to the project (``../shared/data/real_models.py``). Weights are rounded to nearest
without recovery, unless --recovery is given; activations are at 8 bits. The seed selects the calibration images: 1,024
of CIFAR-10's training images, or half of the 1,000 ImageNet images, of which the other half is for evaluation.
With --cache-dir an interrupted run resumes, and seeds and criteria can be added. Correlations are those of the first
seed. A second table has the divergence of the outputs on the evaluation samples in nats, and its ratio to that of
'infoq, refined' (geometric mean over budgets), which distinguishes allocations of equal top-1.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np

import infoq_fx

sys.path.insert(0, str(Path(__file__).parent))
from real_models import load_case, load_real_models

BUDGETS = (5.0, 4.0, 3.5, 3.0, 2.5)


def spread(values):
    """Mean and its standard error over the seeds."""
    return np.mean(values), np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def show(name, audits):
    first = audits[0]
    header = ["criterion", "r", "rank r", *first.budgets, "mean", "lead of 'infoq, refined'", "CPU s", "images"]
    print(f"\n{name}: float {np.mean([a.float_top1 for a in audits]):.1f}, {len(audits)} seeds")
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    best = "infoq, refined" if any(row.name == "infoq, refined" for row in first.rows) else first.recommended.name
    for index, row in enumerate(first.rows):
        rows = [audit.rows[index] for audit in audits]
        cells = [row.name]
        cells += ["-", "-"] if row.correlation is None else [f"{row.correlation:.2f}", f"{row.rank_correlation:.2f}"]
        for budget in first.budgets:
            found = [r.top1(budget) for r in rows]
            cells.append("-" if found[0] is None else "{:.1f} ± {:.1f}".format(*spread([t.value for t in found])))
        cells.append(f"{np.mean([r.mean_top1 for r in rows]):.1f}")
        leads = [np.mean([a.rows[index].hits[b].mean() for b in row.hits]) for a in audits]
        ours = [np.mean([r.hits[b].mean() for b in row.hits]) for a in audits for r in a.rows if r.name == best]
        cells.append("{:+.1f} ± {:.1f}".format(*spread([100 * (o - l) for o, l in zip(ours, leads, strict=True)])))
        cells.append("-" if row.cpu_seconds is None else f"{np.mean([r.cpu_seconds for r in rows]):.0f}")
        cells.append("-" if row.images is None else str(row.images))
        print("| " + " | ".join(cells) + " |", flush=True)
    show_nats(audits, best)


def show_nats(audits, best):
    first = audits[0]
    print(
        "\n| nats lost | "
        + " | ".join([*first.budgets, f"times {best!r}"])
        + " |\n|"
        + "---|" * (len(first.budgets) + 2)
    )
    ours = [next(row for row in audit.rows if row.name == best) for audit in audits]
    for index, row in enumerate(first.rows):
        rows = [audit.rows[index] for audit in audits]
        cells = [row.name]
        for budget in first.budgets:
            nats = [r.nats[budget].mean() for r in rows if budget in r.nats]
            cells.append("{:.3g} ± {:.1g}".format(*spread(nats)) if nats else "-")
        logs = [
            np.mean([np.log(r.nats[b].mean() / o.nats[b].mean()) for b in r.nats])
            for r, o in zip(rows, ours, strict=True)
        ]
        mean, error = spread(logs)
        cells.append(f"{math.exp(mean):.2f} ± {math.exp(mean) * error:.2f}")
        print("| " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["resnet20", "vit", "mobilenet_v2"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--criteria", nargs="+", default=list(infoq_fx.CRITERIA))
    parser.add_argument("--references", nargs="+", default=[], help="evolutionary, differentiable")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="mean weight bits")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 7, 8], help="candidate bit-widths")
    parser.add_argument("--recovery", default="none", help="none (weights rounded to nearest), fast or best")
    parser.add_argument("--cache-dir")
    arguments = parser.parse_args()
    real = load_real_models()
    for name in arguments.models:
        audits = []
        for seed in range(arguments.seeds):
            model, calibration, evaluation = load_case(real, name, seed)
            found = infoq_fx.audit(
                model,
                calibration,
                arguments.criteria,
                arguments.budgets,
                references=arguments.references,
                evaluation_data=evaluation,
                bits=arguments.bits,
                recovery=arguments.recovery,
                correlate=seed == 0 and arguments.recovery == "none",
                cache_dir=arguments.cache_dir,
                progress=False,
            )
            print(f"\n{name}, seed {seed}\n{found}", flush=True)
            audits.append(found)
        show(name, audits)


if __name__ == "__main__":
    main()

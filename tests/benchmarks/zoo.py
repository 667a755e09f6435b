"""Quantize one model of every family, for the README's table of models.

    python tests/benchmarks/zoo.py [NAME ...] [--out FILE]

Random weights, small random inputs, a mean of 4 bits, weights scored by their own error, no refinement and no
recovery: only the structure is tested. BERT and ViT need ``transformers``. With --out, finished rows are kept in a JSON
file, from which an interrupted run resumes.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from zoo_members import MEMBERS, run_member

from infoq_fx.errors import InfoqError

COLUMNS = ("model", "group", "sites", "mean bits", "integer convolutions", "integer products", "off", "default")


def make_row(name):
    """Return the results of a member, or the kind and the first words of its error."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = dataclasses.asdict(run_member(MEMBERS[name], Path(folder)))
        except InfoqError as error:
            found = {"error": f"{type(error).__name__}: {error}"}
    return {**found, "cpu_seconds": round(time.process_time() - start)}


def format_row(name, row):
    cells = [name, MEMBERS[name].group]
    if "error" in row:
        return f"| {' | '.join(cells)} | {row['error'][:160]} ... ||||||"
    off, default = row["differences"]
    cells += [str(row["sites"]), f"{row['weight_bits']:.2f}"]
    cells += [f"{made} of {there}" if there else "–" for made, there in (row["convolutions"], row["products"])]
    return f"| {' | '.join([*cells, f'{off:.0e}' if off else '0', f'{default:.0e}' if default else '0'])} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(MEMBERS), metavar="NAME")
    parser.add_argument("--out", type=Path, help="JSON file that keeps finished rows")
    arguments = parser.parse_args()
    rows = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for name in arguments.names:
        rows[name] = rows.get(name) or make_row(name)
        print(format_row(name, rows[name]), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

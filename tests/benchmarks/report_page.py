"""Measure the report page of a network of ResNet-50's size: bytes, build time, load time; and make README's pictures.

    python tests/benchmarks/report_page.py [--pictures docs/images]

54 weights with 7 bit-widths each, synthetic scores, 60 budgets for size and 60 for BitOps. Build times are CPU
seconds, child processes included, with and without the charts' JavaScript (built once per process). Load times are
seconds from navigation to the last chart, in a new context of a headless Chromium: the first of a fresh browser, and
the median of five. ``--pictures`` also trains the demo's network on digits, quantizes it and writes pictures of it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from allocation import timed
from browser import start_chromium
from tables import resnet50_sized_table

import infoq_fx
from infoq_fx.demo import digits, train_digits_net
from infoq_fx.report.page import _load_library
from infoq_fx.report.plots import plot_pareto

LOADS = 5


def load(browser, path, **options):
    """Open the page, and return it with the seconds until its last chart was drawn."""
    page = browser.new_context(**options).new_page()
    started = time.perf_counter()
    page.goto(path.resolve().as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    return page, time.perf_counter() - started


def make_pictures(browser, folder):
    (images, labels), (test_images, test_labels) = digits()
    model, calibration = train_digits_net(images, labels), (images[:512], labels[:512])
    quantized = infoq_fx.quantize(model, 3.0, calibration_data=calibration, progress=False)
    audit = infoq_fx.audit(
        model, calibration, ["infoq"], [5, 4, 3], evaluation_data=(test_images, test_labels), progress=False
    )
    path = folder / "report.html"
    infoq_fx.write_report(quantized, path, audit=audit, title="Digits: bit-widths under a budget")
    page, _ = load(browser, path, viewport={"width": 1100, "height": 1200})
    page.locator("details[open]").evaluate_all("found => found.forEach((each) => { each.open = false; })")
    page.screenshot(path=folder / "page.png", clip={"x": 0, "y": 0, "width": 1100, "height": 1130})
    path.unlink()
    own = infoq_fx.allocation_of(quantized)
    plot_pareto(audit.tables["infoq"], allocation=own).savefig(folder / "pareto.png", dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="write page.png and pareto.png there")
    options = parser.parse_args()
    table = resnet50_sized_table(0, activation_bits=(8,))
    _, library_seconds = timed(_load_library)
    with tempfile.TemporaryDirectory() as folder, start_chromium() as browser:
        path = Path(folder) / "report.html"
        _, seconds = timed(infoq_fx.write_report, table, path)
        loads = []
        for _ in range(LOADS + 1):
            page, seconds_to_load = load(browser, path)
            loads.append(seconds_to_load)
            page.context.close()
        print(f"{path.stat().st_size / 1e6:.2f} MB")
        print(f"built in {seconds:.1f} CPU s, and {library_seconds:.1f} once per process for the charts' JavaScript")
        print(f"loaded in {loads[0]:.2f} s by a fresh browser, then a median of {statistics.median(loads[1:]):.2f} s")
        if options.pictures is not None:
            make_pictures(browser, options.pictures)


if __name__ == "__main__":
    main()

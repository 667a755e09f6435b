"""Choose a budget from the curve: score once, look at all budgets, and measure a few of them.

Run it:  python examples/choose_a_budget.py

Scores show how much damage a budget does, in milliseconds per budget, but not in units of accuracy. Measuring the
accuracy takes a run per budget. So look at the curve of scores first, and measure around its knee.
"""

import tempfile
from pathlib import Path

import torch

import infoq_fx
from infoq_fx.demo import digits, train_digits_net

(images, labels), (test_images, test_labels) = digits()
model = train_digits_net(images, labels, epochs=6)
data = images[:256], labels[:256]


def top1(model):
    with torch.no_grad():
        return 100 * (model(test_images).argmax(1) == test_labels).double().mean().item()


# 1. Scoring is the slow step, and the only one that runs the model many times.
prepared = infoq_fx.prepare(model, data)
table = infoq_fx.score(prepared, data, progress=False)

# 2. The curve: the least score at every size. It is flat at many bits and steep at few.
budgets = (8.0, 6.0, 5.0, 4.0, 3.5, 3.0, 2.75, 2.5, 2.25)
curve = {bits: infoq_fx.allocate(table, bits) for bits in budgets}
for bits, allocation in curve.items():
    print(f"{bits:>5} bits  {allocation.cost.size_bytes:>7,} bytes  score {allocation.score:.3g}")

# 3. The knee: the fewest bits whose score is at most a hundredth of the largest score on the curve.
span = curve[budgets[-1]].score
knee = min(bits for bits, allocation in curve.items() if allocation.score <= 0.01 * span)
print(f"the knee is at {knee} bits; float top-1 {top1(model):.1f} %")

# 4. Measure at the knee and below, after recovery, as deployed; recovery moves the knee to fewer bits.
around = [bits for bits in budgets if bits <= knee][:2]
measured = {}
for bits in around:
    allocation = infoq_fx.refine(prepared, table, bits, data)
    recovered = infoq_fx.recover(prepared, allocation, data, progress=False)
    measured[f"{bits} bits"] = allocation, top1(infoq_fx.convert(recovered, allocation))
    print(f"{bits} bits: {measured[f'{bits} bits'][1]:.1f} %")

# 5. The same as a page with a slider over budgets, to share (``pip install "infoq-fx[report]"``).
try:
    with tempfile.TemporaryDirectory() as folder:
        page = infoq_fx.write_report(table, Path(folder) / "budgets.html", accuracies=measured)
        print(f"{page.name}: {page.stat().st_size:,} bytes")
except infoq_fx.InfoqError as error:
    print(error)

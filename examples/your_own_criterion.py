"""Define custom criteria, and compare them with a built-in one.

Run it:  python examples/your_own_criterion.py

A criterion measures how sensitive a site is to a bit-width. It is a function (prepared, data, site, bits) -> score;
smaller is less sensitive. The integer program minimizes the sum over the sites, so the unit of scores does not matter.
"""

import infoq_fx
from infoq_fx.demo import digits, train_digits_net
from infoq_fx.graph.float_interpreter import read_weights
from infoq_fx.runtime.forward import hold_outputs

(images, labels), (test_images, test_labels) = digits()
model = train_digits_net(images, labels, epochs=4)
data = images[:256], labels[:256]


# 1. From a run of the model: how much the margin of the top class shrinks with one site at a bit-width.
def margins(prepared, data, bits):
    (logits,) = hold_outputs(prepared, data, bits).tensors
    best = logits.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


baselines = {}  # by the number of samples: audit() scores with a part of them


def shrunken_margin(prepared, data, site, bits):
    """Return the mean decrease of the margin, in logits, from the model at 8 bits."""
    if data.samples not in baselines:
        baselines[data.samples] = margins(prepared, data, {})
    return float((baselines[data.samples] - margins(prepared, data, {site.name: bits})).clamp(min=0).mean())


# 2. From the weights only: FunctionCriterion declares that the function needs no data. With a version, which must
#    change with everything that affects the values, scores can be kept in a cache_dir.
def outliers(prepared, data, site, bits):
    """Return the largest weight over the standard deviation, divided by the number of levels."""
    _, _, weight = next(read_weights(prepared, [site]))
    return float(weight.abs().max() / weight.std()) / 2**bits


from_weights = infoq_fx.FunctionCriterion(outliers, version="1", needs_data=False, kinds=("weight",))

# 3. Pass a criterion in place of a name; its table works like any other.
prepared = infoq_fx.prepare(model, data, bits=(2, 3, 4, 8))
table = infoq_fx.score(prepared, data, criterion=shrunken_margin, progress=False)
print(infoq_fx.summarize(infoq_fx.allocate(table, 3.0), table.inventory))

# 4. Compare criteria on held-out samples, with the same integer program.
compared = infoq_fx.audit(
    model,
    data,
    ["infoq", shrunken_margin, from_weights],
    budgets=[3.0],
    evaluation_data=(test_images, test_labels),
    bits=(2, 3, 4, 8),
    progress=False,
)
print(compared)

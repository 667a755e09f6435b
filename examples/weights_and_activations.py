"""Weights and activations searched together, under two limits at once.

Run it:  python examples/weights_and_activations.py

A device often has two limits: flash for the weights, memory for the activations that are alive, or a number of
operations for a battery. A tuple for ``activation_bits`` searches them with the weights in one integer program.
"""

import torch

import infoq_fx
from infoq_fx.demo import digits, train_digits_net

(images, labels), (test_images, test_labels) = digits()
model = train_digits_net(images, labels, epochs=6)
data = images[:256], labels[:256]


def top1(quantized):
    with torch.no_grad():
        return 100 * (quantized(test_images).argmax(1) == test_labels).double().mean().item()


# 1. Candidates for both. Every activation that is searched gets a score of its own, as every weight does.
prepared = infoq_fx.prepare(model, data, bits=(2, 3, 4, 8), activation_bits=(4, 6, 8))
table = infoq_fx.score(prepared, data, progress=False)
print(f"float {top1(model):.1f} %")

# 2. BitOps couple the two: a layer costs its multiply-accumulates times the bits of its weight and its input. What all
#    at 4 and 6 bits would cost is one limit here, the bytes of weights at a mean of 4 bits the other.
macs = sum(operation.macs for operation in table.inventory.operations)
both = infoq_fx.Budget(weight_bits=4.0, bitops=4 * 6 * macs)
alone = infoq_fx.Budget(weight_bits=4.0)
for name, budget in (("weights alone", alone), ("weights and BitOps", both)):
    allocation = infoq_fx.refine(prepared, table, budget, data)
    recovered = infoq_fx.recover(prepared, allocation, data, progress=False)
    cost = allocation.cost
    print(
        f"{name}: {top1(infoq_fx.convert(recovered, allocation)):.1f} %, {cost.weight_bits:.2f} bits a weight, "
        f"{cost.bitops / 1e6:.1f} M BitOps, {cost.activation_bytes:,} bytes of activations"
    )

# 3. ``alpha`` leans the search to one side: above 1, scores of activations weigh more, and they keep more bits.
for alpha in (0.2, 1.0, 5.0):
    allocation = infoq_fx.allocate(table, both, alpha=alpha)
    print(f"alpha {alpha}: {allocation.cost.weight_bits:.2f} bits a weight, {allocation.cost.activation_bytes:,} bytes")

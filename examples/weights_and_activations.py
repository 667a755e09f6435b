"""Search weights and activations together, under two limits at once.

Run it:  python examples/weights_and_activations.py

A device often has two limits, for example flash memory for weights, and memory for activations or a number of
operations. A tuple for ``activation_bits`` searches activations together with weights in one integer program.
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


# 1. Candidates for both. Every searched activation is scored like every weight.
prepared = infoq_fx.prepare(model, data, bits=(2, 3, 4, 8), activation_bits=(4, 6, 8))
table = infoq_fx.score(prepared, data, progress=False)
print(f"float {top1(model):.1f} %")

# 2. BitOps couple the two: the cost of a layer is its multiply-accumulates times the bits of its weight and its input.
#    One limit here is the BitOps of 4 bits for all weights and 6 for all activations, the other a mean of 4 bits per
#    weight.
macs = sum(operation.macs for operation in table.inventory.operations)
both = infoq_fx.Budget(weight_bits=4.0, bitops=4 * 6 * macs)
alone = infoq_fx.Budget(weight_bits=4.0)
for name, budget in (("weights alone", alone), ("weights and BitOps", both)):
    allocation = infoq_fx.refine(prepared, table, budget, data)
    recovered = infoq_fx.recover(prepared, allocation, data, progress=False)
    cost = allocation.cost
    print(
        f"{name}: {top1(infoq_fx.convert(recovered, allocation)):.1f} %, {cost.weight_bits:.2f} bits per weight, "
        f"{cost.bitops / 1e6:.1f} M BitOps, {cost.activation_bytes:,} bytes of activations"
    )

# 3. ``alpha`` shifts the balance: above 1, activation scores count more and activations get more bits.
for alpha in (0.2, 1.0, 5.0):
    allocation = infoq_fx.allocate(table, both, alpha=alpha)
    print(
        f"alpha {alpha}: {allocation.cost.weight_bits:.2f} bits per weight, {allocation.cost.activation_bytes:,} bytes"
    )

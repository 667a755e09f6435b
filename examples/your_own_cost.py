"""Define a custom cost: latencies measured on a device, layer by layer, as a limit of the budget.

Run it:  python examples/your_own_cost.py

A cost is a function of one operation and the bits of its two operands; the cost of a model is the sum over its
operations. Register it in ``infoq_fx.COSTS`` under a name, and a budget can limit that name like any other cost.
"""

import infoq_fx
from infoq_fx.demo import digits, train_digits_net

(images, labels), _ = digits()
model = train_digits_net(images, labels, epochs=4)
data = images[:256], labels[:256]
prepared = infoq_fx.prepare(model, data, bits=(2, 3, 4, 6, 8))
table = infoq_fx.score(prepared, data, progress=False)

# 1. Latencies in microseconds, by layer and by bits of the weight. For a real device, benchmark every layer at every
#    bit-width and read the results from a file. This invented device has kernels for 4 and 8 bits, and first unpacks
#    other bit-widths to the next of these. So 3 bits are slower than 4: a cost can depend on the bits in any way.
latency_us = {
    operation.name: {
        8: 2 + operation.macs // 4_000,
        6: 3 + operation.macs // 3_500,
        4: 2 + operation.macs // 7_000,
        3: 3 + operation.macs // 6_000,
        2: 3 + operation.macs // 6_500,
    }
    for operation in table.inventory.operations
}


def latency(operation, left_bits, right_bits):
    """Return the latency of an operation; the left operand is the weight, the right one always has 8 bits."""
    return latency_us[operation.name][left_bits]


infoq_fx.COSTS["latency_us"] = latency

# 2. Custom limits are combined with the built-in ones. The optimum is exact, as with all limits.
slowest = sum(by_bits[6] for by_bits in latency_us.values())
print(f"all at 6 bits take {slowest} us, all at 4 bits {sum(by_bits[4] for by_bits in latency_us.values())} us")
for name, budget in (
    ("size alone", infoq_fx.Budget(weight_bits=4.0)),
    ("and latency", infoq_fx.Budget(weight_bits=4.0, costs={"latency_us": 0.6 * slowest})),
):
    allocation = infoq_fx.allocate(table, budget)
    bits = [allocation.bits[site.name] for site in table.inventory.sites if site.kind == "weight"]
    spent = sum(latency_us[op.name][allocation.bits[op.left]] for op in table.inventory.operations)
    print(f"{name}: bits {bits}, {spent} us, score {allocation.score:.3g}")

# 3. If a limit cannot be met, the message says what can.
try:
    infoq_fx.allocate(table, infoq_fx.Budget(costs={"latency_us": 10.0}))
except infoq_fx.InfeasibleBudgetError as error:
    print(error)

# 4. quantize() takes the same budget.
budget = infoq_fx.Budget(weight_bits=4.0, costs={"latency_us": 0.6 * slowest})
options = {"bits": (2, 3, 4, 6, 8), "recovery": "none", "progress": False}
quantized = infoq_fx.quantize(model, budget, calibration_data=data, **options)
print(f"quantized: {infoq_fx.allocation_of(quantized).cost.costs['latency_us']:.0f} us")

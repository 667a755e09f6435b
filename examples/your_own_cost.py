"""Limit the latency: measure every layer in onnxruntime, and use the result as a cost of your own.

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

# 1. Latencies of this machine, layer by layer, in integers and in float. The table can be measured on the device that
#    the model is for, and read here: infoq_fx.load_latency("latency.json").
measured = infoq_fx.measure_latency(prepared, target="onnxruntime", threads=1, runs=30)
measured.save("latency.json")
print(measured)
infoq_fx.COSTS["latency_ms"] = infoq_fx.load_latency("latency.json")

# 2. Custom limits are combined with the built-in ones. The optimum is exact, as with all limits. onnxruntime runs all
#    bit-widths up to 8 by the same kernels, so that a network in integers has one latency.
in_integers = sum(measured.integer_ms.values()) + measured.rest_ms
budget = infoq_fx.Budget(weight_bits=4.0, costs={"latency_ms": 1.01 * in_integers})
allocation = infoq_fx.allocate(table, budget)
print(f"within {budget}: {allocation.cost.costs['latency_ms']:.3f} ms, score {allocation.score:.3g}")

# 3. If a limit cannot be met, the message says what can.
try:
    infoq_fx.allocate(table, infoq_fx.Budget(costs={"latency_ms": 0.5 * in_integers}))
except infoq_fx.InfeasibleBudgetError as error:
    print(error)


# 4. Another device may have kernels for 4 and 8 bits, and first unpack other bit-widths to the next of these, so that
#    3 bits are slower than 4: a cost can depend on the bits in any way.
def latency_us(operation, left_bits, right_bits):
    """Return the latency of an operation; the left operand is the weight, the right one always has 8 bits."""
    macs_per_us = {8: 4_000, 6: 3_500, 4: 7_000, 3: 6_000, 2: 6_500}[left_bits]
    return (2 if left_bits in (4, 8) else 3) + operation.macs // macs_per_us


infoq_fx.COSTS["latency_us"] = latency_us
slowest = sum(latency_us(operation, 6, 8) for operation in table.inventory.operations)
for name, budget in (
    ("size alone", infoq_fx.Budget(weight_bits=4.0)),
    ("and latency", infoq_fx.Budget(weight_bits=4.0, costs={"latency_us": 0.6 * slowest})),
):
    allocation = infoq_fx.allocate(table, budget)
    bits = [allocation.bits[site.name] for site in table.inventory.sites if site.kind == "weight"]
    spent = sum(latency_us(op, allocation.bits[op.left], 8) for op in table.inventory.operations)
    print(f"{name}: bits {bits}, {spent} us, score {allocation.score:.3g}")

# 5. quantize() takes the same budget.
budget = infoq_fx.Budget(weight_bits=4.0, costs={"latency_us": 0.6 * slowest, "latency_ms": 1.01 * in_integers})
options = {"bits": (2, 3, 4, 6, 8), "recovery": "none", "progress": False}
quantized = infoq_fx.quantize(model, budget, calibration_data=data, **options)
print(f"quantized: {infoq_fx.allocation_of(quantized).cost.costs}")

"""Sensitivity tables without a network: by hand, and of ResNet-50's size."""

import math
import random
from collections.abc import Mapping

from infoq_fx.table import SensitivityTable
from infoq_fx.types import Inventory, Operation, QuantSite, Score

ALL_BITS = tuple(range(2, 9))


def weight(name: str, numel: int, bits: tuple[int, ...] = ALL_BITS) -> QuantSite:
    return QuantSite(name, "weight", (numel,), bits)


def activation(name: str, numel: int, bits: tuple[int, ...] = ALL_BITS) -> QuantSite:
    return QuantSite(name, "activation", (numel,), bits)


def make_table(
    sites: tuple[QuantSite, ...],
    scores: Mapping[str, Mapping[int, float]],
    operations: tuple[Operation, ...] = (),
    **inventory: int,
) -> SensitivityTable:
    return SensitivityTable(
        criterion="test",
        inventory=Inventory(sites, operations, **{"float_bytes": 0, **inventory}),
        scores={name: {b: Score(value, value / 10) for b, value in by.items()} for name, by in scores.items()},
    )


def resnet50_sized_table(seed: int, activation_bits: tuple[int, ...] = ALL_BITS) -> SensitivityTable:
    """ResNet-50's shapes: 54 weights and 50 activations, noisy scores that fall to a quarter every bit."""
    sites, operations = [activation("x0", 3 * 224**2, activation_bits)], []

    def add_conv(name: str, source: str, channels: tuple[int, int], kernel: int, width: int) -> None:
        numel = math.prod(channels) * kernel**2
        sites.append(QuantSite(name, "weight", (channels[1], numel // channels[1]), ALL_BITS, channel_axis=0))
        operations.append(Operation(name, numel * width**2, source, name))

    def add_activation(name: str, channels: int, width: int) -> str:
        sites.append(activation(name, channels * width**2, activation_bits))
        return name

    add_conv("conv1", "x0", (3, 64), 7, 112)
    source, inputs = add_activation("x1", 64, 56), 64
    for stage, (planes, blocks, width) in enumerate([(64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7)]):
        for block in range(blocks):
            name = f"layer{stage + 1}.{block}"
            add_conv(f"{name}.conv1", source, (inputs, planes), 1, width)
            middle = add_activation(f"{name}.relu1", planes, width)
            add_conv(f"{name}.conv2", middle, (planes, planes), 3, width)
            last = add_activation(f"{name}.relu2", planes, width)
            add_conv(f"{name}.conv3", last, (planes, 4 * planes), 1, width)
            if block == 0:
                add_conv(f"{name}.downsample", source, (inputs, 4 * planes), 1, width)
            source, inputs = add_activation(f"{name}.relu", 4 * planes, width), 4 * planes
    add_conv("fc", source, (2048, 1000), 1, 1)
    rng = random.Random(seed)
    scores = {}
    for site in (site for site in sites if len(site.bits) > 1):
        base = math.exp(rng.gauss(0, 1.2))
        scores[site.name] = {b: abs(base * (4.0 ** (2 - b) + rng.gauss(0, 0.01))) for b in site.bits}
    return make_table(tuple(sites), scores, tuple(operations), float_bytes=4 * 53_120)


SMALL = make_table(
    (weight("conv", 100), weight("fc", 300), activation("relu", 50, (4, 8)), activation("input", 10, (8,))),
    {
        "conv": {b: 8.0 * 4.0**-b for b in ALL_BITS},
        "fc": {b: 2.0 * 4.0**-b for b in ALL_BITS},
        "relu": {4: 0.5, 8: 0.25},
    },
    (Operation("conv", 1000, "input", "conv"), Operation("fc", 300, "relu", "fc")),
)

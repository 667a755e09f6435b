"""A differentiable search over bit-widths, as a reference for audits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from infoq_fx.allocation.cost import CostRow, build_cost_row
from infoq_fx.allocation.solver import allocate
from infoq_fx.core.data import CalibrationData
from infoq_fx.core.option_checks import check_count, check_rate
from infoq_fx.core.readings import Ignored, OutputLoss
from infoq_fx.core.threads import one_torch_thread
from infoq_fx.finetuning.trainable import copy_with, float_copy
from infoq_fx.graph.float_interpreter import read_weight
from infoq_fx.quantization.call_forms import flatten_tensors
from infoq_fx.quantization.numerics import dequantize, fake_quantize
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.quantization.quantizers import Quantizer
from infoq_fx.recovery.candidates import Candidates
from infoq_fx.runtime.forward import RunOptions, choose_batch_size, hold_float_outputs
from infoq_fx.runtime.held_outputs import make_loss
from infoq_fx.scoring.gradients import shuffled_batches, spread_samples, with_gradients
from infoq_fx.table import SensitivityTable
from infoq_fx.types import MAX_BITS, Budget, Inventory, Score

__all__ = ["DifferentiableSearch"]

_SAMPLES = 512
_LEAST_NATS = 1e-6
_LEAST_SLOPE = 1e-9
_FIRST_PRICE = 1.4  # per bit of the mean: rounding noise has the power 4^-b, and 2 log 2 is 1.4

_Shares = Mapping[tuple[str, int], Tensor]


@dataclass(frozen=True)
class DifferentiableSearch:
    """Bit-widths as real numbers, learned by gradient descent on the nats lost at the outputs.

    Between two candidates, a tensor is the mean of its two quantized versions, weighted by where the bit-width is
    between them; the loss is thus differentiable in the bit-widths. Weights are not trained. What is minimized is the
    logarithm of the loss plus a price for every relative excess over a limit; the prices rise while a limit is exceeded
    and fall while it is not. In the end, the integer program finds the best allocation within the budget by what was
    learned: the slope of the loss at the learned bit-width of every site, continued by the power 4^-b of rounding
    noise. Float (16 bits) is not searched.

    Cost: ``steps`` forward and backward passes of ``batch_size`` samples for each budget; no scores, no labels.

    Args:
        steps: updates.
        batch_size: samples per update; a graph with a fixed batch size uses that.
        learning_rate: of Adam, about the change of a bit-width in one step, in bits.
        seed: of the order of the samples.

    Reference:
        "FracBits: Mixed Precision Quantization via Fractional Bit-Widths", arXiv 2007.02017, Section 3; there with
        labels, together with the weights.
    """

    steps: int = 150
    batch_size: int = 32
    learning_rate: float = 0.05
    seed: int = 0
    name: ClassVar[str] = "differentiable"

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 1)
        check_count("batch_size", self.batch_size, 1)
        check_rate("learning_rate", self.learning_rate)

    def __call__(
        self, prepared: PreparedModel, data: CalibrationData, limits: Budget, candidates: Candidates | None
    ) -> dict[str, int]:
        """Return the bits of every site of the best allocation by what was learned."""
        chosen = spread_samples(self.name, prepared, data, _SAMPLES)
        with one_torch_thread() as threads:
            run_options = RunOptions(threads=threads if prepared.device.type == "cpu" else 1)
            if candidates is not None:
                prepared = candidates.round(prepared.inventory.sites, run_options)
            size = choose_batch_size(prepared)
            held = hold_float_outputs(prepared, chosen, batch_size=size, run_options=run_options)
            loss = make_loss(prepared, held)
        with with_gradients():
            widths = _Widths(prepared.inventory, limits)
            module = copy_with(prepared, _make_mixtures(prepared, widths))
            reference = float_copy(prepared)
            self._learn(prepared, module, reference, loss, chosen, widths, _read_rows(prepared.inventory, limits))
        scores = {site.name: dict.fromkeys(site.bits, Score(0.0)) for site in prepared.inventory.sites}
        for name, found in widths.bits().items():
            # Noise of the power 4^-b falls by 2 log 2 of itself per bit.
            lost = widths.slopes[name] / (2 * math.log(2))
            scores[name] = {b: Score(lost * 4.0 ** (found - b)) for b in scores[name]}
        table = SensitivityTable(criterion=self.name, inventory=prepared.inventory, scores=scores)
        return dict(allocate(table, limits).bits)

    def _learn(
        self,
        prepared: PreparedModel,
        module: fx.GraphModule,
        reference: fx.GraphModule,
        loss: OutputLoss,
        data: CalibrationData,
        widths: _Widths,
        rows: Sequence[CostRow],
    ) -> None:
        read = [index for index, reading in enumerate(prepared.readings) if not isinstance(reading, Ignored)]
        optimizer = torch.optim.Adam(widths.parameters(), lr=self.learning_rate, betas=(0.9, 0.99))
        prices = [_FIRST_PRICE * widths.mean_bits()] * len(rows)
        size = prepared.batch_size or min(self.batch_size, data.samples)
        batches = shuffled_batches(data.samples, size, torch.Generator().manual_seed(self.seed))
        for _ in range(self.steps):
            inputs = data.select(next(batches)).inputs.values()
            with torch.no_grad():
                wanted = [flatten_tensors(reference(*inputs))[index] for index in read]
            found = [flatten_tensors(module(*inputs))[index] for index in read]
            excess = [_measure_excess(row, widths.shares()) for row in rows]
            nats = loss(wanted, found).mean().clamp_min(_LEAST_NATS)
            optimizer.zero_grad()
            nats.log().backward()
            widths.keep_slopes()
            sum(price * over for price, over in zip(prices, excess, strict=True)).backward()  # type: ignore[union-attr]
            optimizer.step()
            widths.clamp()
            prices = [max(0.0, price + float(over.detach())) for price, over in zip(prices, excess, strict=True)]


class _Widths(nn.Module):
    """A place among the candidates of every site, or tie: 0 for the fewest bits, 1 for the next, and so on."""

    def __init__(self, inventory: Inventory, limits: Budget) -> None:
        super().__init__()
        self.leaders = inventory.leaders
        self.choices = {
            site.name: tuple(b for b in site.bits if b <= MAX_BITS) or site.bits
            for site in inventory.sites
            if self.leaders[site.name] == site.name
        }
        self._index = {name: number for number, name in enumerate(self.choices)}
        self._most = torch.tensor([len(widths) - 1.0 for widths in self.choices.values()])
        # Half way between the fewest bits and the most that fit if all sites have the same share of their range.
        rows = _read_rows(inventory, limits)
        self.place = nn.Parameter(torch.zeros(len(self.choices)))
        low, high = 0.0, 1.0
        for _ in range(20):
            share = (low + high) / 2
            self.place.data = share * self._most
            is_over = any(float(_measure_excess(row, self.shares()).detach()) > 0 for row in rows)
            low, high = (low, share) if is_over else (share, high)
        self.place.data = low * self._most
        self._slopes = torch.zeros(len(self.choices))

    def shares(self) -> _Shares:
        """The weight of every candidate of every site; at most two of a site are above 0."""
        shares = {}
        for name, widths in self.choices.items():
            place = self.place[self._index[name]]
            for number, bits in enumerate(widths):
                shares[name, bits] = (1 - (place - number).abs()).clamp_min(0)
        return shares

    def at(self, site: str) -> tuple[int, int, Tensor]:
        """The two candidates that a site is between, and the weight of the second one."""
        name = self.leaders[site]
        widths, place = self.choices[name], self.place[self._index[name]]
        low = min(int(place.detach()), max(0, len(widths) - 2))
        return widths[low], widths[min(low + 1, len(widths) - 1)], place - low

    def bits(self) -> dict[str, float]:
        """The learned bit-widths, by the first site of every tie."""
        found = {}
        for name in self.choices:
            low, high, share = self.at(name)
            found[name] = low + (high - low) * float(share.detach())
        return found

    def keep_slopes(self) -> None:
        """Average the gradients of the loss over about the last 20 steps."""
        assert self.place.grad is not None
        self._slopes = 0.95 * self._slopes + 0.05 * self.place.grad

    @property
    def slopes(self) -> dict[str, float]:
        """How fast the loss falls with the bits of a site, per bit; at least a little."""
        found = {}
        for name, index in self._index.items():
            low, high, _ = self.at(name)
            found[name] = max(_LEAST_SLOPE, -float(self._slopes[index]) / max(1, high - low))
        return found

    def mean_bits(self) -> float:
        """The mean over sites with several candidates."""
        free = [bits for name, bits in self.bits().items() if len(self.choices[name]) > 1]
        return sum(free) / max(1, len(free))

    def clamp(self) -> None:
        """Keep all places within the candidates."""
        with torch.no_grad():
            self.place.copy_(torch.minimum(self.place.clamp_min(0), self._most))


class _MixedWeight(nn.Module):
    """A weight between two of its quantized versions; it ignores its input."""

    def __init__(self, site: str, versions: Mapping[int, Tensor], widths: _Widths) -> None:
        super().__init__()
        self._site, self._versions, self._widths = site, versions, (widths,)  # not a submodule

    def forward(self, x: Tensor) -> Tensor:
        """Return the weight; ``x`` is not read."""
        low, high, share = self._widths[0].at(self._site)
        first, second = self._versions[low], self._versions[high]
        return first + share * (second - first)


class _MixedActivation(nn.Module):
    """An activation between two of its quantized versions, with a straight-through gradient."""

    def __init__(self, quantizer: Quantizer, widths: _Widths) -> None:
        super().__init__()
        self._quantizer, self._widths = (quantizer,), (widths,)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean of two quantized versions of ``x``, of any shape."""
        quantizer = self._quantizer[0]
        low, high, share = self._widths[0].at(quantizer.site.name)
        with torch.no_grad():
            first, second = (fake_quantize(x, quantizer.qparams_at(bits)) for bits in (low, high))
        return x + (first - x).detach() + share * (second - first)


def _make_mixtures(prepared: PreparedModel, widths: _Widths) -> Callable[[Quantizer], nn.Module | None]:
    """What takes the place of every quantizer."""
    nodes = {quantizer.site.name: node for node, quantizer in prepared.quantizer_nodes()}

    def quantized(quantizer: Quantizer, bits: int) -> Tensor:
        rounded = prepared.rounded.get((quantizer.site.name, bits))
        if rounded is not None:
            return dequantize(rounded.q, rounded.qparams)
        return fake_quantize(read_weight(prepared, nodes[quantizer.site.name]), quantizer.qparams_at(bits)).detach()

    def make(quantizer: Quantizer) -> nn.Module | None:
        site = quantizer.site
        choices = widths.choices[widths.leaders[site.name]]
        if choices[-1] > MAX_BITS:
            return None
        if site.kind == "activation":
            return _MixedActivation(quantizer, widths)
        return _MixedWeight(site.name, {bits: quantized(quantizer, bits) for bits in choices}, widths)

    return make


def _read_rows(inventory: Inventory, limits: Budget) -> list[CostRow]:
    choices = {site.name: site.bits for site in inventory.sites if inventory.leaders[site.name] == site.name}
    return [build_cost_row(inventory, name, limit, choices) for name, limit in limits.limits.items()]


def _measure_excess(row: CostRow, shares: _Shares) -> Tensor:
    """The expected cost over the limit, less 1, with every site's candidates drawn by their shares."""
    total = torch.zeros(())
    for item, cost in row.linear.items():
        if item in shares:
            total = total + shares[item] * cost
    means: dict[str, Tensor] = {}
    for (name, bits), share in shares.items():
        means[name] = means.get(name, torch.zeros(())) + share * bits
    for (left, right), macs in row.pairs.items():
        total = total + macs * means[left] * means[right]
    for (left, right), products in row.products.items():
        for (a, b), cost in products.items():
            if (left, a) in shares and (right, b) in shares:
                total = total + cost * shares[left, a] * shares[right, b]
    return total / max(row.limit, 1) - 1

"""Block reconstruction: learns how to round each weight of a block from the block's output."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from infoq_fx.core.atomic_files import write_atomically
from infoq_fx.core.data import CalibrationData
from infoq_fx.core.option_checks import check_count, check_rate
from infoq_fx.core.threads import ThreadMap, thread_map
from infoq_fx.errors import OptionError
from infoq_fx.graph.layers import read_tensor
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.recovery.layerwise_runner import LayerwiseRunner, Reference, check_reference, choose_samples
from infoq_fx.recovery.parameters import fork, set_bias, set_parameter
from infoq_fx.recovery.segments import Segment, find_segments
from infoq_fx.recovery.step import StepContext
from infoq_fx.recovery.steps.adaround import SoftBlock, SoftWeight, begin_soft_block
from infoq_fx.runtime.digest import digest_run
from infoq_fx.runtime.integer_convolution import QuantizedTensor
from infoq_fx.runtime.value_sizes import measure_sizes

__all__ = ["BlockReconstruction"]

_SHARE = 5  # one in this many shards is held out
_SHARD = 8  # samples that run together; a step adds up the gradients of several such runs
_COPIES = 2  # of every value that a run with gradients keeps: of itself and of its gradient
_WARM_UP = 0.2
_FIRST_POWER, _LAST_POWER = 20.0, 2.0
_DECIDED = 0.02
_DRAWS = 2  # version of how the values that stay in float are drawn; part of the cache key


@dataclass(frozen=True)
class BlockReconstruction:
    r"""Learns which of two integers each weight is rounded to, block after block, so that each block's output fits.

    A block is the part of the graph between two places where few values are alive: a residual block, a bottleneck, an
    attention or feed-forward block, a single layer. Its input comes from the blocks already quantized, and it learns
    the reference's output by minimising::

        mean (z - z_reference)^2 w / (the same before learning) + strength * mean (1 - |2 h - 1|^p)

    h in 0..1 is the share of the upper of the two integers, a stretched sigmoid of one logit per weight; p falls from
    20 to 2 and drives all h to 0 or 1. The two integers are the one that the weight is rounded to when the step begins
    (by second-order rounding, if that came before) and the next one on the side of the float weight. Biases are
    learned too. A share ``drop`` of the activation values inside the block stays in float during learning. With
    ``fisher``, w weights each channel of each sample by the mean squared gradient of the log-likelihood of a class
    drawn from the float model's own outputs; else it is 1. Every fifth part of the samples is held out. Of the block
    as it was, with learned biases, and with learned weights and biases, the one of least error on these is kept. A
    block whose weights are all decided stops early.

    After second-order rounding, few epochs change little: its integers are a local optimum, and it takes hundreds of
    updates before others are better.

    Cost: ``epochs`` forward and backward passes over ``samples`` of the model, in float32; no labels. With a
    ``cache_dir`` every finished block is kept, and an interrupted run resumes after it.

    Reference:
        Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv 2004.10568, Eq. 21 to 25;
        Li et al., "BRECQ", arXiv 2102.05426, Eq. 10 (blocks, Fisher); Wei et al., "QDrop", arXiv 2203.05740, Eq. 8.

    Args:
        epochs: passes over the samples, for each block.
        samples: largest number of samples, spread over the data.
        batch_size: samples per update.
        learning_rate: of Adam, for the logits; for biases a tenth of it, in units of their mean absolute value.
        strength: of the second term.
        drop: share of activation values that stay in float.
        fisher: whether outputs are weighted.
        seed: of the order of batches and of the values that stay in float.
        reference: ``"float_weights"`` or ``"float_model"``, whose outputs are learned, as in
            :class:`infoq_fx.recovery.SecondOrderRounding`.

    Raises:
        OptionError: an option is out of range.
    """

    epochs: int = 20
    samples: int = 1024
    batch_size: int = 32
    learning_rate: float = 0.01
    strength: float = 0.1
    drop: float = 0.5
    fisher: bool = False
    seed: int = 0
    reference: Reference = "float_weights"

    def __post_init__(self) -> None:
        for option in ("epochs", "samples", "batch_size"):
            check_count(option, getattr(self, option), 1)
        for option in ("learning_rate", "strength"):
            check_rate(option, getattr(self, option))
        if not 0 <= self.drop < 1:
            raise OptionError(f"drop={self.drop}; give a share from 0 to below 1")
        check_reference(self.reference)

    @property
    def name(self) -> str:
        """``"block_reconstruction"``."""
        return "block_reconstruction"

    def recover(
        self, prepared: PreparedModel, bits: Mapping[str, int], data: CalibrationData, context: StepContext
    ) -> PreparedModel:
        """See :class:`infoq_fx.recovery.RecoveryStep`."""
        changed, chosen = fork(prepared), choose_samples(prepared, data, self.samples)
        shard = prepared.batch_size or min(_SHARD, self.batch_size)
        folder = _open_folder(self, prepared, bits, chosen, context.cache_dir, shard)
        part = prepared.batch_size or _choose_part(prepared, shard, context.run_options.gradient_bytes, self.fisher)
        runner = LayerwiseRunner(changed, bits, chosen, replace(context, batch_size=part), reference=self.reference)
        weighing = _fisher_weights(runner, self.seed) if self.fisher else {}
        share = 1 / sum(bool(segment.layers) for segment in runner.segments)
        with thread_map(context.run_options.threads, context.run_options.stop) as spread:
            for index, segment in enumerate(runner.segments):
                path = None if folder is None else folder / f"block-{index}.pt"
                if segment.layers and not _load(changed, path):
                    runner.advance_reference(segment)
                    block = _Block(runner, segment, weighing, shard // part)
                    block.learn(self, max(1, self.batch_size // shard), self.seed + index, context, share, spread)
                    _store(changed, segment, path)
                elif segment.layers:
                    context.run_options.advance(share)
                runner.advance(segment)
        return changed


@dataclass(frozen=True)
class _Block:
    """A block whose inputs the runner's quantized model holds, and its wanted outputs the reference, by batch.

    A shard are the samples of ``parts`` batches, which run one after the other where memory is short: what is drawn for
    a shard, and the mean over it, are the same.
    """

    runner: LayerwiseRunner
    segment: Segment
    weighing: Mapping[fx.Node, Sequence[Tensor]]
    parts: int

    def learn(
        self,
        options: BlockReconstruction,
        shards: int,
        seed: int,
        context: StepContext,
        share: float,
        spread: ThreadMap,
    ) -> None:
        """Learn, and keep the rounded weights if they lower the error."""
        runner = self.runner
        weights, biases = begin_soft_block(runner.prepared, self.segment, runner.bits)
        before = {path: read_tensor(runner.prepared.graph_module, path) for path in _paths(self.segment)}
        first = self._error(spread)
        self._descend(weights, biases, first, options, shards, seed, context, share, spread)
        learned = {soft.layer.weight: soft.rounded() for soft in weights.values()}
        offsets_learned = self._round_biases(biases)
        self._keep_best([before, before | offsets_learned, before | learned | offsets_learned], first, spread)

    def _descend(
        self,
        weights: Mapping[str, SoftWeight],
        biases: Mapping[str, nn.Parameter],
        first: float,
        options: BlockReconstruction,
        shards: int,
        seed: int,
        context: StepContext,
        share: float,
        spread: ThreadMap,
    ) -> None:
        """Run Adam on logits and biases until all weights are decided or the epochs are over."""
        leaves = [*(soft.logit for soft in weights.values()), *biases.values()]
        optimizer = _make_optimizer(weights, biases, options.learning_rate)
        block = SoftBlock(self.runner.prepared, self.runner.bits, weights, biases, options.drop)
        generator = torch.Generator().manual_seed(seed)

        def run(job: tuple[int, int]) -> list[Tensor]:
            index, seed = job
            with torch.inference_mode(False), torch.enable_grad():
                loss = self._loss(block.draw(seed, index % self.parts * self._size, self._samples(index)), index)
                return list(torch.autograd.grad(loss / first, leaves))

        learned_from = self._shards(is_held_back=False)
        total, done = options.epochs * -(-len(learned_from) // shards), 0
        for _ in range(options.epochs):
            order = [learned_from[i] for i in torch.randperm(len(learned_from), generator=generator).tolist()]
            for start in range(0, len(order), shards):
                seeds = torch.randint(1 << 62, (shards,), generator=generator).tolist()
                taken = order[start : start + shards]
                jobs = [(i, seed) for shard, seed in zip(taken, seeds, strict=False) for i in self._batches(shard)]
                _set_gradients(leaves, spread(run, jobs), len(taken))
                _add_regularizer(list(weights.values()), options.strength, done / total)
                optimizer.step()
                done += 1
                context.run_options.advance(share / total)
            if done > _WARM_UP * total and all(_is_decided(soft) for soft in weights.values()):
                context.run_options.advance(share * (1 - done / total))
                break

    def _round_biases(self, biases: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Round biases as conversion does; see :func:`set_bias`."""
        for layer in self.segment.layers:
            if layer.bias is not None:
                set_bias(self.runner.prepared, layer, biases[layer.bias].detach(), self.runner.bits)
        return {path: read_tensor(self.runner.prepared.graph_module, path) for path in biases}

    def _keep_best(self, candidates: Sequence[Mapping[str, Tensor]], first: float, spread: ThreadMap) -> None:
        """Set the parameters of least error; the first candidate is the original one, with error ``first``."""
        errors = [first]
        for candidate in candidates[1:]:
            self._put(candidate)
            errors.append(self._error(spread))
        best = min(range(len(errors)), key=lambda index: errors[index])
        self._put(candidates[best])
        names = ", ".join(layer.site.name for layer in self.segment.layers)
        shares = ", ".join(f"{error / first:.3g}" for error in errors[1:])
        logging.getLogger(__name__).debug("%s: biases learned, weights too: %s of the error", names, shares)

    def _put(self, values: Mapping[str, Tensor]) -> None:
        for path, value in values.items():
            set_parameter(self.runner.prepared, path, value)

    @property
    def _size(self) -> int:
        """Samples of a batch; the last one may have fewer."""
        return self.runner.batch_samples[0]

    def _samples(self, index: int) -> int:
        return self.runner.batch_samples[index]

    def _batches(self, shard: int) -> list[int]:
        """The batches of a shard."""
        return list(range(shard * self.parts, min((shard + 1) * self.parts, len(self.runner.batch_samples))))

    def _shards(self, *, is_held_back: bool) -> list[int]:
        """Every fifth shard is held out; if there are fewer than five, all are used for both."""
        count = -(-len(self.runner.batch_samples) // self.parts)
        return [i for i in range(count) if count < _SHARE or (i % _SHARE == _SHARE - 1) == is_held_back]

    def _error(self, spread: ThreadMap) -> float:
        """Mean weighted squared error of the block with its current parameters, on the held-out shards."""
        block = SoftBlock(self.runner.prepared, self.runner.bits, {}, {}, 0.0)

        def run(index: int) -> float:
            with torch.inference_mode(False), torch.no_grad():
                return float(self._loss(block.fork(), index))

        held_back = self._shards(is_held_back=True)
        return sum(spread(run, [i for shard in held_back for i in self._batches(shard)])) / len(held_back) + 1e-20

    def _loss(self, block: SoftBlock, index: int) -> Tensor:
        """The part of a batch in the mean squared error of its shard."""
        segment, runner = self.segment, self.runner
        known = {n: _usable(x) for n, x in runner.quantized.read(index, segment.entering).items()}
        values = block.compute([*segment.constants, *segment.nodes], known)
        wanted = runner.reference.read(index, segment.outputs)
        parts = []
        for node in segment.outputs:
            square = (values[node] - wanted[node]) ** 2
            parts.append((square * self.weighing[node][index] if node in self.weighing else square).mean())
        shard = self._batches(index // self.parts)
        return torch.stack(parts).sum() * (self._samples(index) / sum(self._samples(i) for i in shard))


def _usable(x: Any) -> Any:
    """A value that may be saved for a backward pass, as copies of inference tensors may."""
    if isinstance(x, QuantizedTensor):
        return x.dequantize()
    return x.clone() if isinstance(x, Tensor) else x


def _choose_part(prepared: PreparedModel, shard: int, gradient_bytes: int, is_whole: bool) -> int:
    """Samples to run at once, a divisor of a shard: those whose values, kept for gradients, take ``gradient_bytes``.

    With gradients through the whole model (``is_whole``) all of its values are kept, else those of a block.
    """
    sizes = measure_sizes(prepared)
    segments = find_segments(prepared)
    totals = [sum(sizes.get(node, 0) for node in segment.nodes) for segment in segments]
    most = gradient_bytes // max(1, _COPIES * (sum(totals) if is_whole else max(totals)))
    return max(size for size in range(1, shard + 1) if shard % size == 0 and (size == 1 or size <= most))


def _make_optimizer(
    weights: Mapping[str, SoftWeight], biases: Mapping[str, Tensor], learning_rate: float
) -> torch.optim.Adam:
    groups: list[dict[str, Any]] = [{"params": [soft.logit for soft in weights.values()], "lr": learning_rate}]
    for bias in biases.values():
        groups.append({"params": [bias], "lr": 0.1 * learning_rate * float(bias.detach().abs().mean() + 1e-8)})
    return torch.optim.Adam(groups)


def _set_gradients(parameters: Sequence[Tensor], grads: Iterable[Sequence[Tensor]], shards: int) -> None:
    """Means over the shards, added in order."""
    total: list[Tensor] = []
    for found in grads:
        total = [a + b for a, b in zip(total, found, strict=True)] if total else list(found)
    for parameter, gradient in zip(parameters, total, strict=True):
        parameter.grad = gradient / shards


def _add_regularizer(weights: Sequence[SoftWeight], strength: float, progress: float) -> None:
    if progress < _WARM_UP:
        return
    left = (1 - progress) / (1 - _WARM_UP)
    power = _LAST_POWER + (_FIRST_POWER - _LAST_POWER) * left
    count = sum(soft.logit.numel() for soft in weights)
    with torch.inference_mode(False), torch.enable_grad():
        for soft in weights:
            term = (1 - (2 * soft.shares() - 1).abs() ** power).sum() * (strength / count)
            (gradient,) = torch.autograd.grad(term, [soft.logit])
            assert soft.logit.grad is not None
            soft.logit.grad += gradient


def _is_decided(soft: SoftWeight) -> bool:
    shares = soft.shares().detach()
    return bool((torch.minimum(shares, 1 - shares) < _DECIDED).all())


def _fisher_weights(runner: LayerwiseRunner, seed: int) -> dict[fx.Node, list[Tensor]]:
    """By output node of the segments and by batch: squared gradients of each sample and channel, 1 on average."""
    nodes = [node for segment in runner.segments for node in segment.outputs]
    found = runner.squared_gradients(nodes, lambda _, square: _mean_over_places(square), seed)
    counts = {n: sum(g.numel() for g in parts) for n, parts in found.items()}
    means = {
        n: (torch.stack([g.sum() for g in parts]).sum() / counts[n]).clamp_min(1e-30) for n, parts in found.items()
    }
    return {n: [g / means[n] for g in parts] for n, parts in found.items()}


def _mean_over_places(x: Tensor) -> Tensor:
    """Mean over all dimensions but samples and channels; channels are second in maps and last in tokens."""
    if x.ndim > 3:
        return x.mean(list(range(2, x.ndim)), keepdim=True)
    return x.mean(1, keepdim=True) if x.ndim == 3 else x


def _paths(segment: Segment) -> list[str]:
    return [path for layer in segment.layers for path in (layer.weight, layer.bias) if path is not None]


def _open_folder(
    options: BlockReconstruction,
    prepared: PreparedModel,
    bits: Mapping[str, int],
    data: CalibrationData,
    cache_dir: Path | None,
    batch_size: int,
) -> Path | None:
    """The folder of this step's finished blocks, named by a hash of everything that determines them."""
    if cache_dir is None:
        return None
    sites = {site.name: bits.get(site.name, site.baseline_bits) for site in prepared.inventory.sites}
    settings = {"step": options.name, **asdict(options), "bits": sites, "draws": _DRAWS}
    parts = [
        digest_run(model, data.take(0) if index else data, settings, batch_size=batch_size, bits=sites)
        for index, model in enumerate((prepared, prepared.origin or prepared))
    ]
    folder = cache_dir / f"{options.name}-{parts[0][:20]}{parts[1][:20]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"cannot write the cache {str(cache_dir)!r}: {error}; give another cache_dir") from error
    return folder


def _store(changed: PreparedModel, segment: Segment, path: Path | None) -> None:
    if path is None:
        return
    buffer = io.BytesIO()
    torch.save({target: read_tensor(changed.graph_module, target).cpu() for target in _paths(segment)}, buffer)
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise OptionError(f"cannot write {str(path)!r}: {error}; give another cache_dir") from error


def _load(changed: PreparedModel, path: Path | None) -> bool:
    """Set the parameters of a finished block, if there is one."""
    if path is None or not path.exists():
        return False
    try:
        kept = torch.load(path, weights_only=True)
        values = {target: kept[target].to(read_tensor(changed.graph_module, target)) for target in kept}
    except Exception as error:  # a file of any other kind
        logging.getLogger(__name__).warning("cannot use %s: %s; learning the block again", path, error)
        return False
    for target, value in values.items():
        set_parameter(changed, target, value)
    return True

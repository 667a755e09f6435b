"""Measures how quantizing one site changes the outputs; one kind of run that several criteria share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from infoq_fx.core.data import CalibrationData, read_classes
from infoq_fx.core.readings import Categorical, Encoded, OutputLoss, Reading, split_samples
from infoq_fx.core.threads import thread_map
from infoq_fx.errors import CalibrationDataError, OptionError
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.runtime.forward import RunOptions, hold_float_outputs, hold_outputs, run_perturbed
from infoq_fx.runtime.held_outputs import HeldOutputs, make_loss
from infoq_fx.runtime.interpreter import ReadValue
from infoq_fx.runtime.outputs import find_labelled, predict_classes, read_nodes, read_readings
from infoq_fx.runtime.run_plan import plan_perturbed_runs
from infoq_fx.scoring.criterion import Measure
from infoq_fx.types import BASELINE_BITS, Measurement, Plain, QuantSite

__all__ = [
    "ACCURACY_DROP",
    "DESCRIPTION",
    "INFORMATION_LOSS",
    "KL",
    "LOSS_INCREASE",
    "LOSS_OVER_PAIRS",
    "NOISE_TO_SIGNAL",
    "ClassLabels",
    "LossOverPairs",
    "OutputMeasure",
    "OutputRecord",
    "Outputs",
    "affected_outputs",
    "measure_outputs",
    "read_class_labels",
    "read_outputs",
]

INFORMATION_LOSS = "information_loss_nats"
LOSS_OVER_PAIRS = "information_loss_over_pairs_nats"
KL = "output_kl_nats"
NOISE_TO_SIGNAL = "output_noise_to_signal"
LOSS_INCREASE = "loss_increase_nats"
ACCURACY_DROP = "accuracy_drop"
# "algorithm_version" is raised when the same data gives other measurements.
DESCRIPTION: Mapping[str, Plain] = {"measure": "outputs", "algorithm_version": 4}
_KEYS = (INFORMATION_LOSS, LOSS_OVER_PAIRS, KL, NOISE_TO_SIGNAL, LOSS_INCREASE, ACCURACY_DROP)
_OF_LABELS = {LOSS_INCREASE, ACCURACY_DROP}
_MOST_POSITIONS = 16  # of a categorical output that is compared over pairs; with more, the mean over them is steady
_MOST_PAIRED, _PAIRED_VALUES = 512, 2**21  # samples, and probabilities, that every sample is paired with
_FARTHEST = 300.0  # nats; its exponential is finite


@dataclass(frozen=True)
class ClassLabels:
    """Classes of one output: the data's labels, or the 8-bit baseline's predictions if it has none that fit.

    ``index`` is that of the output among those that are read; ``labels`` are int64 ``[samples, ...]``, one for each
    position of the output.
    """

    index: int
    labels: Tensor


@dataclass(frozen=True)
class _Part:
    """Some samples of a batch, ``rows`` of it and from ``start`` on in the data, as losses read them."""

    start: int
    rows: slice
    reference: tuple[Encoded, ...]
    base: tuple[Encoded, ...]
    lost_over_pairs: Tensor


@dataclass(frozen=True)
class Outputs:
    """What perturbed runs are compared with.

    ``base`` are the outputs of the 8-bit baseline, ``reference`` those of the float model; ``lost`` are the baseline's
    own nats, float64 ``[samples]``; ``signals`` the mean power of each output per sample; ``classes`` are None if no
    output is categorical. ``paired`` are, for every output that is compared over pairs, probabilities of the float
    model for other samples, float64 ``[positions, samples, classes]``; else None.
    """

    base: HeldOutputs
    reference: HeldOutputs
    loss: OutputLoss
    lost: Tensor
    signals: tuple[float, ...]
    classes: ClassLabels | None
    paired: tuple[Tensor | None, ...] = ()
    _held: dict[tuple[int, int], tuple[_Part, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.base.samples

    def compare(self, start: int, found: Mapping[int, Tensor]) -> Tensor:
        """Compare a perturbed run with the baseline per sample, float64 ``[6, samples]``, in the order of ``_KEYS``.

        Args:
            start: index of the first sample.
            found: outputs of the run by index, ``[samples, ...]``; those that are not there are the baseline's.
        """
        parts = self._encode(start, len(next(iter(found.values()))))
        return torch.cat([self._compare_part(x, {i: y[x.rows] for i, y in found.items()}) for x in parts], 1)

    def _compare_part(self, part: _Part, found: Mapping[int, Tensor]) -> Tensor:
        start, count = part.start, len(next(iter(found.values())))
        base = self.base.rows(start, count)
        outputs = [found.get(index, x) for index, x in enumerate(base)]
        noise, loss, lost = (torch.zeros(count, dtype=torch.float64) for _ in range(3))
        for index, x in found.items():
            weight = getattr(self.loss.readings[index], "weight", 1.0)
            error = _square_finite(base[index].double() - x.double())
            noise += weight * error / max(self.signals[index], 1e-30)
        known_reference, known_base, lost_over_pairs = part.reference, part.base, part.lost_over_pairs
        encoded = [Encoded(r, x) if i in found else known_base[i] for i, (r, x) in self._numbered(outputs)]
        if self.loss.function is None:
            nats, divergence = (self.loss.compare(known, encoded) for known in (known_reference, known_base))
            over_pairs = self._compare_over_pairs(known_reference, encoded) - lost_over_pairs
        else:
            nats, divergence = (self.loss(x, outputs) for x in (self.reference.rows(start, count), base))
            over_pairs = nats
        if self.classes is not None and self.classes.index in found:
            index, labels = self.classes.index, self.classes.labels[start : start + count]
            axis = getattr(self.loss.readings[index], "axis", 1)
            predicted = base[index].argmax(axis), found[index].argmax(axis)
            loss, lost = _compare_classes(known_base[index].rows, encoded[index].rows, predicted, labels)
        nats = nats - self.lost[start : start + count]
        return torch.stack([nats, over_pairs, divergence, noise, loss, 100 * lost])

    def _compare_over_pairs(self, reference: Sequence[Encoded], found: Sequence[Encoded]) -> Tensor:
        """The nats of all outputs, those in ``paired`` over pairs; zeros if there are none."""
        if not self.is_paired:
            return torch.zeros(reference[0].samples, dtype=torch.float64)
        return _lose_over_pairs(self.loss, self.paired, reference, found)

    @property
    def is_paired(self) -> bool:
        """Whether an output is compared over pairs."""
        return any(others is not None for others in self.paired)

    def _encode(self, start: int, count: int) -> tuple[_Part, ...]:
        """Reference and baseline of a batch in parts, kept until another batch comes; a loss of one's own takes all."""
        held = self._held.get((start, count))
        if held is None:
            is_own = self.loss.function is not None
            slices = [slice(0, count)] if is_own else split_samples(self.reference.rows(start, count))
            held = tuple(self._encode_part(start + rows.start, rows) for rows in slices)
            self._held.clear()
            self._held[start, count] = held
        return held

    def _encode_part(self, start: int, rows: slice) -> _Part:
        count = rows.stop - rows.start
        reference, base = (self.loss.encode(x.rows(start, count)) for x in (self.reference, self.base))
        return _Part(start, rows, reference, base, self._compare_over_pairs(reference, base))

    def _numbered(self, outputs: Sequence[Tensor]) -> Iterator[tuple[int, tuple[Reading, Tensor]]]:
        return enumerate(zip(self.loss.readings, outputs, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": {}}

    def summarize(self, compared: Tensor) -> dict[str, float]:
        """Return means over the samples of the rows of :meth:`compare`, each with its standard error.

        Information losses and divergence are in nats, noise is a ratio of powers, loss is in nats, accuracy in points;
        the latter two are left out if no output is categorical, the loss over pairs if no output has pairs.
        """
        values = {}
        left_out = (set() if self.classes is not None else _OF_LABELS) | (
            set() if self.is_paired else {LOSS_OVER_PAIRS}
        )
        for key, rows in zip(_KEYS, compared, strict=True):
            if key not in left_out:
                values[key] = float(rows.mean())
                values[f"{key}:standard_error"] = float(rows.std(correction=0)) / math.sqrt(len(rows))
        return values


@dataclass(frozen=True)
class LossOverPairs:
    """The nats of all outputs, those with few positions over pairs of samples, which has a tenth of the noise.

    The change that a run makes to a sample's log-probabilities is applied to the float model's outputs for other
    samples. It ranks runs, and is not in the unit of other losses: changes may be larger where decisions are near.
    """

    loss: OutputLoss
    paired: tuple[Tensor | None, ...]

    @classmethod
    def begin(cls, loss: OutputLoss, reference: HeldOutputs) -> LossOverPairs:
        """Choose the samples that every sample is paired with."""
        return cls(loss, _read_paired(loss, reference))

    def __call__(self, reference: Sequence[Tensor], found: Sequence[Tensor]) -> Tensor:
        """Sum the nats of all outputs, float64 ``[samples]``; outputs of both runs in order, the same samples."""
        if all(others is None for others in self.paired):
            return self.loss(reference, found)
        return _lose_over_pairs(self.loss, self.paired, self.loss.encode(reference), self.loss.encode(found))


class OutputRecord:
    """Collects the changes of the outputs in one run, batch by batch; zero for samples that were not run.

    ``affected`` are the indices of the outputs that the run reaches.
    """

    SAMPLE_BYTES = 8 * len(_KEYS)

    def __init__(self, outputs: Outputs, affected: Sequence[int]) -> None:
        self._outputs, self._affected = outputs, frozenset(affected)
        self._compared = torch.zeros(len(_KEYS), outputs.samples, dtype=torch.float64)
        self._waiting: dict[int, dict[int, Tensor]] = {}

    def add(self, start: int, index: int, output: Tensor) -> None:
        """Take one output for the samples from ``start`` on; the last of them that the run reaches compares all."""
        found = self._waiting.setdefault(start, {})
        found[index] = output.detach().to("cpu", torch.float32)
        if len(found) == len(self._affected):
            self._compared[:, start : start + len(output)] = self._outputs.compare(start, self._waiting.pop(start))

    def summarize(self) -> dict[str, float]:
        """Return means and standard errors; see :meth:`Outputs.summarize`."""
        return self._outputs.summarize(self._compared)


@dataclass(frozen=True)
class OutputMeasure:
    """Runs perturbed sites up to the outputs and compares them with the baseline's, sample by sample."""

    outputs: Outputs
    batch_size: int

    @property
    def run_bytes(self) -> int:
        """Bytes of one float64 per sample for every value compared."""
        return OutputRecord.SAMPLE_BYTES * self.outputs.samples

    def __call__(
        self, prepared: PreparedModel, data: CalibrationData | None, sites: Sequence[QuantSite], run_options: RunOptions
    ) -> list[Measurement]:
        """Measure all values of :meth:`Outputs.summarize` for every (site, bit-width)."""
        if data is None:
            raise CalibrationDataError(
                "comparing outputs needs calibration data, found none; give some, or take criterion='weight_mse'"
            )
        nodes = read_nodes(prepared)
        reached = affected_outputs(prepared, [site.name for site in sites])
        wanted = [(site.name, bits) for site in sites for bits in site.bits]
        records = {run: OutputRecord(self.outputs, reached[run[0]]) for run in wanted}

        def make_reader(run: tuple[str, int], start: int) -> ReadValue:
            def read(node: fx.Node, value: Tensor) -> None:
                for index in reached[run[0]]:
                    if nodes[index] is node:
                        records[run].add(start, index, value)

            return read

        with thread_map(run_options.threads, run_options.stop) as spread:
            run_perturbed(
                prepared,
                data,
                sites,
                set(nodes),
                make_reader,
                batch_size=self.batch_size,
                run_options=run_options,
                spread=spread,
                share=1.0,
            )
        for _, bits in wanted:
            if bits == BASELINE_BITS:
                run_options.advance(1.0)
        return [Measurement(*run, record.summarize()) for run, record in records.items()]


def affected_outputs(prepared: PreparedModel, sites: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return, by site, the indices of the outputs that are read and that it reaches.

    Raises:
        OptionError: one reaches none, so that nothing could be said of it.
    """
    nodes, reached = read_nodes(prepared), {}
    for site, plan in plan_perturbed_runs(prepared, sites, set(nodes)).items():
        run = set(plan.nodes)
        reached[site] = tuple(index for index, node in enumerate(nodes) if node in run)
        if not reached[site]:
            read = ", ".join(map(repr, _read_names(prepared)))
            raise OptionError(
                f"site {site!r} reaches none of the outputs that are read ({read}): read the output that it computes "
                "(outputs=...), or leave its layer in float with ignore=[...]"
            )
    return reached


def measure_outputs(
    criterion: str, prepared: PreparedModel, data: CalibrationData | None, *, batch_size: int, run_options: RunOptions
) -> Measure:
    """Run the float model and the 8-bit baseline over all samples.

    Raises:
        CalibrationDataError: there is no data, or a label is not a class of the model; the message names ``criterion``.
        OptionError: a searched site reaches no output that is read.
    """
    if data is None:
        raise CalibrationDataError(f"criterion {criterion!r} needs calibration data; give some, or take 'weight_mse'")
    base = hold_outputs(prepared, data, batch_size=batch_size, run_options=run_options)
    return OutputMeasure(read_outputs(prepared, data, base, batch_size=batch_size, run_options=run_options), batch_size)


def read_outputs(
    prepared: PreparedModel, data: CalibrationData, base: HeldOutputs, *, batch_size: int, run_options: RunOptions
) -> Outputs:
    """Compare the outputs of the baseline, ``base``, with those of the float model, which is run here."""
    affected_outputs(prepared, [s.name for s in prepared.inventory.sites if s.is_searched and len(s.bits) > 1])
    reference = hold_float_outputs(prepared, data, batch_size=batch_size, run_options=run_options)
    loss = make_loss(prepared, reference)
    starts = range(0, data.samples, batch_size)
    lost = torch.cat([loss(reference.rows(s, batch_size), base.rows(s, batch_size)) for s in starts])
    powers = [[_square_finite(x.double()) for x in base.rows(s, batch_size)] for s in starts]
    signals = tuple(float(torch.cat(rows).mean()) for rows in zip(*powers, strict=True))
    classes, paired = read_class_labels(prepared, data, base), _read_paired(loss, reference)
    return Outputs(base, reference, loss, lost, signals, classes, paired)


def _read_paired(loss: OutputLoss, reference: HeldOutputs) -> tuple[Tensor | None, ...]:
    """The float model's probabilities for samples that are spread over the data, of outputs with few positions."""
    paired: list[Tensor | None] = []
    for reading, x in zip(loss.readings, reference.tensors, strict=True):
        is_steady = not isinstance(reading, Categorical) or x[0].numel() > _MOST_POSITIONS * x.shape[reading.axis]
        if is_steady or loss.function is not None:
            paired.append(None)
            continue
        count = max(1, min(len(x), _MOST_PAIRED, _PAIRED_VALUES // x[0].numel()))
        rows = torch.arange(count) * len(x) // count
        paired.append(Encoded(reading, x[rows]).probabilities.transpose(0, 1).contiguous())
    return tuple(paired)


def _lose_over_pairs(
    loss: OutputLoss, paired: Sequence[Tensor | None], reference: Sequence[Encoded], found: Sequence[Encoded]
) -> Tensor:
    """The nats of all outputs, those in ``paired`` by :func:`_diverge_over_pairs`."""
    total = torch.zeros(reference[0].samples, dtype=torch.float64)
    each = loss.compare_each(reference, found)
    for nats, others, reading, p, q in zip(each, paired, loss.readings, reference, found, strict=True):
        weight = getattr(reading, "weight", 0.0)
        total += nats if others is None else weight * _diverge_over_pairs(others, p.rows, q.rows)
    return total


def _diverge_over_pairs(others: Tensor, reference: Tensor, found: Tensor) -> Tensor:
    """E KL(p' || q') in nats: every sample's change of its log-probabilities is applied to the p' of other samples.

    q' is p' exp(change), normalised, so that KL(p' || q') = log sum p' exp(change) - sum p' change.

    Args:
        others: p', ``[positions, other samples, classes]``.
        reference: log-probabilities of the float model, ``[samples, positions, classes]``.
        found: those of the run.
    """
    change = torch.where(torch.isfinite(reference), found - reference, 0.0).clamp(-_FARTHEST, _FARTHEST)
    change = change.permute(1, 2, 0)
    return ((others @ change.exp()).log() - others @ change).mean((0, 1))


def read_class_labels(prepared: PreparedModel, data: CalibrationData, base: HeldOutputs) -> ClassLabels | None:
    """Return the data's labels for the output that they fit, else the baseline's predictions for the first classes.

    Raises:
        CalibrationDataError: a label is not a class of the output that it fits.
    """
    readings, tensors = read_readings(prepared), base.tensors
    index = find_labelled(readings, tensors, data.labels)
    if index is not None and data.labels is not None:
        reading = readings[index]
        assert isinstance(reading, Categorical)
        return ClassLabels(index, read_classes(data.labels, tensors[index].shape[reading.axis]))
    index = find_labelled(readings, tensors, None)
    if index is None:
        return None
    reading = readings[index]
    assert isinstance(reading, Categorical)
    return ClassLabels(index, predict_classes(reading, tensors[index]))


def _read_names(prepared: PreparedModel) -> list[str]:
    named = zip(prepared.output_names, prepared.readings, strict=True)
    return [name for name, reading in named if hasattr(reading, "weight")]


def _square_finite(x: Tensor) -> Tensor:
    """The sum of squares of every sample, without what is infinite, as masked logits are; ``[samples]``."""
    return torch.where(torch.isfinite(x), x, 0.0).square().reshape(len(x), -1).sum(1)


def _compare_classes(
    base: Tensor, found: Tensor, predicted: tuple[Tensor, Tensor], labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Increase of the cross-entropy in nats, and of the share of wrong classes, per sample.

    ``base`` and ``found`` are log-probabilities ``[samples, positions, classes]``.
    """
    known = (labels >= 0).double().reshape(len(labels), -1)
    classes = labels.clamp_min(0).reshape(len(labels), -1, 1)
    loss = (base.gather(2, classes) - found.gather(2, classes)).squeeze(2) * known
    right = [(x == labels).double().reshape(len(labels), -1) for x in predicted]
    counted = known.sum(1).clamp_min(1)
    return loss.sum(1) / counted, ((right[0] - right[1]) * known).sum(1) / counted

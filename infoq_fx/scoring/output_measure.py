"""Measures how quantizing one site changes the outputs; several criteria share these runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.threads import thread_map
from infoq_fx.errors import CalibrationDataError
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.runtime.forward import RunOptions, compute_float_logits, compute_logits, run_perturbed
from infoq_fx.runtime.interpreter import ReadValue
from infoq_fx.runtime.outputs import class_logits, diverge, first_output, measure_spread
from infoq_fx.types import BASELINE_BITS, Measurement, Plain, QuantSite

__all__ = [
    "ACCURACY_DROP",
    "DESCRIPTION",
    "INFORMATION_LOSS",
    "KL",
    "LOSS_INCREASE",
    "NOISE_TO_SIGNAL",
    "OutputMeasure",
    "OutputRecord",
    "Outputs",
    "measure_outputs",
    "read_labels",
    "read_outputs",
]

INFORMATION_LOSS = "information_loss_nats"
KL = "output_kl_nats"
NOISE_TO_SIGNAL = "output_noise_to_signal"
LOSS_INCREASE = "loss_increase_nats"
ACCURACY_DROP = "accuracy_drop"
# "algorithm_version" is raised when the same data gives other measurements.
DESCRIPTION: Mapping[str, Plain] = {"measure": "outputs", "algorithm_version": 1}
_KEYS = (INFORMATION_LOSS, KL, NOISE_TO_SIGNAL, LOSS_INCREASE, ACCURACY_DROP)


@dataclass(frozen=True)
class Outputs:
    """The reference outputs that perturbed runs are compared with.

    ``logits`` of the 8-bit baseline and ``float_logits`` of the float model are float32 ``[samples, classes]``.
    ``labels`` are int64 ``[samples]``, the baseline's predictions if the data has none. ``spread`` is that of
    :func:`infoq_fx.runtime.outputs.diverge`.
    """

    logits: Tensor
    float_logits: Tensor
    labels: Tensor
    spread: Tensor

    def compare(self, start: int, logits: Tensor) -> Tensor:
        """Return all changes per sample, float64 ``[5, samples]``, in the order of ``_KEYS``.

        Args:
            start: index of the first sample.
            logits: of a perturbed run, ``[samples, classes]``.
        """
        rows = slice(start, start + len(logits))
        base, labels, found = self.logits[rows].double(), self.labels[rows], logits.double()
        in_float = self.float_logits[rows]
        information = diverge(in_float, found, self.spread) - diverge(in_float, base, self.spread)
        kl = diverge(base, found, self.spread)
        log_base, log_found = base.log_softmax(1), found.log_softmax(1)
        loss = (log_base - log_found).gather(1, labels[:, None])[:, 0]
        lost = (base.argmax(1) == labels).double() - (found.argmax(1) == labels).double()
        return torch.stack([information, kl, (base - found).square().sum(1), loss, 100 * lost])

    def summarize(self, compared: Tensor) -> dict[str, float]:
        """Return the means over the samples of the result of :meth:`compare`, each with its standard error.

        Information, divergence and loss are in nats, noise is a ratio of powers, accuracy is in points.
        """
        signal = float(self.logits.double().square().sum(1).mean())
        values = {}
        for key, rows in zip(_KEYS, compared, strict=True):
            scaled = rows / max(signal, 1e-30) if key == NOISE_TO_SIGNAL else rows
            values[key] = float(scaled.mean())
            values[f"{key}:standard_error"] = float(scaled.std(correction=0)) / math.sqrt(len(rows))
        return values


class OutputRecord:
    """Collects the changes of the outputs in one run, batch by batch; zero for samples that were not run."""

    SAMPLE_BYTES = 8 * len(_KEYS)

    def __init__(self, outputs: Outputs) -> None:
        self._outputs = outputs
        self._compared = torch.zeros(len(_KEYS), len(outputs.labels), dtype=torch.float64)

    def add(self, start: int, output: Tensor) -> None:
        """Compare the model's output for the samples from ``start`` on."""
        logits = class_logits(output).cpu()
        self._compared[:, start : start + len(logits)] = self._outputs.compare(start, logits)

    def summarize(self) -> dict[str, float]:
        """Return means and standard errors; see :meth:`Outputs.summarize`."""
        return self._outputs.summarize(self._compared)


@dataclass(frozen=True)
class OutputMeasure:
    """Runs perturbed sites up to the output and compares it with the baseline's, sample by sample."""

    outputs: Outputs
    batch_size: int

    @property
    def run_bytes(self) -> int:
        """Bytes of one float64 per sample for every value compared."""
        return OutputRecord.SAMPLE_BYTES * len(self.outputs.labels)

    def __call__(
        self, prepared: PreparedModel, data: CalibrationData | None, sites: Sequence[QuantSite], run_options: RunOptions
    ) -> list[Measurement]:
        """Measure all values of :meth:`Outputs.summarize` for every (site, bit-width)."""
        if data is None:
            raise CalibrationDataError(
                "comparing outputs needs calibration data, found none; give some, or take criterion='weight_mse'"
            )
        output = first_output(prepared)
        wanted = [(site.name, bits) for site in sites for bits in site.bits]
        records = {run: OutputRecord(self.outputs) for run in wanted}

        def make_reader(run: tuple[str, int], start: int) -> ReadValue:
            def read(node: fx.Node, value: Tensor) -> None:
                if node is output:
                    records[run].add(start, value)

            return read

        with thread_map(run_options.threads, run_options.stop) as spread:
            run_perturbed(
                prepared,
                data,
                sites,
                {output},
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


def measure_outputs(
    criterion: str, prepared: PreparedModel, data: CalibrationData | None, *, batch_size: int, run_options: RunOptions
) -> OutputMeasure:
    """Run the float model and the 8-bit baseline over all samples.

    Raises:
        CalibrationDataError: there is no data, or a label is not a class of the model; the message names ``criterion``.
    """
    if data is None:
        raise CalibrationDataError(f"criterion {criterion!r} needs calibration data; give some, or take 'weight_mse'")
    logits = compute_logits(prepared, data, batch_size=batch_size, run_options=run_options)
    return OutputMeasure(
        read_outputs(prepared, data, logits, batch_size=batch_size, run_options=run_options), batch_size
    )


def read_outputs(
    prepared: PreparedModel, data: CalibrationData, logits: Tensor, *, batch_size: int, run_options: RunOptions
) -> Outputs:
    """Return the baseline's and the float model's outputs; without labels, the baseline's predictions are used."""
    labels = read_labels(data, logits)
    in_float = compute_float_logits(prepared, data, batch_size=batch_size, run_options=run_options)
    return Outputs(logits, in_float, labels, measure_spread(in_float))


def read_labels(data: CalibrationData, logits: Tensor) -> Tensor:
    """Return the data's labels, int64 ``[samples]``, or the predictions of ``logits`` if it has none.

    Raises:
        CalibrationDataError: a label is not a class of the model.
    """
    data.check_labels(logits.shape[1])
    return logits.argmax(1) if data.labels is None else data.labels.cpu()

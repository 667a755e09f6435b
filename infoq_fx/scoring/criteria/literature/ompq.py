"""OMPQ: layers whose outputs resemble those of many other layers get fewer bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from infoq_fx.core.data import CalibrationData
from infoq_fx.core.option_checks import check_count
from infoq_fx.errors import OptionError
from infoq_fx.quantization.prepared import PreparedModel
from infoq_fx.runtime.forward import RunOptions, run_whole
from infoq_fx.scoring.criterion import Kind, KnownValues, Measure, Scores
from infoq_fx.scoring.gradients import spread_samples
from infoq_fx.types import BASELINE_BITS, Measurement, Plain, Score

__all__ = ["OMPQ"]

_ALGORITHM_VERSION = 1  # raised when the same data gives other measurements
_GROUP_BYTES = 256 << 20


@dataclass(frozen=True)
class OMPQ:
    """Orthogonality of a layer's output to those of the other layers, times the bits below 8.

    ``ORM_ij = |F_j' F_i|^2 / (|F_i' F_i| |F_j' F_j|)`` with F_i the flattened outputs of layer i, ``[samples,
    values]``; ``gamma_i = sum of ORM_ij over j, minus 1`` and ``theta_i = exp(-beta * gamma_i)``. The source maximises
    ``sum of b_i * m_i`` with m_i the mean of theta over layer i and all layers after it, in graph order. The score
    ``(8 - b_i) * m_i`` has its minimum at the same bit-widths under any budget; theta is relative to its largest
    value, which changes no minimum and avoids underflow. Unit: bits. The score does not depend on the weights' own
    error; it only ranks the layers at equal bits. Activations are not scored.

    Cost: one forward pass of ``samples`` samples of the 8-bit model (a few if the outputs of all layers do not fit
    into 256 MiB), no backward pass, no labels. No standard error.

    Args:
        beta: how strongly differences of orthogonality count.
        samples: spread evenly over the data.
        is_centred: subtract the outputs' mean over the samples, as the authors' code does; False follows the paper's
            definition literally.

    Reference:
        "OMPQ: Orthogonal Mixed Precision Quantization", arXiv 2109.07865, Section 3; code at MAC-AutoML/OMPQ.
    """

    beta: float = 1.0
    samples: int = 64
    is_centred: bool = True
    name: str = "ompq"
    needs_data: bool = True
    kinds: tuple[Kind, ...] = ("weight",)

    def __post_init__(self) -> None:
        check_count("samples", self.samples, 2)
        if not self.beta >= 0:
            raise OptionError(f"beta={self.beta!r}; give a number of at least 0")

    def describe(self, prepared: PreparedModel, data: CalibrationData | None) -> Mapping[str, Plain]:
        """Return all options."""
        return {
            "measure": "orthogonality",
            "algorithm_version": _ALGORITHM_VERSION,
            "beta": self.beta,
            "output_samples": self.samples,
            "is_centred": self.is_centred,
        }

    def begin(
        self, prepared: PreparedModel, data: CalibrationData | None, *, batch_size: int, run_options: RunOptions
    ) -> Measure:
        """Run the samples and compare the outputs of all layers.

        Raises:
            CalibrationDataError: there is no data.
        """
        chosen = spread_samples(self.name, prepared, data, self.samples)
        grams = _output_grams(prepared, chosen, batch_size, run_options)
        orm = orthogonality(torch.stack(list(grams.values())), is_centred=self.is_centred)
        importance = dict(zip(grams, weigh(orm, self.beta).tolist(), strict=True))
        weight_sites = [site for site in prepared.inventory.sites if site.kind == "weight"]
        return KnownValues(
            {(site.name, bits): {"importance": importance[site.name]} for site in weight_sites for bits in site.bits}
        )

    def score(self, prepared: PreparedModel, measurements: Sequence[Measurement]) -> Scores:
        """Return the bits below 8 times the importance."""
        scores: dict[str, dict[int, Score]] = {}
        for found in measurements:
            short = BASELINE_BITS - found.bits
            scores.setdefault(found.site, {})[found.bits] = Score(short * found.values["importance"])
        return scores


def orthogonality(grams: Tensor, *, is_centred: bool) -> Tensor:
    """Return the ORM between layers, float64 ``[layers, layers]``; it is 0 for a layer whose outputs do not vary.

    Args:
        grams: Gram matrices of the outputs over samples, ``[layers, samples, samples]``.
        is_centred: whether to subtract the outputs' mean over the samples.
    """
    held = grams.double()
    if is_centred:
        held = held - held.mean(1, keepdim=True)
        held = held - held.mean(2, keepdim=True)
    rows = held.flatten(1)
    norms = rows.norm(dim=1)
    limit = torch.finfo(torch.float32).eps * grams.double().flatten(1).norm(dim=1)
    rows = torch.where((norms > limit)[:, None], rows / norms.clamp_min(1e-300)[:, None], 0.0)
    return (rows @ rows.T).fill_diagonal_(1.0)


def weigh(orm: Tensor, beta: float) -> Tensor:
    """Return the mean importance ``exp(-beta * gamma)`` of each layer and those after it, relative to the largest."""
    gamma = orm.sum(1) - 1
    theta = torch.exp(-beta * (gamma - gamma.min()))
    return theta.flip(0).cumsum(0).flip(0) / torch.arange(len(theta), 0, -1)


def _output_grams(
    prepared: PreparedModel, data: CalibrationData, batch_size: int, run_options: RunOptions
) -> dict[str, Tensor]:
    """Gram matrices of the outputs by weight site, in graph order; summed over all uses of a shared weight."""
    users = {quantizer.site.name: list(node.users) for node, quantizer in prepared.quantizer_nodes()}
    names = [site.name for site in prepared.inventory.sites if site.kind == "weight"]
    left = list(dict.fromkeys(node for name in names for node in users[name]))
    found: dict[fx.Node, Tensor] = {}
    while left:
        for node, outputs in _read_outputs(prepared, data, left, batch_size, run_options).items():
            found[node] = (outputs @ outputs.T).cpu()
        left = [node for node in left if node not in found]
    return {name: torch.stack([found[node] for node in users[name]]).sum(0) for name in names}


def _read_outputs(
    prepared: PreparedModel, data: CalibrationData, nodes: Sequence[fx.Node], batch_size: int, run_options: RunOptions
) -> dict[fx.Node, Tensor]:
    """Outputs ``[samples, values]`` of as many of the first nodes as fit into memory, at least one."""
    parts: dict[fx.Node, dict[int, Tensor]] = {}

    def read(start: int, values: Mapping[fx.Node, Any]) -> None:
        count = min(batch_size, data.samples - start)
        if start == 0:
            room = _GROUP_BYTES
            for node in nodes:
                room -= 4 * _output_of(node, values[node]).numel() // count * data.samples
                if parts and room < 0:
                    break
                parts[node] = {}
        for node, by_start in parts.items():
            value = (
                _output_of(node, values[node]).detach().float()
            )  # without a batch dimension it is the same for every sample
            by_start[start] = value.reshape(count if len(value) == count else 1, -1).expand(count, -1)

    run_whole(prepared, data, set(nodes), read, batch_size=batch_size, run_options=run_options)
    return {node: torch.cat([rows for _, rows in sorted(by_start.items())]) for node, by_start in parts.items()}


def _output_of(node: fx.Node, value: Any) -> Tensor:
    """A layer's output, samples first; a recurrent layer also gives its last states."""
    if isinstance(value, Tensor):
        return value
    output: Tensor = value[0]
    return output if node.args[8] else output.transpose(0, 1)

"""Encoders of the inputs, X -> X_E, with which their mutual information can be estimated (paper, Section 3)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from infoq_fx.errors import EncoderUnavailableError, OptionError, unknown_name_error

__all__ = ["ENCODERS", "Encoder", "encode_inputs", "load_dinov2", "principal_components"]

Encoder = Callable[[Tensor], Tensor]
"""A function from one batch of the first input ``[samples, ...]`` to features ``[samples, ...]``."""

_PATCH = 14
_COMPONENT_SAMPLES = 2048
_PART_FEATURES = 4096
# A revision, since whatever code lies on a branch would run here.
_DINOV2_REPOSITORY = "facebookresearch/dinov2:12592a9bdfea0a6e4ee4767cd5a8d3195c0e3509"


def encode_inputs(inputs: Mapping[str, Tensor], encoder: Encoder | str | None, *, batch_size: int = 64) -> Tensor:
    """Compress the inputs of all samples.

    Args:
        inputs: tensors ``[samples, ...]`` by name.
        encoder: a callable on batches of the first input, a name in ``ENCODERS``, or None for the leading
            principal components of all inputs.
        batch_size: samples per call of the callable.

    Returns:
        float32 ``[samples, features]`` on the CPU.

    Raises:
        OptionError: the name is unknown, or the encoder does not return a float tensor with one row per sample.
        EncoderUnavailableError: a named encoder cannot be loaded.
    """
    if encoder is None:
        return principal_components(inputs)
    if isinstance(encoder, str):
        if encoder not in ENCODERS:
            raise unknown_name_error("encoder", encoder, ENCODERS)
        encoder = ENCODERS[encoder]()
    first = next(iter(inputs.values()))
    with torch.inference_mode():
        parts = [encoder(batch) for batch in first.split(batch_size)]
    if not all(isinstance(p, Tensor) and p.is_floating_point() and p.ndim >= 2 for p in parts):
        raise OptionError(
            "encoder did not return a float matrix; return a float tensor [samples, features] for a batch of inputs"
        )
    features = torch.cat([part.flatten(1).float().cpu() for part in parts])
    if features.shape[0] != first.shape[0] or not bool(torch.isfinite(features).all()):
        raise OptionError(
            f"encoder returned {features.shape[0]} rows for {first.shape[0]} samples, or values that are not finite; "
            "return one finite row per sample"
        )
    return features


def principal_components(inputs: Mapping[str, Tensor], components: int = 32) -> Tensor:
    """Project the samples on their leading principal components.

    With more than 2,048 samples the components are those of the first 2,048.

    Args:
        inputs: tensors ``[samples, ...]`` by name; all of them are flattened and joined.
        components: largest number of components; there are fewer if there are fewer samples.

    Returns:
        float32 ``[samples, components]``, variances descending, with signs fixed for reproducibility.
    """
    samples = next(iter(inputs.values())).shape[0]
    used = min(samples, _COMPONENT_SAMPLES)
    # With few samples of many pixels, the Gram matrix is smaller than the covariance. Summed over parts of the pixels.
    gram = torch.zeros(used, used, dtype=torch.float64)
    for part in _centred_parts(inputs, used):
        gram += (part[:used] @ part[:used].T).double()
    values, vectors = torch.linalg.eigh(gram)
    count = max(1, min(components, used - 1))
    values, vectors = values[-count:].flip(0).clamp_min(0), vectors[:, -count:].flip(1)
    largest = vectors.abs().argmax(0, keepdim=True)
    vectors = vectors * vectors.gather(0, largest).sign()
    scores = torch.zeros(samples, count, dtype=torch.float64)
    scores[:used] = vectors * values.sqrt()
    for part in _centred_parts(inputs, used) if samples > used else ():
        scores[used:] += (part[used:] @ (part[:used].T @ vectors.float())).double() / values.sqrt().clamp_min(1e-12)
    return scores.float()


def _centred_parts(inputs: Mapping[str, Tensor], used: int) -> Iterator[Tensor]:
    for x in inputs.values():
        for part in x.detach().flatten(1).split(_PART_FEATURES, 1):
            values = part.cpu().float()
            yield values - values[:used].mean(0)


def load_dinov2(name: str = "dinov2_vits14") -> Encoder:
    """Load the paper's encoder, a DINOv2 vision transformer, from torch hub.

    It is downloaded at the first call, of one fixed revision. Images are resized to the nearest multiple of 14 pixels,
    at least 98, and must be normalised as for ImageNet.

    Raises:
        EncoderUnavailableError: the hub cannot be reached and the model is not in its cache.

    Reference:
        Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2023.
    """
    try:
        model = torch.hub.load(_DINOV2_REPOSITORY, name, trust_repo=True, skip_validation=True, verbose=False)
    except Exception as error:
        raise EncoderUnavailableError(
            f"DINOv2 encoder {name!r} could not be loaded from torch hub ({error}); go online once so that it is "
            "cached, pass encoder=<your own callable>, or leave encoder out for principal components"
        ) from error
    model = model.eval()
    logging.getLogger(__name__).info("loaded %s", name)

    def encode(images: Tensor) -> Tensor:
        images = images.cpu()  # torch hub loads the model on the CPU
        size = [max(7, round(side / _PATCH)) * _PATCH for side in images.shape[-2:]]
        resized = functional.interpolate(images, size=size, mode="bicubic", antialias=True)
        features: Tensor = model(resized)
        return features

    return encode


ENCODERS: dict[str, Callable[[], Encoder]] = {"dinov2": load_dinov2}

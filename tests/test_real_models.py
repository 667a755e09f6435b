"""The main job on pretrained models that are not part of the project; skipped where they are absent."""

import numpy as np
import onnxruntime
import pytest
import torch

import infoq_fx

LEVELS = onnxruntime.GraphOptimizationLevel


def run_onnx(path, images, level):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"x": batch.numpy()})[0].argmax(1) for batch in images.split(100)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "vit"])
def test_two_calls_keep_the_accuracy_and_onnxruntime_agrees(name, real_models, tmp_path):
    if name == "resnet20":
        model, train, test = real_models.cifar_resnet20(), real_models.cifar10("train"), real_models.cifar10("test")
    else:
        norm = (real_models.CIFAR_MEAN, real_models.CIFAR_STD)
        model = real_models.cifar_vit()
        train, test = real_models.cifar10("train", *norm), real_models.cifar10("test", *norm)
    quantized = infoq_fx.quantize(
        model,
        4.5,
        calibration_data=(train[0][:256], train[1][:256]),
        bits=(3, 4, 6, 8),
        ignore=["pos_embed"] if name == "vit" else [],  # added, never multiplied: it stays in float
        progress=False,
    )
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    with torch.no_grad():
        ours, exact = quantized(test[0]).argmax(1).numpy(), model(test[0]).argmax(1).numpy()
    labels = test[1].numpy()
    unoptimised, default = (run_onnx(path, test[0], level) for level in (LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_ALL))
    assert (ours == labels).mean() > (exact == labels).mean() - 0.02
    assert (unoptimised == ours).mean() >= 0.99
    assert abs((default == labels).mean() - (ours == labels).mean()) < 0.02
    if name == "resnet20":  # convolutions and one linear layer: nothing that rounds differently
        assert (unoptimised == ours).all()


@pytest.mark.slow
def test_recovery_holds_resnet20_at_a_mean_of_two_and_a_half_bits(real_models):
    train, (images, labels) = real_models.cifar10("train")[0][:512], real_models.cifar10("test")
    quantized = infoq_fx.quantize(
        real_models.cifar_resnet20(), 2.5, calibration_data=train, bits=(2, 3, 4), progress=False
    )
    with torch.no_grad():
        assert (quantized(images).argmax(1) == labels).double().mean() >= 0.86

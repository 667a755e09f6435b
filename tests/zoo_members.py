"""One member of every model family that the main job is tried on: random weights, small inputs, small calibration."""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import torchvision
from torch import nn
from torchvision.models.detection import backbone_utils

import infoq_fx

MEAN_BITS = 4.0
LEVELS = onnxruntime.GraphOptimizationLevel
CONVOLUTIONS = {"Conv", "ConvTranspose"}
PRODUCTS = {"MatMul", "Gemm"}
INTEGER_CONVOLUTIONS = {"QLinearConv", "ConvInteger"}
INTEGER_PRODUCTS = {"QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}


@dataclass(frozen=True)
class Member:
    """A model and random inputs, a tensor ``[samples, ...]`` or a dict of them."""

    group: str
    build: Callable[[], nn.Module]
    draw_inputs: Callable[[], torch.Tensor | dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Outcome:
    """What became of a member: counts are (integer kernels at onnxruntime's default level, nodes in the file).

    ``differences`` are L2 distances of file and module over the module's norm, without optimisation and at the default
    level, first output.
    """

    sites: int
    weight_bits: float
    convolutions: tuple[int, int]
    products: tuple[int, int]
    differences: tuple[float, float]


def images(size: int, samples: int = 4) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(samples, 3, size, size)


def clips(frames: int, size: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(2, 3, frames, size, size)


def tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 200, (6, 12)), "attention_mask": torch.ones(6, 12, dtype=torch.int64)}


def of_torchvision(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, **{"num_classes": 10, **options})


def build_bert() -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=32,
    )  # fmt: skip
    return transformers.BertModel(config)


def build_vit() -> nn.Module:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8
    )
    return transformers.ViTModel(config)


def _members() -> dict[str, Member]:
    sizes = {
        "alexnet": 64, "convnext_tiny": 64, "densenet121": 64, "efficientnet_b0": 64, "efficientnet_v2_s": 64,
        "googlenet": 64, "inception_v3": 96, "maxvit_t": 224, "mnasnet0_5": 64, "mobilenet_v2": 64,
        "mobilenet_v3_small": 64, "regnet_y_400mf": 64, "resnet18": 64, "resnext50_32x4d": 64, "wide_resnet50_2": 32,
        "shufflenet_v2_x0_5": 64, "squeezenet1_1": 64, "swin_t": 64, "swin_v2_t": 64, "vgg11_bn": 32, "vit_b_16": 224,
    }  # fmt: skip
    options = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
    found = {
        name: Member("classification", of_torchvision(name, **options.get(name, {})), images(size))
        for name, size in sizes.items()
    }
    for name in ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large"):
        found[name] = Member("segmentation", of_torchvision(name, weights_backbone=None, num_classes=5), images(64))
    found["resnet_fpn_backbone"] = Member(
        "detection backbone",
        lambda: backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None),
        images(64),
    )
    found["mobilenet_backbone"] = Member(
        "detection backbone",
        lambda: backbone_utils.mobilenet_backbone(backbone_name="mobilenet_v3_large", weights=None, fpn=True),
        images(64),
    )
    for name in (
        "fasterrcnn_mobilenet_v3_large_320_fpn", "fcos_resnet50_fpn", "keypointrcnn_resnet50_fpn",
        "maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "ssd300_vgg16", "ssdlite320_mobilenet_v3_large",
    ):  # fmt: skip
        found[name] = Member("detection", of_torchvision(name, weights_backbone=None, num_classes=5), images(64))
    videos = {"r3d_18": (8, 64), "s3d": (16, 64), "swin3d_t": (8, 64), "mvit_v1_b": (16, 224)}
    for name, (frames, size) in videos.items():
        found[name] = Member("video", of_torchvision(name), clips(frames, size))
    found["bert (transformers)"] = Member("encoder", build_bert, tokens)
    found["vit (transformers)"] = Member("encoder", build_vit, lambda: {"pixel_values": torch.randn(6, 3, 32, 32)})
    return found


MEMBERS = _members()


def run_member(member: Member, folder: Path) -> Outcome:
    """Capture, quantize at a mean of 4 bits, export and run; errors are those of the package."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the models' own constructors
        model = randomise(member.build()).eval()
    inputs = member.draw_inputs()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "weights that no layer multiplies")  # position embeddings and biases
        quantized = infoq_fx.quantize(
            model, MEAN_BITS, calibration_data=inputs, bits=(2, 8), criterion="weight_mse", refine=False,
            recovery="none", progress=False,
        )  # fmt: skip
    path = infoq_fx.export_onnx(quantized, folder / "model.onnx")
    batch = inputs if isinstance(inputs, dict) else {first_input(path): inputs}
    with torch.no_grad():
        expected = first_tensor(quantized(*batch.values()))
    allocation = infoq_fx.allocation_of(quantized)
    stored, optimised = count_nodes(path), count_nodes(optimise(path))
    return Outcome(
        sites=len(allocation.bits),
        weight_bits=allocation.cost.weight_bits,
        convolutions=(total(optimised, INTEGER_CONVOLUTIONS), total(stored, CONVOLUTIONS)),
        products=(total(optimised, INTEGER_PRODUCTS), total(stored, PRODUCTS)),
        differences=tuple(
            measure_difference(path, batch, expected, level)
            for level in (LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_ALL)
        ),
    )


def randomise(model: nn.Module) -> nn.Module:
    """Batch norms and layers that start at zero get values that matter."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def first_tensor(value: object) -> torch.Tensor:
    while not isinstance(value, torch.Tensor):
        value = next(iter(value.values() if isinstance(value, dict) else value))
    return value


def first_input(path: Path) -> str:
    return onnx.load(path).graph.input[0].name


def optimise(path: Path) -> Path:
    """What onnxruntime makes of the file at its default level."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Path(options.optimized_model_filepath)


def count_nodes(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def total(counts: Counter[str], kinds: set[str]) -> int:
    return sum(counts[kind] for kind in kinds)


def measure_difference(path: Path, batch: dict[str, torch.Tensor], expected: torch.Tensor, level: LEVELS) -> float:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    taken = [value.name for value in session.get_inputs()]
    found = session.run(None, {name: batch[name].numpy() for name in taken})[0]
    distance, norm = np.linalg.norm(found - expected.numpy()), np.linalg.norm(expected.numpy())
    return float(distance / norm) if distance else 0.0

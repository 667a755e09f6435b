"""Every kind of layer through quantization, export and onnxruntime: same values, integers once, biases as int32."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

import infoq_fx
from infoq_fx.graph.layers import LAYER_OPS
from infoq_fx.quantization.custom_ops import dequantize_op, quantize_dequantize_op
from infoq_fx.types import Allocation

pytestmark = pytest.mark.slow  # a file for every kind of layer

LEVELS = onnxruntime.GraphOptimizationLevel
INTEGERS = (np.int8, np.uint8)


class Around(nn.Module):
    """A layer between a layer in front and a head, so that it has a quantized input and a reader."""

    def __init__(self, front, layer, head):
        super().__init__()
        self.front, self.layer, self.head = front, layer, head

    def forward(self, x):
        return self.head(self.layer(self.front(x)))


def around(spatial, layer, channels=None):
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
    return Around(convolution(3, 8, 3, padding=1), layer, convolution(channels or 8, 5, 1))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return (self.b(self.a(x).relu()) + x).relu()


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        return torch.cat([self.a(x).relu(), self.b(x).relu(), x], 1)


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        return x * functional.hardsigmoid(self.up(functional.silu(self.down(x.mean((2, 3), keepdim=True)))))


class Tokens(nn.Module):
    """Linear layers on three dimensions, matrix products and attention."""

    def __init__(self, is_fused):
        super().__init__()
        self.is_fused = is_fused
        self.qkv, self.out, self.table = nn.Linear(6, 36), nn.Linear(12, 5), nn.Parameter(torch.randn(12, 12))

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.is_fused:
            attended = functional.scaled_dot_product_attention(q, k, v)
        else:
            attended = (q @ k.transpose(1, 2) / 3).softmax(-1) @ v
        return self.out(attended @ self.table)


class Language(nn.Module):
    """Token and position embeddings; the head may share the token table."""

    def __init__(self, is_tied, is_pooled):
        super().__init__()
        self.is_pooled = is_pooled
        self.words, self.positions = nn.Embedding(50, 16), nn.Embedding(7, 16)
        self.middle, self.head = nn.Linear(16, 16), nn.Linear(16, 50)
        self.register_buffer("ids", torch.arange(7))
        if is_tied:
            self.head.weight = self.words.weight

    def forward(self, x):
        h = self.words(x) + self.positions(self.ids)
        h = h + self.middle(h).relu()
        return self.head(h.mean(1) if self.is_pooled else h)


class TiedLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu())


def linear(activation):
    return nn.Sequential(nn.Linear(6, 12), activation, nn.Linear(12, 5))


def draw_ids():
    return torch.randint(0, 50, (32, 7))


IMAGES = (32, 3, 8, 8)
KINDS = {
    "conv1d": (lambda: around(1, nn.Conv1d(8, 8, 3, stride=2)), (32, 3, 12)),
    "conv2d": (lambda: around(2, nn.Conv2d(8, 8, 3, dilation=2)), IMAGES),
    "conv2d_same": (lambda: around(2, nn.Conv2d(8, 8, 3, padding="same")), IMAGES),
    "conv3d": (lambda: around(3, nn.Conv3d(8, 8, 2)), (16, 3, 4, 5, 5)),
    "grouped": (lambda: around(2, nn.Conv2d(8, 8, 3, groups=2)), IMAGES),
    "depthwise": (lambda: around(2, nn.Conv2d(8, 8, 3, groups=8)), IMAGES),
    "transposed1d": (lambda: around(1, nn.ConvTranspose1d(8, 8, 3, stride=2)), (32, 3, 12)),
    "transposed2d": (lambda: around(2, nn.ConvTranspose2d(8, 8, 2, stride=2)), IMAGES),
    "transposed3d": (lambda: around(3, nn.ConvTranspose3d(8, 8, 2)), (16, 3, 4, 5, 5)),
    "transposed_grouped": (lambda: around(2, nn.ConvTranspose2d(8, 8, 3, groups=2)), IMAGES),
    "residual": (lambda: around(2, Residual()), IMAGES),
    "concat": (lambda: around(2, Concat(), 18), IMAGES),
    "max_pool": (lambda: around(2, nn.MaxPool2d(3, 2)), IMAGES),
    "avg_pool": (lambda: around(2, nn.AvgPool2d(2)), IMAGES),
    "adaptive_pool": (lambda: around(2, nn.AdaptiveAvgPool2d(2)), IMAGES),
    "squeeze_excite": (lambda: around(2, SqueezeExcite()), IMAGES),
    "relu6": (lambda: around(2, nn.ReLU6()), IMAGES),
    "hardswish": (lambda: around(2, nn.Hardswish()), IMAGES),
    "silu": (lambda: around(2, nn.SiLU()), IMAGES),
    "gelu": (lambda: around(2, nn.GELU()), IMAGES),
    "sigmoid": (lambda: around(2, nn.Sigmoid()), IMAGES),
    "linear": (lambda: linear(nn.ReLU()), (32, 6)),
    "linear_on_tokens": (lambda: linear(nn.GELU()), (32, 4, 6)),
    "linear_on_maps": (lambda: linear(nn.Sigmoid()), (16, 2, 3, 6)),
    "matmul": (lambda: Tokens(False), (32, 4, 6)),
    "attention": (lambda: Tokens(True), (32, 4, 6)),
    "embedding": (lambda: Language(False, True), draw_ids),
    "embedding_on_tokens": (lambda: Language(False, False), draw_ids),
    "tied_embedding": (lambda: Language(True, True), draw_ids),
    "tied_embedding_on_tokens": (lambda: Language(True, False), draw_ids),
    "tied_linear": (TiedLinear, (32, 9)),
}
QUICK = [
    "depthwise",
    "transposed2d",
    "attention",
    "tied_embedding",
]
# Of a grouped transposed convolution one scale serves several output channels.
FLOAT_BIASES = {"transposed_grouped": ["layer.bias"]}


def quantize_uniformly(name, bits):
    build, shape = KINDS[name]
    inputs = shape() if callable(shape) else torch.randn(shape)
    prepared = infoq_fx.prepare(build().eval(), inputs, bits=(bits,))
    allocation = Allocation(bits={site.name: site.bits[0] for site in prepared.inventory.sites})
    return prepared, infoq_fx.convert(prepared, allocation), inputs


def run(path, inputs, level=LEVELS.ORT_DISABLE_ALL, optimised=None):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 4
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0]


def last_step(quantized):
    """What the output moves by when one value that enters the last layer moves by one step, at most."""
    layer = next(node for node in reversed(quantized.graph.nodes) if node.target in LAYER_OPS)
    op = LAYER_OPS[layer.target]
    source, weight = layer.args[op.source], layer.args[op.weight]
    assert source.target is quantize_dequantize_op
    assert weight.target is dequantize_op
    integers, scale = (quantized.get_buffer(operand.target) for operand in weight.args[:2])
    return source.args[1] * float(dequantize_op(integers, scale, *weight.args[2:]).abs().max())


def cases():
    for name in KINDS:
        for bits in (4, 8):
            is_quick = name in QUICK and bits == 4
            yield pytest.param(name, bits, marks=() if is_quick else pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits"), list(cases()))
def test_a_layer_kind_is_stored_as_integers_and_computes_the_same(name, bits, tmp_path):
    prepared, quantized, inputs = quantize_uniformly(name, bits)
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx", container="int8")
    with torch.no_grad():
        expected = quantized(inputs).numpy()
    assert np.abs(run(path, inputs) - expected).max() <= last_step(quantized) * 1.01
    check_stored(path, name, prepared)
    check_kernels(path, inputs, tmp_path / "optimised.onnx")


def check_stored(path, name, prepared):
    """Every weight once and as integers, every bias as int32."""
    weights = [site for site in prepared.inventory.sites if site.kind == "weight"]
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    smallest = min(site.numel for site in weights)
    stored = Counter(x.size for x in held.values() if x.dtype in INTEGERS and x.size >= smallest)
    floats = [name for name, x in held.items() if x.dtype == np.float32 and x.size > 1 and "scale" not in name]
    biases = [x for name, x in held.items() if name.endswith("bias") and x.dtype == np.int32]
    assert stored == Counter(site.numel for site in weights)
    assert floats == FLOAT_BIASES.get(name, [])
    assert len(biases) + len(floats) == sum(name.endswith("bias") for name, _ in KINDS[name][0]().named_parameters())


def check_kernels(path, inputs, optimised):
    """Every convolution is an integer kernel but one that gives the output, and transposed ones: there is none."""
    run(path, inputs, LEVELS.ORT_ENABLE_ALL, optimised)
    graph = onnx.load(path).graph
    outputs = {value.name for value in graph.output}
    inner = [node for node in graph.node if node.op_type == "Conv" and not outputs & set(node.output)]
    assert sum(node.op_type == "QLinearConv" for node in onnx.load(optimised).graph.node) == len(inner)

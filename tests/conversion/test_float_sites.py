"""The bit-width 16: weights in float16, activations in float, and the integer kernels that are given up for them."""

import onnx
import onnxruntime
import pytest
import torch
from networks import ResidualNet, randomise_norms
from torch import nn

import infoq_fx
from infoq_fx.demo import digits, train_digits_net
from infoq_fx.quantization.custom_ops import dequantize_op, quantize_dequantize_op

IMAGES = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(5))
FRAGILE = "blocks.1.conv2"
ALL_BITS = (2, 3, 4, 5, 6, 7, 8, 16)


@pytest.fixture(scope="module")
def prepared():
    torch.manual_seed(1)
    model = randomise_norms(ResidualNet()).eval()
    return infoq_fx.prepare(model, IMAGES, bits=(4, 8, 16), activation_bits=(8, 16))


def allocate(prepared, **floats):
    """All sites at 8 bits, but those in float."""
    bits = dict.fromkeys((site.name for site in prepared.inventory.sites), 8) | floats
    return infoq_fx.Allocation(bits=bits)


def run_file(path, x, level=onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.graph_optimization_level = 1, level
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def sqnr_decibels(found, expected):
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    return float(10 * torch.log10(expected.var() / (found - expected).square().mean().clamp_min(1e-30)))


def test_all_in_float_is_the_float_model_with_float16_weights():
    torch.manual_seed(1)
    model = randomise_norms(ResidualNet()).eval()
    quantized = infoq_fx.quantize(model, 16, calibration_data=IMAGES, bits=16, activation_bits=16, progress=False)
    expected = model(IMAGES).detach()
    assert not any(node.target is quantize_dequantize_op for node in quantized.graph.nodes)
    stored = [quantized.get_buffer(str(n.args[0].target)) for n in quantized.graph.nodes if n.target is dequantize_op]
    assert {tensor.dtype for tensor in stored} == {torch.float16}
    torch.testing.assert_close(quantized(IMAGES), expected, rtol=0, atol=5e-3)
    assert not torch.equal(quantized(IMAGES), expected)


def test_a_site_in_float_frees_the_tensors_that_were_quantized_for_its_kernels(prepared):
    inventory = prepared.inventory
    following = {site.name: site.follows for site in inventory.sites if site.follows}
    assert following["head.input"] == ("head.weight",)
    for name, leaders in following.items():
        for leader in leaders:
            assert inventory.complete_floats({leader: 16})[name] == 16
            assert name not in inventory.complete_floats({leader: 8})
    assert inventory.complete_floats({"head.weight": 16, "head.input": 8}) == {"head.weight": 16, "head.input": 16}
    assert "blocks.0.conv2.weight" in following["blocks.0.conv2.output"]


def test_runs_over_integers_and_over_floats_agree(prepared):
    """The interpreter that scores are measured with, the converted module and the file."""
    from infoq_fx.core.data import read_data
    from infoq_fx.runtime.forward import hold_outputs

    data = read_data(IMAGES).named(prepared.input_names)
    for floats in (
        {"blocks.0.conv2.weight": 16},
        {"blocks.1.conv1.input": 16},
        {"head.weight": 16, "stem.0.input": 16},
    ):
        bits = prepared.inventory.complete_floats(floats)
        quantized = infoq_fx.convert(prepared, allocate(prepared, **bits))
        found = hold_outputs(prepared, data, floats).rows(0, 64)[0]
        # Sums over floats differ in their last digits, and some values are then rounded to another step.
        assert sqnr_decibels(found, quantized(IMAGES)) > 35


@pytest.mark.parametrize("container", ["exact", pytest.param("int8", marks=pytest.mark.slow)])
def test_the_file_holds_float16_and_computes_what_the_module_computes(prepared, tmp_path, container):
    bits = prepared.inventory.complete_floats({"blocks.0.conv2.weight": 16, "head.input": 16})
    quantized = infoq_fx.convert(prepared, allocate(prepared, **bits))
    path = infoq_fx.export_onnx(quantized, tmp_path / "m.onnx", container=container)
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        found = run_file(path, IMAGES, getattr(onnxruntime.GraphOptimizationLevel, level))
        assert sqnr_decibels(found, quantized(IMAGES)) > 35
    halves = [t for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]
    assert [list(t.dims) for t in halves] == [list(prepared.inventory["blocks.0.conv2.weight"].shape)]
    assert "sound" in infoq_fx.verify_onnx(path, quantized, IMAGES).verdict
    infoq_fx.save_quantized(quantized, tmp_path / "m.pt2")
    assert torch.equal(infoq_fx.load_quantized(tmp_path / "m.pt2")(IMAGES), quantized(IMAGES))


class Shared(nn.Module):
    """A tensor that two convolutions read, and one that a single layer reads."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide, self.narrow = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.last, self.head = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((self.last(self.wide(x).relu()).relu() + self.narrow(x)).mean((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("pin", "wide"),
        ("ignore", "last"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("pin", "last"), ("pin", "head"), ("ignore", "wide"), ("ignore", "head")]
        ),
    ],
)
def test_a_layer_in_float_reads_floats(option, name, tmp_path):
    """Between QuantizeLinear and DequantizeLinear, onnxruntime would quantize its weight to 8 bits."""
    given = {"pin": {name: 16}} if option == "pin" else {"ignore": [name]}
    common = {"calibration_data": IMAGES, "recovery": "none", "progress": False}
    quantized = infoq_fx.quantize(Shared().eval(), 16.0, bits=8, **given, **common)
    path = infoq_fx.export_onnx(quantized, tmp_path / "m.onnx")
    graph = onnx.load(path).graph
    made_by = {output: node for node in graph.node for output in node.output}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    in_float = [node for node in layers if made_by.get(node.input[1], node).op_type != "DequantizeLinear"]
    assert len(in_float) == 1
    assert made_by[in_float[0].input[0]].op_type != "DequantizeLinear"
    assert sqnr_decibels(run_file(path, IMAGES), quantized(IMAGES)) > 45


def test_weights_beyond_the_range_of_float16_keep_their_digits(tmp_path):
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    with torch.no_grad():
        layer.weight[1] *= 1e6
        layer.weight[2] *= 1e-7
    x = torch.randn(64, 8)
    quantized = infoq_fx.quantize(layer, 16.0, calibration_data=x, bits=16, activation_bits=16, progress=False)
    path = infoq_fx.export_onnx(quantized, tmp_path / "m.onnx")
    expected, found, in_file = layer(x).detach(), quantized(x), run_file(path, x)
    for column in range(4):
        assert sqnr_decibels(found[:, column], expected[:, column]) > 60
        assert sqnr_decibels(in_file[:, column], found[:, column]) > 100


def test_a_trained_module_keeps_its_floats(prepared):
    bits = prepared.inventory.complete_floats({"blocks.0.conv2.weight": 16, "head.input": 16})
    quantized = infoq_fx.convert(prepared, allocate(prepared, **bits))
    trainable = infoq_fx.to_trainable(quantized)
    torch.testing.assert_close(trainable(IMAGES), quantized(IMAGES), rtol=0, atol=1e-5)
    assert trainable.get_parameter("blocks.0.conv2.weight").requires_grad
    with torch.no_grad():
        trainable.get_parameter("blocks.0.conv2.weight").mul_(1.5)
    back = infoq_fx.to_quantized(trainable)
    torch.testing.assert_close(back(IMAGES), trainable(IMAGES), rtol=0, atol=5e-3)
    assert infoq_fx.allocation_of(back).bits == infoq_fx.allocation_of(quantized).bits


@pytest.mark.parametrize("recovery", ["fast", pytest.param("best", marks=pytest.mark.slow)])
def test_recovery_leaves_floats_alone(prepared, recovery):
    bits = prepared.inventory.complete_floats({"blocks.0.conv2.weight": 16, "head.input": 16})
    allocation = allocate(prepared, **bits | {"blocks.1.conv1.weight": 4})
    steps = ["second_order_rounding", "block_reconstruction", "output_tuning"][: 1 if recovery == "fast" else 3]
    recovered = infoq_fx.recover(prepared, allocation, IMAGES, steps, progress=False)
    quantized = infoq_fx.convert(recovered, allocation)
    weight = infoq_fx.convert(prepared, allocation).get_buffer("blocks.0.conv2.weight")
    assert torch.equal(quantized.get_buffer("blocks.0.conv2.weight"), weight)


@pytest.fixture(scope="module")
def fragile():
    """A trained network, one layer of which has huge weights for a channel that is always zero."""
    (images, labels), _ = digits()
    model = train_digits_net(images, labels, epochs=3).eval()
    with torch.no_grad():
        block = model.blocks[1]
        block.bn1.weight[3], block.bn1.bias[3] = 0, -1
        block.conv2.weight[:, 3] = 20
    return model, images[:512]


@pytest.mark.slow
def test_float_is_chosen_for_the_fragile_layer_and_for_no_other(fragile, tmp_path):
    model, images = fragile
    common = {"calibration_data": images, "progress": False}
    quantized = infoq_fx.quantize(model, infoq_fx.Budget(size_bytes=32_000), bits=ALL_BITS, **common)
    found = infoq_fx.allocation_of(quantized)
    weights = {name: bits for name, bits in found.bits.items() if name.endswith("weight")}
    assert [name for name, bits in weights.items() if bits == 16] == [f"{FRAGILE}.weight"]
    assert found.lost_nats < 0.1 * infoq_fx.allocation_of(infoq_fx.quantize(model, 8.0, bits=8, **common)).lost_nats
    path = infoq_fx.export_onnx(quantized, tmp_path / "m.onnx")
    pinned = infoq_fx.quantize(model, 16.0, bits=8, pin={FRAGILE: 16}, recovery="none", **common)
    wider = infoq_fx.export_onnx(pinned, tmp_path / "wider.onnx")
    assert infoq_fx.measure_file(path).total_bytes < infoq_fx.measure_file(wider).total_bytes
    assert "sound" in infoq_fx.verify_onnx(path, quantized, images).verdict


def test_criteria_that_cannot_score_floats_say_so(prepared):
    with pytest.raises(infoq_fx.OptionError, match="scores no tensors in float"):
        infoq_fx.score(prepared, IMAGES, criterion="output_kl", progress=False)


class Product(nn.Module):
    """A product of two activations, each with a channel far above the others that the other multiplies by 0."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.head = (nn.Linear(8, 8, bias=False) for _ in range(3))
        with torch.no_grad():
            for channel, (large, small) in enumerate([(self.left, self.right), (self.right, self.left)]):
                large.weight[channel] *= 2000
                small.weight[channel] = 0

    def forward(self, x):
        return self.head(self.left(x) @ self.right(x).transpose(1, 2) @ x).sum(1)


def test_both_operands_of_a_product_are_in_float_where_both_lose_much():
    prepared = infoq_fx.prepare(Product().eval(), torch.randn(96, 6, 8), bits=8, activation_bits=(8, 16))
    left, right = (site for site in prepared.inventory.sites if site.name in ("matmul.left", "matmul.right"))
    assert (left.follows, right.follows) == ((), ("matmul.left",))
    table = infoq_fx.score(prepared, torch.randn(96, 6, 8), progress=False)
    gains = {name: by_bits[8].value for name, by_bits in table.scores.items()}
    assert gains["matmul.left"] > gains["matmul.right"]
    found = infoq_fx.allocate(table, infoq_fx.Budget(weight_bits=8.0))
    assert found.bits["matmul.left"] == found.bits["matmul.right"] == 16


def test_both_operands_of_an_addition_are_in_float_where_one_is(prepared, tmp_path):
    """Only so much: the addition before it keeps its operands, as a convolution reads its sum at 8 bits."""
    floats = prepared.inventory.complete_floats({f"{FRAGILE}.weight": 16})
    (first, _) = (site.name for site in prepared.inventory.sites if ".add" in site.name)
    assert set(floats) == {f"{FRAGILE}.{part}" for part in ("weight", "input", "output")} | {first}
    quantized = infoq_fx.convert(prepared, allocate(prepared, **floats))
    path = infoq_fx.export_onnx(quantized, tmp_path / "m.onnx")
    graph = onnx.load(path).graph
    made_by = {output: node.op_type for node in graph.node for output in node.output}
    operands = [[made_by[name] for name in node.input] for node in graph.node if node.op_type == "Add"]
    assert operands == [["DequantizeLinear"] * 2, ["Conv", "Relu"]]
    assert sqnr_decibels(run_file(path, IMAGES), quantized(IMAGES)) > 35


def test_the_operands_of_a_sum_that_is_read_in_float_are_in_float(prepared):
    floats = prepared.inventory.complete_floats({"blocks.1.conv1.input": 16})
    (first, _) = (site.name for site in prepared.inventory.sites if ".add" in site.name)
    assert set(floats) == {"blocks.1.conv1.input", first, "blocks.0.conv2.output", "stem.0.output"}


class Sums(nn.Module):
    """Sums that only sums read, one that two sums read, and the output of a convolution as an operand."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))

    def forward(self, x):
        stem = self.stem(x).relu()
        a, b, c, d = (conv(stem) for conv in self.convs)
        pooled = nn.functional.max_pool2d(stem, 3, 1, 1)
        one = pooled + a
        two = one + b
        three = (two + c) + (two + d)
        return self.head(three.mean((2, 3)))


def test_operands_follow_along_a_chain_of_additions():
    prepared = infoq_fx.prepare(Sums().eval(), IMAGES, bits=(8, 16))
    inventory = prepared.inventory
    fixed = {s.name: s.follows for s in inventory.sites if s.kind == "activation" and not s.is_searched}
    pooled, one, two, *_ = (name for name in fixed if "pool" in name or "add" in name)
    in_float = {name: set(inventory.complete_floats({f"convs.{i}.weight": 16})) for i, name in enumerate("abcd")}
    convs = {name: f"convs.{i}.output" for i, name in enumerate("abcd")}
    assert pooled in in_float["a"]
    assert one not in in_float["a"]
    assert {one, pooled} <= in_float["b"]  # the sum of the first addition is read in float, and by nothing else
    assert not in_float["c"] & {one, two, pooled}  # the other addition that reads it has a kernel
    for name, found in in_float.items():  # outputs of convolutions keep their kernels
        assert found & set(convs.values()) == {convs[name]}


def test_without_floats_no_site_follows():
    prepared = infoq_fx.prepare(Sums().eval(), IMAGES, activation_bits=(4, 8))
    assert {site.follows for site in prepared.inventory.sites} == {()}
    assert not any(16 in quantizer.calibrated_bits for _, quantizer in prepared.quantizer_nodes())

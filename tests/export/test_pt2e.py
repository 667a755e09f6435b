import builtins
import importlib
import subprocess
import sys

import pytest
import torch
from networks import ResidualNet, randomise_norms
from torch import nn

import infoq_fx
from infoq_fx.graph.float_interpreter import read_weight
from infoq_fx.quantization import numerics
from infoq_fx.quantization.weight_qparams import choose_weight_qparams
from infoq_fx.types import Allocation, QuantSpec

pytest.importorskip("torchao", reason="the extra infoq-fx[torchao] is not installed")
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

pytestmark = pytest.mark.slow  # of features that few models meet

IMAGES = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(5))
DEQUANTIZE_WEIGHT = "quantized_decomposed.dequantize_per_channel.default"
QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"
LAYERS = {torch.ops.aten.conv2d.default, torch.ops.aten.linear.default}


@pytest.fixture(scope="module")
def case():
    """A model, an allocation of mixed bits, its conversions without and with recovery."""
    torch.manual_seed(1)
    model = randomise_norms(ResidualNet(channels=8)).eval()
    prepared = infoq_fx.prepare(model, IMAGES, activation_bits=(5, 8), levels="uniform")
    bits = {s.name: 3 + i % 4 if s.kind == "weight" else s.bits[-1] for i, s in enumerate(prepared.inventory.sites)}
    bits["head.input"] = 5
    allocation = Allocation(bits=bits)
    recovered = infoq_fx.recover(prepared, allocation, IMAGES, progress=False)
    return model, allocation, infoq_fx.convert(prepared, allocation), infoq_fx.convert(recovered, allocation)


def exported(model, x=IMAGES):
    return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()


def through_torchao(model, quantizer, x=IMAGES):
    prepared = prepare_pt2e(exported(model, x), quantizer)
    prepared(x)
    return convert_pt2e(prepared)


def layers_of(converted):
    """Operands of every layer: (weight's dequantize node, input's dequantize node), by weight path in graph order."""
    return [node.args[:2] for node in converted.graph.nodes if node.target in LAYERS]


def sqnr_decibels(found, expected):
    noise = (found - expected).detach().square().sum()
    return float(10 * torch.log10(expected.detach().square().sum() / noise))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_every_node_has_the_bits_of_the_allocation(dtype, case):
    model, allocation, _, _ = case
    converted = through_torchao(model, infoq_fx.InfoqQuantizer(allocation, activation_dtype=dtype))
    names = [name.removesuffix(".weight") for name in allocation.bits if name.endswith(".weight")]
    layers = layers_of(converted)
    assert len(layers) == len(names) == 6
    for name, (x, weight) in zip(names, reversed(layers) if names[0] == "head" else layers, strict=True):
        bits = allocation.bits[f"{name}.weight"]
        stored, scale, _, axis, low, high, _ = weight.args
        assert str(weight.target) == DEQUANTIZE_WEIGHT
        assert (axis, low, high) == (0, -(1 << (bits - 1)), (1 << (bits - 1)) - 1)
        integers = converted.get_buffer(stored.target)
        assert integers.dtype == torch.int8
        assert integers.min() >= low
        assert integers.max() <= high
        assert converted.get_buffer(scale.target).shape == integers.shape[:1]
        *_, low, high, found = x.args
        assert found == dtype
        assert high - low == 2 ** allocation.bits[f"{name}.input"] - 1
        assert low == (0 if dtype == torch.uint8 else -(high + 1))


def test_operands_of_residual_additions_are_quantized(case):
    model, allocation, _, _ = case
    converted = through_torchao(model, infoq_fx.InfoqQuantizer(allocation))
    additions = [node for node in converted.graph.nodes if node.target is torch.ops.aten.add.Tensor]
    assert len(additions) == 2
    assert all("dequantize" in str(operand.target) for node in additions for operand in node.args)


def test_an_allocation_gives_the_integers_of_least_error(case):
    model, allocation, quantized, _ = case
    converted = through_torchao(model, infoq_fx.InfoqQuantizer(allocation))
    held = {tuple(x.flatten().tolist()) for x in converted.buffers() if x.dtype == torch.int8}
    specs = {name: QuantSpec(bits=b, symmetric=True, channel_axis=0) for name, b in allocation.bits.items()}
    folded = infoq_fx.prepare(model, activation_bits=None, example_inputs=IMAGES[:2])  # nothing moves into its weights
    weights = {m.site.name: read_weight(folded, node) for node, m in folded.quantizer_nodes()}
    chosen = {name: choose_weight_qparams(x, specs[name]) for name, x in weights.items()}
    ours = {tuple(numerics.quantize(x, chosen[name]).flatten().tolist()) for name, x in weights.items()}
    assert held == ours
    # Activations are observed by torchao: the same bits, other ranges.
    found, expected = converted(IMAGES), quantized(IMAGES)
    assert sqnr_decibels(found, expected) > sqnr_decibels(expected, model(IMAGES)) + 3


@pytest.mark.parametrize("recovered", [False, True])
def test_a_quantized_module_is_taken_over(recovered, case):
    model, _, *both = case
    quantized = both[recovered]
    before = {name: x.clone() for name, x in model.state_dict().items()}
    converted = through_torchao(model, infoq_fx.InfoqQuantizer(quantized))
    found, expected = converted(IMAGES), quantized(IMAGES)
    assert sqnr_decibels(found, expected) > 30
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.slow
def test_clamps_are_taken_over_with_the_factors_in_the_weights():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3), nn.ReLU6(inplace=True), nn.Flatten())
    model = nn.Sequential(*model, nn.Linear(128, 4)).eval()
    with torch.no_grad():
        model[0].weight.mul_(30)
    quantized = infoq_fx.quantize(model, 6, calibration_data=IMAGES, progress=False)
    bounds = [node.args[2] for node in quantized.graph.nodes if node.target is torch.ops.aten.hardtanh.default]
    assert len(bounds) == 2
    assert any(abs(bound - 6) > 0.01 for bound in bounds)
    found = through_torchao(model, infoq_fx.InfoqQuantizer(quantized))(IMAGES)
    assert sqnr_decibels(found, quantized(IMAGES)) > 30
    other = nn.Sequential(*(nn.ReLU() if isinstance(m, nn.ReLU6) else m for m in model)).eval()
    with pytest.raises(infoq_fx.OptionError, match="prepare the model that it was made from"):
        through_torchao(other, infoq_fx.InfoqQuantizer(quantized))


@pytest.mark.parametrize("levels", ["codebook", "uniform"])
def test_codebooks_are_told(levels, caplog):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    x = torch.randn(64, 8)
    quantized = infoq_fx.quantize(model, 3, calibration_data=x, levels=levels, progress=False)
    caplog.clear()
    infoq_fx.InfoqQuantizer(quantized)
    told = [record.getMessage() for record in caplog.records]
    assert [message for message in told if message.startswith("2 weights have codebooks")] == told
    assert bool(told) == (levels == "codebook")


def test_without_residual_additions_only_halves_round_differently():
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(64, 12)
    prepared = infoq_fx.prepare(model, x, bits=3)
    allocation = Allocation(bits={site.name: site.bits[0] for site in prepared.inventory.sites})
    quantized = infoq_fx.convert(infoq_fx.recover(prepared, allocation, x, progress=False), allocation)
    converted = through_torchao(model, infoq_fx.InfoqQuantizer(quantized), x)
    # torchao multiplies by the reciprocal of the scale, this package divides.
    found, expected = converted(x), quantized(x)
    assert float(((found - expected).abs() > 1e-6).double().mean()) < 0.1
    assert sqnr_decibels(found, expected) > 45


class Embedded(nn.Module):
    """Weights whose channels are not on the first axis: embedding, transposed convolution, matrix product."""

    def __init__(self):
        super().__init__()
        self.embedding, self.up = nn.Embedding(20, 6), nn.ConvTranspose1d(6, 6, 3)
        self.last = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return self.up(self.embedding(x).transpose(1, 2)).relu().transpose(1, 2) @ self.last


class Products(nn.Module):
    """Weights in einsum, bmm and bilinear, one of them twice, and a bag of embeddings."""

    def __init__(self):
        super().__init__()
        self.bag, self.bilinear = nn.EmbeddingBag(20, 8, mode="sum"), nn.Bilinear(8, 6, 5)
        self.shared, self.experts = nn.Parameter(torch.randn(7, 8)), nn.Parameter(torch.randn(4, 7, 6))
        self.heads = nn.Parameter(torch.randn(4, 6, 6))

    def forward(self, x):
        y = self.bag(x)
        z = torch.einsum("nd,ed->ne", y, self.shared)
        y = y + z @ self.shared
        z = torch.einsum("nd,cdk->cnk", z, self.experts).relu()
        return self.bilinear(y, torch.bmm(z, self.heads).sum(0))


class Recurrent(nn.Module):
    """Recurrent layers of two levels and a cell."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.cell, self.head = nn.GRUCell(12, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.cell(self.lstm(x)[0][:, -1]))


@pytest.mark.filterwarnings("ignore:The tensor attributes self.lstm._flat_weights:UserWarning")  # the test's export
@pytest.mark.parametrize("kind", [Embedded, Products, Recurrent], ids=lambda kind: kind.__name__)
def test_all_kinds_of_weights_are_taken_over(kind):
    """What torchao converts equals the quantized module to the last bit."""
    torch.manual_seed(0)
    x = torch.randn(32, 4, 8) if kind is Recurrent else torch.randint(0, 20, (32, 5))
    model = kind().eval()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"levels": "uniform", "refine": False, "progress": False}
    quantized = infoq_fx.quantize(model, 5.0, calibration_data=x, **options)
    converted = through_torchao(model, infoq_fx.InfoqQuantizer(quantized), x)
    with torch.no_grad():
        assert torch.equal(converted(x), quantized(x))
        assert (quantized(x) - model(x)).abs().max() > 0
    bits = infoq_fx.allocation_of(quantized).bits
    found = [node for node in converted.graph.nodes if str(node.target) == DEQUANTIZE_WEIGHT]
    weights = [site for site in infoq_fx.prepare(model, x).inventory.sites if site.kind == "weight"]
    assert len(found) >= len(weights)  # a weight that two layers read is dequantized twice
    assert {(1 << bits[site.name]) // 2 - 1 for site in weights} == {node.args[5] for node in found}
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    by_allocation = through_torchao(model, infoq_fx.InfoqQuantizer(infoq_fx.allocation_of(quantized)), x)
    assert sum(str(node.target) == DEQUANTIZE_WEIGHT for node in by_allocation.graph.nodes) == len(found)


def test_layers_that_the_allocation_does_not_know_stay_in_float(case):
    model, allocation, _, _ = case
    bits = {name: b for name, b in allocation.bits.items() if not name.startswith("head")}
    converted = through_torchao(model, infoq_fx.InfoqQuantizer(Allocation(bits=bits)))
    *_, (x, weight) = layers_of(converted)
    assert x.target is torch.ops.aten.dropout.default
    assert weight.op == "get_attr"


def test_what_xnnpack_wants_keeps_the_integers(case):
    model, allocation, _, _ = case
    plain = through_torchao(model, infoq_fx.InfoqQuantizer(allocation))
    wide = through_torchao(model, infoq_fx.InfoqQuantizer(allocation, output_bits=8, convolution_bits=8))
    *convolutions, (_, head) = layers_of(wide)
    assert all(weight.args[4:6] == (-128, 127) for _, weight in convolutions)
    assert head.args[5] < 127
    for (_, first), (_, second) in zip(layers_of(plain), layers_of(wide), strict=True):
        assert torch.equal(plain.get_buffer(first.args[0].target), wide.get_buffer(second.args[0].target))
    (output,) = [node for node in wide.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert [str(user.target) for user in output.users] == [QUANTIZE]


def test_what_cannot_be_used_is_refused(case):
    model, allocation, _, _ = case
    with pytest.raises(infoq_fx.OptionError, match="got a float"):
        infoq_fx.InfoqQuantizer(3.0)
    with pytest.raises(infoq_fx.OptionError, match=r"activation_dtype is torch\.int16"):
        infoq_fx.InfoqQuantizer(allocation, activation_dtype=torch.int16)
    with pytest.raises(infoq_fx.OptionError, match="output_bits holds 9"):
        infoq_fx.InfoqQuantizer(allocation, output_bits=9)
    other = Allocation(bits={**allocation.bits, "tail.weight": 4})
    with pytest.raises(infoq_fx.OptionError, match=r"as 'tail\.weight'; give one of this model; nearest there"):
        prepare_pt2e(exported(model), infoq_fx.InfoqQuantizer(other))


def test_importing_it_prints_nothing():
    """A new process, as torchao is imported once only."""
    done = subprocess.run([sys.executable, "-c", "import infoq_fx; infoq_fx.InfoqQuantizer"], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_without_torchao_the_extra_is_named(monkeypatch):
    find = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.startswith("torchao"):
            raise ImportError("No module named 'torchao'")
        return find(name, *arguments, **options)

    monkeypatch.delitem(sys.modules, "infoq_fx.export.pt2e")
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(infoq_fx.MissingExtraError, match=r'pip install "infoq-fx\[torchao\]"'):
        importlib.import_module("infoq_fx.export.pt2e")
    with pytest.raises(AttributeError, match="attribute InfoqQuantiser"):
        _ = infoq_fx.InfoqQuantiser

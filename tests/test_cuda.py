"""The same results on a GPU as on the CPU; skipped where there is none."""

import pytest
import torch
from networks import ResidualNet, randomise_norms
from torch import nn

import infoq_fx

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

DEVICES = ("cpu", "cuda")


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(20, 16), nn.Linear(16, 20)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, tokens):
        return self.head(self.layer(self.table(tokens)))


@pytest.fixture(scope="module", params=["images", "tokens"])
def case(request):
    torch.manual_seed(0)
    if request.param == "images":
        return randomise_norms(ResidualNet()).eval(), torch.randn(256, 1, 8, 8)
    return Tokens().eval(), torch.randint(0, 20, (256, 12))


@pytest.fixture(autouse=True)
def without_tf32():
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


def test_rounding_to_nearest_gives_the_same_integers(case):
    model, data = case
    on_cpu, on_gpu = (
        infoq_fx.quantize(
            model, 4.0, calibration_data=data, bits=4, recovery="none", refine=False, device=device, progress=False
        )
        for device in DEVICES
    )
    expected = on_cpu.state_dict()
    for name, x in on_gpu.state_dict().items():
        assert x.device.type == "cuda"
        assert (
            torch.equal(x.cpu(), expected[name]) or not x.is_floating_point() or torch.allclose(x.cpu(), expected[name])
        )
    assert torch.allclose(on_gpu(data.cuda()).cpu(), on_cpu(data), atol=1e-3)


@pytest.mark.parametrize("criterion", ["infoq", "output_kl", "weight_mse", "infoq_paper"])
def test_scores_are_those_of_the_cpu(case, criterion):
    model, data = case
    tables = [
        infoq_fx.score(
            infoq_fx.prepare(model, data, device=device, bits=(2, 3, 8)),
            data,
            criterion=criterion,
            recovery="none",
            progress=False,
        )
        for device in DEVICES
    ]
    for site, scores in tables[0].scores.items():
        for bits, score in scores.items():
            assert tables[1].scores[site][bits].value == pytest.approx(score.value, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("recovery", ["fast", "best"])
def test_recovery_and_export_work_from_the_gpu(case, recovery, tmp_path):
    model, data = case
    quantized = infoq_fx.quantize(
        model, 3.0, calibration_data=data, recovery=recovery, device="cuda", progress=False, memory_limit=64 << 20
    )
    assert {x.device.type for x in quantized.state_dict().values()} == {"cuda"}
    path = infoq_fx.export_onnx(quantized, tmp_path / "model.onnx")
    assert infoq_fx.verify_onnx(path, quantized, data[:64]).is_sound


def test_finetuning_works_on_the_gpu(case):
    model, data = case
    prepared = infoq_fx.prepare(model, data, bits=4, device="cuda")
    allocation = infoq_fx.Allocation(bits={site.name: site.bits[0] for site in prepared.inventory.sites})
    quantized = infoq_fx.convert(prepared, allocation)
    found = infoq_fx.finetune(quantized, data, teacher=model, epochs=1, progress=False)
    assert {x.device.type for x in found.state_dict().values()} == {"cuda"}


def test_a_compiled_module_gives_the_values_of_the_eager_one(case):
    model, data = case
    quantized = infoq_fx.quantize(model, 4.0, calibration_data=data, bits=4, device="cuda", progress=False)
    with torch.no_grad():
        assert torch.allclose(torch.compile(quantized)(data.cuda()), quantized(data.cuda()), atol=1e-3)

"""The trainable graph in frameworks that own the loop; each is tried where it is installed."""

import onnxruntime
import pytest
import torch
from networks import ResidualNet, randomise_norms
from torch.nn import functional

import infoq_fx

pytestmark = pytest.mark.slow


@pytest.fixture
def case():
    torch.manual_seed(2)
    model = randomise_norms(ResidualNet()).eval()
    images = torch.randn(128, 1, 8, 8)
    quantized = infoq_fx.quantize(model, 2, calibration_data=images, recovery="none", progress=False)
    return model, images, quantized


def mean_nats(model, student, images):
    with torch.no_grad():
        return float(divergence(model, student, images))


def divergence(model, student, images):
    with torch.no_grad():
        wanted = model(images).log_softmax(1)
    return functional.kl_div(student(images).log_softmax(1), wanted, reduction="batchmean", log_target=True)


def check(case, trained, folder):
    model, images, quantized = case
    tuned = infoq_fx.to_quantized(trained)
    assert mean_nats(model, tuned, images) < 0.8 * mean_nats(model, quantized, images)
    assert infoq_fx.allocation_of(tuned).bits == infoq_fx.allocation_of(quantized).bits
    session = onnxruntime.InferenceSession(infoq_fx.export_onnx(tuned, folder / "tuned.onnx"))
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(session.run(None, {"x": images.numpy()})[0]), tuned(images))


def test_accelerate(case, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")
    model, images, quantized = case
    accelerator = accelerate.Accelerator(cpu=True)
    trainable = infoq_fx.to_trainable(quantized)
    optimizer = torch.optim.Adam(trainable.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), batch_size=32, shuffle=True)
    student, optimizer, loader = accelerator.prepare(trainable, optimizer, loader)
    for _ in range(10):
        for (batch,) in loader:
            optimizer.zero_grad()
            accelerator.backward(divergence(model, student, batch))
            accelerator.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
    check(case, accelerator.unwrap_model(student), tmp_path)


@pytest.mark.filterwarnings("ignore")  # Lightning's own use of what torch deprecates
def test_lightning(case, tmp_path):
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")
    model, images, quantized = case

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.student = infoq_fx.to_trainable(quantized)

        def training_step(self, batch, index):
            return divergence(model, self.student, batch[0])

        def configure_optimizers(self):
            return torch.optim.Adam(self.student.parameters(), lr=1e-3)

    task = Task()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), batch_size=32, shuffle=True)
    trainer = lightning.Trainer(
        max_epochs=10,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(task, loader)
    check(case, task.student, tmp_path)

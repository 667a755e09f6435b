"""Train a quantized model in your own training loop, and convert it back to integers.

Run it:  python examples/finetune_in_your_own_loop.py

``infoq_fx.finetune(quantized, images)`` does the same in one call, with held-out images and checkpoints. Use your own
loop for custom losses, data and schedules, or with Lightning and Accelerate: a trainable model is a plain
``nn.Module`` and works with ``torch.compile``.
"""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch.nn import functional

import infoq_fx
from infoq_fx.demo import digits, train_digits_net

EPOCHS = 9

(images, labels), (test_images, test_labels) = digits()


def top1(logits):
    return 100 * (torch.as_tensor(logits).argmax(1) == test_labels).double().mean().item()


# 1. Two bits for weights and activations, rounded to nearest, so that there is much to learn.
model = train_digits_net(images, labels, epochs=8)
options = {"bits": 2, "activation_bits": 2, "recovery": "none", "progress": False}
quantized = infoq_fx.quantize(model, 2.0, calibration_data=images[:256], **options)
with torch.no_grad():
    print(f"float {top1(model(test_images)):.1f} %, quantized {top1(quantized(test_images)):.1f} %")

# 2. The same model with float parameters, quantized in each forward pass. Initially the outputs are identical.
trainable = infoq_fx.to_trainable(quantized)
with torch.no_grad():
    assert torch.equal(trainable(test_images), quantized(test_images))

# 3. Any training loop. Here the float model is the teacher, so that no labels are needed and images can be shifted.
#    Step sizes are learned as well: they are few and sensitive, so their learning rate is lower. Gradients are clipped,
#    since batch norms are folded and nothing else bounds an update.
steps = [p for name, p in trainable.named_parameters() if name.endswith("quantizer.scale")]
others = [p for name, p in trainable.named_parameters() if not name.endswith("quantizer.scale")]
optimizer = torch.optim.Adam([{"params": others, "lr": 3e-3}, {"params": steps, "lr": 3e-4}])
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * -(-len(images) // 64))
torch.manual_seed(0)
for epoch in range(EPOCHS):
    total = 0.0
    for rows in torch.randperm(len(images)).split(64):
        shift = tuple(torch.randint(-1, 2, (2,)).tolist())
        batch = torch.roll(images[rows], shift, (2, 3))
        with torch.no_grad():
            wanted = model(batch).log_softmax(1)
        found = trainable(batch).log_softmax(1)
        loss = functional.kl_div(found, wanted, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        torch.nn.utils.clip_grad_norm_(steps, 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item() * len(rows) / len(images)
    if epoch % 3 == 2:
        print(f"epoch {epoch + 1}: {total:.3f} nats from the float model")

# 4. Convert back to integers at the same bit-widths, and export like any other quantized model.
tuned = infoq_fx.to_quantized(trainable)
with tempfile.TemporaryDirectory() as folder:
    path = infoq_fx.export_onnx(tuned, Path(folder) / "digits.onnx")
    session = onnxruntime.InferenceSession(path)
    in_runtime = session.run(None, {"x": test_images.numpy()})[0]
with torch.no_grad():
    print(f"trained {top1(tuned(test_images)):.1f} %, in onnxruntime {top1(in_runtime):.1f} %")

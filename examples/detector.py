"""Quantize a detector with two heads: what the boxes are is said by ``outputs``, what the scores are by the labels.

Run it:  python examples/detector.py

Two digits are put into an image of 8 x 16 pixels, one in each half. For each half the network gives the logits of the
digit and its box: the rows and columns that have ink. Both heads count when bit-widths are chosen.
"""

import torch
from torch import nn
from torch.nn import functional

import infoq_fx
from infoq_fx.demo import digits


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()
        )
        self.scores = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 10, 4, stride=4))
        self.boxes = nn.Sequential(nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 4, stride=4))

    def forward(self, images):
        features = self.trunk(images)
        return {"scores": self.scores(features).squeeze(2), "boxes": self.boxes(features).squeeze(2)}


def make_pairs(images, labels, seed=0):
    """Images [pairs, 1, 8, 16], digits [pairs, 2], and boxes [pairs, 4, 2] in pixels: top, bottom, left, right."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    left, right = order[: len(order) // 2], order[len(order) // 2 : len(order) // 2 * 2]
    ink = images > images.min() + 0.5
    places = torch.arange(8.0)

    def edges(has_ink):
        low = torch.where(has_ink, places, 8.0).amin(1)
        return low, torch.where(has_ink, places, -1.0).amax(1)

    boxes = torch.stack([*edges(ink.any(3).any(1)), *edges(ink.any(2).any(1))], 1)
    pairs = torch.cat([images[left], images[right]], 3)
    return pairs, torch.stack([labels[left], labels[right]], 1), torch.stack([boxes[left], boxes[right]], 2)


def measure(outputs, labels):
    """Percent of right digits."""
    return 100 * float((outputs["scores"].argmax(1) == labels).double().mean())


(images, labels), (test_images, test_labels) = digits()
pairs, wanted, boxes = make_pairs(images, labels)
torch.manual_seed(0)
model = Detector()
optimizer = torch.optim.Adam(model.parameters(), 3e-3)
for _ in range(60):
    for rows in torch.randperm(len(pairs)).split(64):
        outputs = model(pairs[rows])
        loss = functional.cross_entropy(outputs["scores"], wanted[rows])
        loss = loss + 0.1 * functional.mse_loss(outputs["boxes"], boxes[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
model.eval()

# 1. The labels [n, 2] fit the scores [n, 10, 2]: classes along axis 1. The boxes are said to be a quantity, which the
#    default would find too.
quantized = infoq_fx.quantize(
    model, 4.0, calibration_data=[(pairs, wanted)], outputs={"boxes": infoq_fx.Quantity(axis=1)}, progress=False
)
print(infoq_fx.summarize(quantized))

# 2. Both heads are near the float model's.
unseen, unseen_digits, _ = make_pairs(test_images, test_labels)
with torch.no_grad():
    before, after = model(unseen), quantized(unseen)
for name in before:
    noise = (before[name] - after[name]).square().mean() / before[name].square().mean()
    print(f"{name}: SQNR {-10 * float(noise.log10()):.1f} dB")
print(f"right digits: {measure(before, unseen_digits):.1f} % in float, {measure(after, unseen_digits):.1f} % quantized")

# 3. The file has both outputs, and verification compares both.
infoq_fx.export_onnx(quantized, "detector.onnx")
print(infoq_fx.verify_onnx("detector.onnx", quantized, [(unseen, unseen_digits)], metric=measure))

"""Quantize a transformer, and show what is quantized and what stays in float.

Run it:  python examples/transformer.py

Linear layers and the two matrix products of attention are sites; softmax, layer norms and embeddings stay in float.
The model reads each row of a digit as a token. Any model that ``torch.export`` can capture works in the same way. If a
model has named inputs, batches are dicts.
"""

import torch
from torch import nn
from torch.nn import functional

import infoq_fx
from infoq_fx.demo import digits


class RowTransformer(nn.Module):
    def __init__(self, width=32, heads=4, layers=2):
        super().__init__()
        self.embedding = nn.Linear(8, width)
        self.position = nn.Parameter(0.02 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images):
        rows = self.embedding(images.squeeze(1)) + self.position
        return self.head(self.encoder(rows).mean(1))


def train(model, images, labels, epochs):
    steps = epochs * -(-len(images) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


torch.manual_seed(0)
(images, labels), (test_images, test_labels) = digits()
model = train(RowTransformer(), images, labels, epochs=12)


def top1(model):
    with torch.no_grad():
        return 100 * (model(test_images).argmax(1) == test_labels).double().mean().item()


# 1. The sites, by module paths: weights, and the activations that enter linear layers and matrix products.
prepared = infoq_fx.prepare(model, images[:256], bits=(2, 3, 4, 8))
print(prepared)

# 2. The classifier is small, so that leaving it in float costs little. ``ignore`` takes glob patterns.
quantized = infoq_fx.quantize(
    model, 4.0, calibration_data=images[:256], bits=(2, 3, 4, 8), ignore=["head"], progress=False
)
print(infoq_fx.summarize(quantized))
print(f"float {top1(model):.1f} %, quantized {top1(quantized):.1f} %")

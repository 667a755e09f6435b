"""Quantize a small language model: integer tokens in, logits of every token out.

Run it:  python examples/language_model.py

The model learns which letter follows in the words of the Zen of Python. That its output is a distribution over letters
at every position is known from its input: integers, with a value for each of them in the output.
"""

import contextlib
import io

import torch
from torch import nn
from torch.nn import functional

import infoq_fx

LENGTH = 16
with contextlib.redirect_stdout(io.StringIO()) as printed:
    import this  # noqa: F401  # it prints the text

text = printed.getvalue().lower()
letters = sorted(set(text))
tokens = torch.tensor([letters.index(letter) for letter in text])
rows = tokens.unfold(0, LENGTH + 1, 2)
samples, following = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


class Letters(nn.Module):
    def __init__(self, width=48):
        super().__init__()
        self.table, self.head = nn.Embedding(len(letters), width), nn.Linear(width, len(letters))
        self.position = nn.Parameter(0.1 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.register_buffer("mask", torch.full((LENGTH, LENGTH), float("-inf")).triu(1))

    def forward(self, tokens):
        return self.head(self.layers(self.table(tokens) + self.position, mask=self.mask))


def loss_per_letter(model, tokens, following):
    with torch.no_grad():
        return float(functional.cross_entropy(model(tokens).flatten(0, 1), following.flatten()))


torch.manual_seed(0)
model = Letters()
optimizer = torch.optim.Adam(model.parameters(), 3e-3)
for _ in range(25):
    for batch in torch.randperm(len(samples)).split(32):
        loss = functional.cross_entropy(model(samples[batch]).flatten(0, 1), following[batch].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
model.eval()

# 1. No labels are needed: the float model's own distributions are what the quantized one is compared with.
quantized = infoq_fx.quantize(model, 4.0, calibration_data=samples[:256], progress=False)
print(infoq_fx.summarize(quantized))

# 2. The loss of the next letter, in nats.
for name, module in (("float", model), ("quantized", quantized)):
    print(f"{name}: {loss_per_letter(module, samples, following):.3f} nats per letter")

# 3. Every token's most probable letter is compared with the module's.
infoq_fx.export_onnx(quantized, "letters.onnx")
print(infoq_fx.verify_onnx("letters.onnx", quantized, samples[:256]))

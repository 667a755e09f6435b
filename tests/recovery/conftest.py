import pytest
import torch
from networks import ResidualNet, randomise_norms
from recovered import Branches, prepare
from torch import nn


@pytest.fixture(scope="session")
def residual():
    """A trained-like residual network, prepared, with its data and an allocation of 2 and 3 bits."""
    torch.manual_seed(1)
    model = randomise_norms(ResidualNet())
    prepared, data = prepare(model, torch.randn(96, 1, 8, 8), bits=(2, 3, 8))
    sites = [site for site in prepared.inventory.sites if site.kind == "weight"]
    bits = {site.name: 8 for site in prepared.inventory.sites} | {s.name: 2 + i % 2 for i, s in enumerate(sites)}
    return prepared, data, bits


@pytest.fixture(scope="session")
def branches():
    torch.manual_seed(2)
    model = Branches()
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            nn.init.kaiming_normal_(parameter)
    return prepare(model, torch.randn(48, 2, 8, 8), bits=(2, 4, 8))

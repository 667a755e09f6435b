import pytest
import torch
from differentiated import net, prepare


@pytest.fixture(scope="session")
def small():
    torch.manual_seed(5)
    x, labels = torch.randn(24, 5), torch.randint(0, 3, (24,))
    model = net()
    return model, x, labels, *prepare(model, x, labels, activation_bits=(2, 8))

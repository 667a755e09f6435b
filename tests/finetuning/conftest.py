import pytest
from finetuned import convert, prepared_of


@pytest.fixture
def residual():
    return convert(prepared_of("residual")[2])

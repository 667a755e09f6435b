import pytest
from scored import build, score


@pytest.fixture(scope="session")
def prepared_and_data():
    return build()


@pytest.fixture(scope="session")
def table(prepared_and_data):
    return score(*prepared_and_data)

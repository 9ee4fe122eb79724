import pytest

from lsag import load_preset
from lsag.checkpoint import random_checkpoint
from tests.conftest import randomise


@pytest.fixture(scope="module")
def checkpoint():
    checkpoint = random_checkpoint(load_preset("digits-nano"))
    randomise(checkpoint.model)
    return checkpoint

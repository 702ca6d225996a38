"""What most tests of patches start from."""

import pytest
import torch
from steering import HIDDEN
from tiny import tiny_model

from refusal_kernels.direction import Direction


@pytest.fixture
def model():
    return tiny_model(eos_token_id=None)  # it generates to the end


@pytest.fixture
def direction():
    generator = torch.Generator().manual_seed(5)  # with 0 it is the first row of the embedding
    return Direction(torch.randn(HIDDEN, generator=generator) * 3)


@pytest.fixture
def directions():
    return [Direction(torch.randn(HIDDEN) * 2) for _ in range(3)]


@pytest.fixture
def tokens():
    return torch.randint(7, 30, (2, 9))

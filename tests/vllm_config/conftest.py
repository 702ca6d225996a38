"""Directions for the tests of the vLLM plugin that need no vLLM."""

import pytest
import torch

from refusal_kernels import Direction


@pytest.fixture
def directions():
    q, _ = torch.linalg.qr(torch.randn(8, 2))
    return {"r": Direction(q[:, 0] * 3), "t": Direction(q[:, 1])}

"""How active a direction is in an engine's requests: a histogram, counted on the device.

It counts the share of a direction in every token at the input of one block: the component along the
direction over the token's norm, from -1 to 1. In a steered request it is measured after the edit.
"""

import torch
from torch import Tensor, nn

from refusal_kernels.direction import Direction
from refusal_kernels.ops.registry import serving

BUCKETS = 40


def edges() -> list[float]:
    """Return the upper edges of the buckets; the last is 1."""
    return [round(-1.0 + 2.0 * (k + 1) / BUCKETS, 6) for k in range(BUCKETS)]


class Meter(nn.Module):
    """Measures the shares of one batch, into a static buffer."""

    watched: Tensor
    shares: Tensor

    def __init__(self, direction: Direction, tokens: int, device: str) -> None:
        super().__init__()
        unit = direction.unit.to(device)
        self.register_buffer("watched", unit.expand(1, 2, 1, -1).contiguous(), persistent=False)
        self.register_buffer("shares", torch.zeros(tokens, device=device), persistent=False)

    def forward(self, h: Tensor) -> None:
        """Measure the share in every row of h, [..., hidden]."""
        rows = h.reshape(-1, h.shape[-1])
        along = serving("scores", rows)(rows, self.watched, None)[:, 0]
        length = rows.float().norm(dim=-1).clamp(min=1e-30)
        self.shares[: rows.shape[0]].copy_(along / length)


class Histogram:
    """Counts the shares of all requests' tokens since the engine started."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        device = meter.shares.device
        self._edges = torch.tensor(edges()[:-1], device=device)
        self._counts = torch.zeros(BUCKETS, dtype=torch.int64, device=device)
        self._sum = torch.zeros((), dtype=torch.float64, device=device)

    def count(self, tokens: int) -> None:
        """Count the first tokens of the last batch, without waiting for the device."""
        shares = self.meter.shares[:tokens]
        bucket = torch.bucketize(shares, self._edges)
        self._counts.index_add_(0, bucket, torch.ones_like(bucket))
        self._sum += shares.double().sum()

    def clear(self) -> None:
        """Begin anew."""
        self._counts.zero_()
        self._sum.zero_()

    def read(self) -> dict[str, list[float] | list[int] | float]:
        """Return the edges, the counts between them, and the sum; this waits for the device."""
        return {"edges": edges(), "counts": self._counts.tolist(), "sum": float(self._sum)}

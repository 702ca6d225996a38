"""How active a direction is in what an engine is asked: a histogram, counted on the device.

At the input of one block the component of every token along the direction is taken, as a share of
the token's own length, so from -1 to 1. Of a steered request it is what the steering leaves.
"""

import torch
from torch import Tensor, nn

from refusal_kernels.direction import Direction

BUCKETS = 40


def edges() -> list[float]:
    """Return the upper edges of the buckets; the last is 1."""
    return [round(-1.0 + 2.0 * (k + 1) / BUCKETS, 6) for k in range(BUCKETS)]


class Meter(nn.Module):
    """Measures a stream in place; what it has seen lies in a static buffer, for one batch."""

    watched: Tensor
    seen: Tensor

    def __init__(self, direction: Direction, tokens: int, device: str) -> None:
        super().__init__()
        unit = direction.unit.to(device)
        self.register_buffer("watched", unit.expand(1, 2, 1, -1).contiguous(), persistent=False)
        self.register_buffer("seen", torch.zeros(tokens, device=device), persistent=False)

    def forward(self, h: Tensor) -> None:
        """Take the share of every row of h, [..., hidden]."""
        rows = h.reshape(-1, h.shape[-1])
        along = torch.ops.refusal_kernels.scores(rows, self.watched, None)[:, 0]
        length = rows.float().norm(dim=-1).clamp(min=1e-30)
        self.seen[: rows.shape[0]].copy_(along / length)


class Histogram:
    """What a meter saw in all batches of requests since the engine started.

    Dummy batches, of which vLLM runs many before the first request, do not count.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self._edges = torch.tensor(edges()[:-1], device=meter.seen.device)
        self._counts = torch.zeros(BUCKETS, dtype=torch.int64, device=meter.seen.device)
        self._sum = torch.zeros((), dtype=torch.float64, device=meter.seen.device)

    def count(self, tokens: int) -> None:
        """Count the first tokens of the last batch; nothing waits for the device."""
        seen = self.meter.seen[:tokens]
        bucket = torch.bucketize(seen, self._edges)
        self._counts.index_add_(0, bucket, torch.ones_like(bucket))
        self._sum += seen.double().sum()

    def read(self) -> dict[str, list[float] | list[int] | float]:
        """Return the edges, the counts below each, and the sum; this waits for the device."""
        return {
            "edges": edges(),
            "counts": self._counts.tolist(),
            "sum": float(self._sum),
        }

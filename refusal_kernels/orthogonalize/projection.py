"""The edit itself: a direction is removed from a tensor, along one of its axes."""

import torch
from torch import Tensor

from refusal_kernels.direction import Direction

BLOCK_NUMBERS = 1 << 18  # in float64 at once: 2 MiB, and as much for what is taken away


def unit(direction: Direction) -> Tensor:
    """Return the unit vector in float64."""
    return direction.vector.double() / direction.norm


def times(tensor: Tensor, axis: int, r: Tensor) -> Tensor:
    """Return the component along r, float64 [hidden], of everything along an axis: float64."""
    rows = tensor.movedim(axis, -1)
    if rows.ndim > 2:
        return torch.stack([times(part, part.ndim - 1, r) for part in rows])
    r = r.to(rows.device)
    return torch.cat([block.double() @ r for block in rows.split(max(1, BLOCK_NUMBERS // len(r)))])


def project_(tensor: Tensor, axis: int, r: Tensor) -> None:
    """Remove the component along r, float64 [hidden], from a tensor's axis, in place.

    In float64 and rounded once to the tensor's dtype, some rows at a time.
    """
    r = r.to(tensor.device)
    rows = tensor.movedim(axis, -1)
    if rows.ndim == 1:
        rows = rows.unsqueeze(0)
    if rows.ndim > 2:
        for part in rows:
            project_(part, part.ndim - 1, r)
        return
    for block in rows.split(max(1, BLOCK_NUMBERS // len(r))):
        wide = block.double()
        block.copy_(wide.sub_(torch.outer(wide @ r, r)))

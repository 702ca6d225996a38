"""The edit itself: a direction is removed from a tensor, along one of its axes."""

from collections.abc import Iterator

import torch
from torch import Tensor

from refusal_kernels.direction import Direction

BLOCK_NUMBERS = 1 << 18  # in float64 at once: 2 MiB, and as much for what is taken away


def unit(direction: Direction) -> Tensor:
    """Return the unit vector in float64."""
    return direction.vector.double() / direction.norm


def times(tensor: Tensor, axis: int, r: Tensor) -> Tensor:
    """Return the component along r, float64 [hidden], of what lies along an axis: float64."""
    if tensor.ndim > 2:
        return torch.stack([times(part, inner, r) for part, inner in _parts(tensor, axis)])
    if tensor.ndim == 1:  # a bias is a row
        return times(tensor[None], 1, r)[0]
    along = tensor.new_zeros(tensor.shape[1 - axis], dtype=torch.float64)
    for rows, block in _blocks(tensor):
        if axis == 1:
            along[rows] = block.double() @ r.to(block.device)
        else:
            along += r[rows].to(block.device) @ block.double()
    return along


def project_(tensor: Tensor, axis: int, r: Tensor) -> None:
    """Remove the component along r, float64 [hidden], in place: in float64, rounded once."""
    if tensor.ndim > 2:
        for part, inner in _parts(tensor, axis):
            project_(part, inner, r)
        return
    if tensor.ndim == 1:
        tensor, axis = tensor[None], 1
    along, r = times(tensor, axis, r), r.to(tensor.device)
    for rows, block in _blocks(tensor):
        away = torch.outer(along[rows], r) if axis == 1 else torch.outer(r[rows], along)
        block.copy_(block.double().sub_(away))


def _parts(tensor: Tensor, axis: int) -> Iterator[tuple[Tensor, int]]:
    """Take a tensor apart along another axis than that; give each part's own."""
    lead = int(axis == 0)
    for part in tensor.unbind(lead):
        yield part, axis - (axis > lead)


def _blocks(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Cut a matrix into blocks of rows."""
    step = max(1, BLOCK_NUMBERS // max(1, matrix.shape[1]))
    for at in range(0, len(matrix), step):
        rows = slice(at, at + step)
        yield rows, matrix[rows]

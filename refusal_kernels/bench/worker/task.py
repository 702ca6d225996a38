"""What a method is to do."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SteeringTask:
    """What a method is to do.

    Attributes
    ----------
    directions
        Unit vectors, float32 [programs, hidden].
    rows
        The program of every row of the batch.
    layers
        The blocks to steer, by number; None: all, and so the whole stream.
    mode
        "eager", "compile" or "graph": what is done around the method afterwards.
    variant
        What follows the colon in the name of a method.
    folder
        Holds the model's configuration and weights.
    work
        "decode" or "prefill".
    """

    directions: Tensor
    rows: list[int]
    layers: list[int] | None
    mode: str
    variant: str | None
    folder: str
    work: str

    def per_row(self, dtype: torch.dtype) -> Tensor:
        """The direction of each row, [1 or batch, 1, hidden], in the dtype of the stream."""
        one = len(self.directions) == 1
        rows = self.directions if one else self.directions[self.rows]
        return rows[:, None].to(dtype)

    def blocks(self, count: int) -> list[int]:
        """The numbers of the blocks to steer, of so many."""
        return list(range(count)) if self.layers is None else self.layers

    def refuse(self, what: str, layers: bool = False, programs: bool = True) -> None:
        """Say that some layers alone, or a program for each row, cannot be had."""
        if programs and len(self.directions) > 1:
            raise NotImplementedError(f"{what} has one direction for all rows of a batch")
        if layers and self.layers is not None:
            raise NotImplementedError(f"{what} acts on all layers")

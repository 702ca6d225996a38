"""What a method is to do."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SteeringTask:
    """What a method is to do."""

    directions: Tensor  # unit vectors, float32 [programs, hidden]
    rows: list[int]  # the program of every row of the batch
    layers: list[int] | None  # the blocks to steer; None: all, and so the whole stream
    mode: str  # "eager", "compile" or "graph": what is done around the method afterwards
    variant: str | None  # what follows the colon in the name of the method
    folder: str  # of the model's configuration and weights
    work: str  # "decode" or "prefill"

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

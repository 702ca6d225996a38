"""One point of the grid: an op at a size, the tensors that it takes, the bytes it can't avoid."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# op -> activations read and written. Bank, params and weight are not counted: they are a row or
# two, shared by all tokens.
TRAFFIC = {
    "add_steer": (2, 1),
    "add_steer_": (2, 1),
    "add_steer_rms_norm": (2, 2),
    "rms_norm": (1, 1),
    "scores": (1, 0),
    "moments_": (1, 0),
    "add_steer_backward": (1, 1),
}


@dataclass(frozen=True)
class Case:
    """An op, a dtype and a size.

    Attributes
    ----------
    tokens
        All of them; ``moments_`` takes them as ``sequences`` equally long sequences.
    """

    op: str
    dtype: str
    hidden: int
    tokens: int
    sequences: int = 1

    @property
    def tensor_bytes(self) -> int:
        """The size of one activation."""
        return self.tokens * self.hidden * DTYPES[self.dtype].itemsize

    @property
    def floor_bytes(self) -> int:
        """What any implementation must read and write: every activation once."""
        return sum(TRAFFIC[self.op]) * self.tensor_bytes

    @property
    def read_bytes(self) -> int:
        """The part of the floor that is read."""
        return TRAFFIC[self.op][0] * self.tensor_bytes

    def __str__(self) -> str:
        tokens = f"{self.sequences} x {self.tokens // self.sequences}"
        size = tokens if self.sequences > 1 else str(self.tokens)
        return f"{self.op}, {size} x {self.hidden}, {self.dtype}"


class Operands:
    """One set of buffers; no op writes to them (what works in place takes a copy).

    Attributes
    ----------
    x, residual
        [tokens, hidden], normally distributed.
    weight
        [hidden]: the norm's, which in a model differs from call to call, so every set has its own.
    unit, rounded
        [hidden]: the direction in float32, and in the dtype of x for eager code. With ``bank`` and
        ``params``, the program that ablates it, it is one for all sets, as in a model.
    """

    def __init__(self, case: Case, device: str, like: "Operands | None" = None) -> None:
        kind: dict[str, Any] = {"dtype": DTYPES[case.dtype], "device": device}
        self.case = case
        self.x = torch.randn(case.tokens, case.hidden, **kind)
        self.residual = torch.randn(case.tokens, case.hidden, **kind)
        self.weight = torch.randn(case.hidden, **kind)
        if like is not None:
            self.unit, self.rounded = like.unit, like.rounded
            self.bank, self.params = like.bank, like.params
            return
        r = torch.randn(case.hidden, dtype=torch.float64)
        self.unit = (r / r.norm()).float().to(device)
        self.rounded = self.unit.to(self.x.dtype)
        self.bank = torch.stack([self.unit, self.unit]).view(1, 2, 1, -1)
        params = [[[-1.0, 0.0, 0.0, -torch.inf, torch.inf]]]
        self.params = torch.tensor(params, device=device)

    def scores(self) -> Tensor:
        """Return float32 [tokens, slots]: what a forward pass would have saved."""
        return (self.x.float() @ self.unit).unsqueeze(-1)

    def activations(self) -> Tensor:
        """Return x as [batch, tokens, hidden]."""
        return self.x.view(self.case.sequences, -1, self.case.hidden)

    def moments(self) -> tuple[Tensor, ...]:
        """Return fresh states, the activations, and indices that feed every token into one mean."""
        device, activations = self.x.device, self.activations()
        sequences, hidden = self.case.sequences, self.case.hidden
        count = torch.zeros(1, 1, dtype=torch.int64, device=device)
        mean, m2 = torch.zeros(2, 1, 1, hidden, dtype=torch.float64, device=device)
        index = torch.zeros(activations.shape[:2], dtype=torch.int32, device=device)
        group = torch.zeros(sequences, dtype=torch.int32, device=device)
        return count, mean, m2, activations, index, group

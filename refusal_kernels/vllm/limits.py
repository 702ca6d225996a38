"""How strong a program may be: no request can make the residual stream overflow.

A row of the stream that overflows leaves NaN in the KV cache, which ruins other requests. An edit
overflows in three ways. One that reads the stream multiplies what it reads, at every place where it
acts: an ablation of strength 6 by -5, so 61 places multiply by 5**61. One that adds, adds at every
place. One that reads along one vector and writes along another, as LEACE, writes a row as long as
the product of both.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from refusal_kernels.banks import check_program
from refusal_kernels.intervention_base import Intervention

MAX_STRENGTH = 2.0  # an ablation turns the component around; a stronger one lengthens it
# How often an edit may multiply a component, over all places, and a row, at one of them. Components
# along a direction are up to some hundred; times this they are within float16.
GROWTH = 100.0
ROUNDING = 1e-6  # of unit vectors
STEPS = 100  # of a bisection: down to neighboring floats


@dataclass(frozen=True)
class Limits:
    """What limits the programs of a model.

    Attributes
    ----------
    hidden, blocks
        The model's hidden size, and its number of blocks.
    dtype
        Of the residual stream.
    strength
        The largest strength, of a program times a request, of what reads the stream.
    """

    hidden: int
    blocks: int
    dtype: torch.dtype
    strength: float = MAX_STRENGTH

    @classmethod
    def of(cls, model_config: Any) -> "Limits":
        """Read them from a ``vllm.config.ModelConfig``."""
        blocks = model_config.get_total_num_hidden_layers()
        return cls(model_config.get_hidden_size(), blocks, model_config.dtype)

    @property
    def length(self) -> float:
        """How much may be added to a row: far from where its square overflows float32."""
        return 1e4 if self.dtype == torch.float16 else 1e12

    def places(self, interventions: Sequence[Intervention]) -> list[list[Intervention]]:
        """Return which interventions act at each place of the stream where any does.

        A family may have fewer places: it may add what attention and MLP write in one sum.

        Raises
        ------
        InputError
            If they interfere at a place.
        """
        kinds = ["attn", "mlp"]
        if any("add" in (i.sites or ()) for i in interventions):
            kinds.append("add")
        stream: list[tuple[int | None, frozenset[str], int | None]] = [(None, frozenset(), 0)]
        for block in range(self.blocks):
            following = block + 1 if block + 1 < self.blocks else None
            stream += [
                (block, frozenset({kind}), following if kind == kinds[-1] else None)
                for kind in kinds
            ]
        acting = [[i for i in interventions if i.meets(*place)] for place in stream]
        for different in {tuple(there) for there in acting if there}:
            check_program(different)
        return [there for there in acting if there]


def strengths(interventions: Sequence[Intervention], limits: Limits) -> tuple[float, float]:
    """Return the least and the largest strength that a request may give to a program.

    Raises
    ------
    InputError
        If its interventions interfere (`check_program`).
    """
    acting = limits.places(interventions)
    edits = [EditSize(i, sum(i in there for there in acting)) for i in interventions]

    def safe(strength: float) -> bool:
        growth = length = 0.0
        for edit in edits:
            s = edit.strength * strength
            if edit.factors and abs(s) > limits.strength * (1 + ROUNDING):
                return False
            if abs(s) * edit.reach > GROWTH:
                return False
            growth += edit.growth(s)
            length += edit.length(s)
        return growth <= math.log(GROWTH) and length * math.exp(growth) <= limits.length

    return -_largest(lambda s: safe(-s), limits.length), _largest(safe, limits.length)


class EditSize:
    """What an intervention does to the length of a row, at any strength."""

    def __init__(self, intervention: Intervention, places: int) -> None:
        self.strength, self.places = intervention.strength, places
        slots = intervention.slots(1.0)
        read = torch.stack([s.read for s in slots]).double()
        write = torch.stack([s.write for s in slots]).double()
        # phi(t) is a*t where its clamp is constant, and (a + c)*t where it is not
        slopes = list(itertools.product(*({s.a, s.a + s.c} for s in slots)))
        # of each case: the edit multiplies by 1 + strength * these
        cases = [torch.tensor(case).double()[:, None] * (read @ write.T) for case in slopes]
        self.factors = [z for case in cases if case.any() for z in _eigenvalues(case)]
        # how long what it writes may be, as a multiple of the row: more than 1 for oblique vectors
        (_, r), (_, w) = torch.linalg.qr(read.T), torch.linalg.qr(write.T)
        maps = [w @ torch.tensor(case).double().diag() @ r.T for case in slopes]
        self.reach = max(float(torch.linalg.matrix_norm(m, 2)) for m in maps)
        self.added = sum(
            abs(s.b + s.c * min(max(0.0, s.low), s.high)) * float(u.norm())
            for s, u in zip(slots, write, strict=True)
        )

    def growth(self, strength: float) -> float:
        """Return the logarithm of what the edit multiplies by, over all places."""
        factor = max((abs(1 + strength * z) for z in self.factors), default=1.0)
        return self.places * math.log(factor) if factor > 1 + ROUNDING else 0.0

    def length(self, strength: float) -> float:
        """Return the length of what the edit adds, over all places."""
        return self.places * abs(strength) * self.added


def _eigenvalues(matrix: torch.Tensor) -> list[complex]:
    return [complex(z) for z in torch.linalg.eigvals(matrix).tolist()]


def _largest(safe: Callable[[float], bool], most: float) -> float:
    """Return the largest number up to `most` that is safe; all below it are."""
    low, high = 0.0, most
    if safe(high):
        return high
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if safe(middle) else (low, middle)
    return low

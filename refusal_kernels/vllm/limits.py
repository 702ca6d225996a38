"""How strong a program may be: no request can make the residual stream overflow.

A row of the stream that overflows leaves NaN in the KV cache, which ruins other requests. A program
lengthens a row in two ways. Edits that read the stream map the row, one place after the other: an
ablation of strength 6 multiplies a component by -5, so 61 places multiply it by 5**61. Edits that
add, add at every place.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refusal_kernels.banks import check_program
from refusal_kernels.intervention_base import Intervention
from refusal_kernels.vllm.families import ATTN_THEN_MLP, writers_of

MAX_STRENGTH = 2.0  # an ablation turns the component around; a stronger one lengthens it
# How many times longer a program may make a row, over all places. In float16 a channel of three
# thousand stays below 65,504.
GROWTH, GROWTH_FLOAT16 = 100.0, 20.0
ROUNDING = 1e-6  # of unit vectors; times GROWTH and all places it is still little
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
    writers
        What is added at each place of a block, as `Intervention.meets` takes it.
    """

    hidden: int
    blocks: int
    dtype: torch.dtype
    strength: float = MAX_STRENGTH
    writers: tuple[frozenset[str], ...] = ATTN_THEN_MLP

    @classmethod
    def of(cls, model_config: Any) -> "Limits":
        """Read them from a ``vllm.config.ModelConfig``."""
        return cls(
            model_config.get_hidden_size(),
            model_config.get_total_num_hidden_layers(),
            model_config.dtype,
            writers=writers_of(model_config),
        )

    @property
    def length(self) -> float:
        """How much may be added to a row: far from where its square overflows float32."""
        return 1e4 if self.dtype == torch.float16 else 1e12

    @property
    def growth(self) -> float:
        """How many times longer a row may become."""
        return GROWTH_FLOAT16 if self.dtype == torch.float16 else GROWTH

    def places(self, interventions: Sequence[Intervention]) -> list[list[Intervention]]:
        """Return which interventions act at each place of the stream where any does.

        Raises
        ------
        InputError
            If they interfere at a place, or act at a part of what is added in one sum.
        """
        writers = list(self.writers)
        if any("add" in (i.sites or ()) for i in interventions):
            writers.append(frozenset({"add"}))
        stream: list[tuple[int | None, frozenset[str], int | None]] = [(None, frozenset(), 0)]
        for block in range(self.blocks):
            following = block + 1 if block + 1 < self.blocks else None
            stream += [
                (block, added, following if added is writers[-1] else None) for added in writers
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
    # Why this bounds a row: a place maps it to (I + M) row + constant, M the sum of the edits' maps
    # there. What a block adds does not grow with the row, because the block reads it through a
    # norm. So the row is bounded if the product of the I + M of any consecutive places is. At one
    # place no edit reads what another writes (`check_program`), so I + M is the product of the
    # edits' own I + M_i, and all their norms multiply. That is much for an oblique u v^T, whose own
    # power is as short as itself. One is apart if at no place it reads what others write, nor they
    # what it writes: then it commutes with them, its power stands alone, and where several are
    # apart, the product of their powers is I + their sum.
    acting = limits.places(interventions)
    maps = _maps(interventions)
    edits = [
        EditSize(
            intervention,
            sum(intervention in there for there in acting),
            maps[k],
            [one for other in (*maps[:k], *maps[k + 1 :]) for one in other],
        )
        for k, intervention in enumerate(interventions)
    ]

    def safe(strength: float) -> bool:
        growth = alone = written = length = 0.0
        for edit in edits:
            s = edit.strength * strength
            if edit.slopes and abs(s) > limits.strength * (1 + ROUNDING):
                return False
            if edit.apart:
                alone += edit.growth(s)
                written += edit.written(s)
            else:
                growth += edit.growth(s)
            length += edit.length(s)
        growth += min(alone, math.log1p(written))
        return growth <= math.log(limits.growth) and length * math.exp(growth) <= limits.length

    return -_largest(lambda s: safe(-s), limits.length), _largest(safe, limits.length)


class EditSize:
    """What an intervention does to the length of a row, at any strength.

    `maps` are those of its slots that read, `others` those of all other interventions (`_maps`).
    """

    def __init__(
        self,
        intervention: Intervention,
        places: int,
        maps: Sequence[Tensor],
        others: Sequence[Tensor],
    ) -> None:
        self.strength, self.places = intervention.strength, places
        slots = intervention.slots(1.0)
        # phi(t) is a*t where its clamp is constant, and (a + c)*t where it is not
        cases = itertools.product(*({s.a, s.a + s.c} for s in slots if s.reads))
        self.slopes = [case for case in cases if any(case)]
        self.maps = maps
        self.added = sum(
            abs(s.b + s.c * min(max(0.0, s.low), s.high)) * float(s.write.double().norm())
            for s in slots
        )
        # of a single slot, for which v . u is 1: the tangent of the angle between v and u
        self.slant = None
        if len(slots) == 1:
            length = float(slots[0].read.double().norm() * slots[0].write.double().norm())
            self.slant = math.sqrt(max(length**2 - 1, 0.0))
        self.apart = (
            self.slant is not None
            and len(self.slopes) == 1
            and not any(_meet(one, other) for one in maps for other in others)
        )

    def growth(self, strength: float) -> float:
        """Return the logarithm of how many times longer a row may become, over all places."""
        if not self.slopes:
            return 0.0
        if self.slant is None:
            steps = [
                torch.eye(len(self.maps[0])).double()
                + sum(strength * slope * one for slope, one in zip(case, self.maps, strict=True))
                for case in self.slopes
            ]
            norm = max(float(torch.linalg.matrix_norm(step, 2)) for step in steps)
            return self.places * math.log(max(norm, 1.0))
        if self.apart:
            return math.log(max(_norm(power, self.slant) for power in self._powers(strength)))
        factors = [1 + strength * slope for (slope,) in self.slopes]
        return self.places * math.log(max(_norm(factor, self.slant) for factor in factors))

    def written(self, strength: float) -> float:
        """Return how long what an edit that is apart writes may be, in lengths of the row."""
        most = max(abs(power - 1) for power in self._powers(strength))
        return most * math.hypot(1.0, self.slant or 0.0)

    def length(self, strength: float) -> float:
        """Return the length of what the edit adds, over all places."""
        return self.places * abs(strength) * self.added

    def _powers(self, strength: float) -> list[float]:
        """Return the extremes of what it multiplies its component by, over some of its places."""
        ((slope,),) = self.slopes
        factor = 1 + strength * slope
        if abs(factor) > GROWTH ** (1 / self.places):
            return [math.inf]
        return [factor**count for count in (1, self.places - 1, self.places)]


def _meet(one: Tensor, other: Tensor) -> bool:
    """Whether one of two maps reads what the other writes."""
    products = one @ other, other @ one
    return any(float(torch.linalg.matrix_norm(p)) > ROUNDING for p in products)


def _maps(interventions: Sequence[Intervention]) -> list[list[Tensor]]:
    """Return u v^T of the slots that read, by intervention, in the space of all their vectors."""
    reading = [[s for s in i.slots(1.0) if s.reads] for i in interventions]
    vectors = [vector for slots in reading for s in slots for vector in (s.write, s.read)]
    if not vectors:
        return [[] for _ in interventions]
    basis = torch.linalg.qr(torch.stack(vectors).double().T).Q
    return [
        [torch.outer(s.write.double() @ basis, s.read.double() @ basis) for s in slots]
        for slots in reading
    ]


def _norm(factor: float, slant: float) -> float:
    """Return the norm of the map that multiplies a component by a factor, where v . u is 1.

    In the plane of u and v it is [[factor, (factor - 1) * slant], [0, 1]].
    """
    across = (factor - 1) * slant
    return (math.hypot(abs(factor) + 1, across) + math.hypot(abs(factor) - 1, across)) / 2


def _largest(safe: Callable[[float], bool], most: float) -> float:
    """Return the largest number up to `most` that is safe; all below it are."""
    low, high = 0.0, most
    if safe(high):
        return high
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if safe(middle) else (low, middle)
    return low

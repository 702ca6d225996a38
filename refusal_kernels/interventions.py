"""What can be done to the residual stream, and how it becomes a steering program.

Every intervention is one slot ``phi(v . s) u`` with ``phi(t) = a*t + c*clamp(t, low, high) + b``
(`refusal_kernels.ops`). All of phi scales with the strength, so one number dials any of them, and
strength 0 is the unmodified model.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError

INF = math.inf


@dataclass(frozen=True)
class Intervention(ABC):
    """One edit of the residual stream along one direction.

    Attributes
    ----------
    direction
        Where to act.
    strength
        Multiplies the edit: 0 leaves the model as it is, 1 is the edit as defined.
    layer
        Act at the input of this block alone; None: at every residual add and at the embedding.
    """

    direction: Direction
    strength: float = field(default=1.0, kw_only=True)
    layer: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int | float):
                continue
            if math.isnan(value) or (math.isinf(value) and name not in ("low", "high")):
                raise InputError(f"{type(self).__name__}: {name} is {value}; must be finite")
        if self.layer is not None and self.layer < 0:
            raise InputError(
                f"{type(self).__name__}: layer is {self.layer}; expected 0 or more, "
                "the number of the block at whose input to act"
            )

    @abstractmethod
    def phi(self) -> tuple[float, float, float, float, float]:
        """Return (a, c, b, low, high) at strength 1."""

    @property
    def vector(self) -> Tensor:
        """What is read and written: float32 [hidden]."""
        return self.direction.unit

    def params(self, strength: float) -> Tensor:
        """Return (a, c, b, low, high) at a strength, float32 [5]."""
        a, c, b, low, high = self.phi()
        return torch.tensor([a * strength, c * strength, b * strength, low, high])


@dataclass(frozen=True)
class Ablate(Intervention):
    """Directional ablation, ``h - strength * (r . h) r``: at strength 1 the exact projection.

    Arditi et al. 2024, section 2.4. r is the direction's unit vector.
    """

    strength: float = 1.0

    def phi(self) -> tuple[float, float, float, float, float]:
        """See `Intervention.phi`."""
        return -1.0, 0.0, 0.0, -INF, INF


@dataclass(frozen=True)
class Add(Intervention):
    """Activation addition, ``h + strength * coefficient * vector``, with the raw vector.

    Arditi et al. 2024 add the mean difference at the input of the block that it was taken from:
    give that ``layer``.
    """

    coefficient: float = 1.0

    def phi(self) -> tuple[float, float, float, float, float]:
        """See `Intervention.phi`."""
        return 0.0, 0.0, self.coefficient, -INF, INF

    @property
    def vector(self) -> Tensor:
        """The raw vector, float32 [hidden]: its norm is part of the edit."""
        return self.direction.vector


@dataclass(frozen=True)
class Set(Intervention):
    """The component along the direction becomes ``value``, in units of the residual stream."""

    value: float

    def phi(self) -> tuple[float, float, float, float, float]:
        """See `Intervention.phi`."""
        return -1.0, 0.0, self.value, -INF, INF


@dataclass(frozen=True)
class Clamp(Intervention):
    """The component along the direction is kept inside [low, high].

    ``high=0`` removes only the positive part.
    """

    low: float = -INF
    high: float = INF

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low > self.high:
            raise InputError(f"Clamp: low {self.low} is above high {self.high}")

    def phi(self) -> tuple[float, float, float, float, float]:
        """See `Intervention.phi`."""
        return -1.0, 1.0, 0.0, self.low, self.high


def compile_program(interventions: Sequence[Intervention]) -> tuple[Tensor, Tensor]:
    """Make one program that does all of these at one place, each reading the same stream.

    Returns
    -------
    bank : Tensor
        float32 [1, 2, slots, hidden].
    params : Tensor
        float32 [1, slots, 5].

    Raises
    ------
    InputError
        If the directions differ in size, or if several edits that read the stream are not
        orthogonal: their result would not be a joint projection.
    """
    sizes = {i.direction.hidden for i in interventions}
    if len(sizes) > 1:
        raise InputError(f"directions of different hidden sizes: {sorted(sizes)}")
    vectors = torch.stack([i.vector for i in interventions])  # [slots, hidden]
    readers = [i for i in interventions if i.phi()[0] or i.phi()[1]]
    units = torch.stack([i.direction.unit for i in readers]).double() if readers else None
    if units is not None and len(readers) > 1:
        gram = units @ units.T
        worst = float((gram - torch.eye(len(readers), dtype=gram.dtype)).abs().max())
        if worst > 1e-4:
            raise InputError(
                "several directions at one place must be orthonormal; the largest cosine between "
                f"two of them is {worst:.4g}; orthonormalise them first (torch.linalg.qr)"
            )
    bank = torch.stack([vectors, vectors]).unsqueeze(0).contiguous()
    params = torch.stack([i.params(i.strength) for i in interventions]).unsqueeze(0)
    return bank, params

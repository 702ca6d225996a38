"""What can be done to the residual stream, and how it becomes a steering program.

Every intervention is one slot ``phi(v . s) u`` with ``phi(t) = a*t + c*clamp(t, low, high) + b``
(`refusal_kernels.ops`). All of phi scales with the strength, so one number dials any of them, and
strength 0 is the unmodified model.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError

INF = math.inf
PROMPT, GENERATED, LAST = "prompt", "generated", "last"
POSITIONS = ("all", PROMPT, GENERATED, LAST)
SITES = ("embed", "block_input", "attn", "mlp")


class Intervention(ABC):
    """One edit of the residual stream: it reads along one vector and writes along one.

    Attributes
    ----------
    strength
        Multiplies the edit: 0 leaves the model as it is, 1 is the edit as defined.
    layer
        Act at the input of this block alone; None: wherever the next two say.
    layers
        Act in these blocks alone. None: everywhere, the embedding included.
    sites
        Act at these kinds of places alone: "attn" and "mlp", the adds of what attention (or what
        stands in its place) and MLP write; "block_input", the input of a block; "embed", the input
        of the first. None: at every residual add.
    positions
        Which tokens: "all"; "prompt", what ``generate`` was given (outside it, those of a pass
        without a cache behind it); "generated", all others; "last", the last of every row's prompt
        that is no padding, and all that is generated, each of which has been the last.
    """

    strength: float
    layer: int | None
    layers: Sequence[int] | None
    sites: Sequence[str] | None
    positions: str

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
        name = type(self).__name__
        if self.layer is not None and (self.layers is not None or self.sites is not None):
            raise InputError(f"{name}: give layer, or layers and sites; not both")
        if self.positions not in POSITIONS:
            raise InputError(
                f"{name}: positions is {self.positions!r}; expected {', '.join(POSITIONS)}"
            )
        for site in self.sites or ():
            if site not in SITES:
                raise InputError(f"{name}: no site {site!r}; there are {', '.join(SITES)}")

    def meets(self, block: int | None, writers: frozenset[str], feeds: int | None) -> bool:
        """Whether it acts at a place of the stream.

        Parameters
        ----------
        block
            The number of the block that adds there; None for the embedding.
        writers
            What is added there: "attn", "mlp" or both.
        feeds
            The number of the block whose input this is, or None.

        Raises
        ------
        InputError
            If it is meant for one of two writers that are added in one sum.
        """
        if self.layer is not None or self.meets_input(feeds):
            return self.meets_input(feeds)
        if self.sites is None:
            return self._wanted(block)
        if "embed" in self.sites and block is None and self.layers is None:
            return True
        here = writers & set(self.sites)
        if not here or not self._wanted(block):
            return False
        if here != writers:
            raise InputError(
                f"{type(self).__name__}: block {block} adds {' and '.join(sorted(writers))} in one "
                f"sum, so it can't be steered at {', '.join(sorted(here))} alone"
            )
        return True

    def meets_input(self, feeds: int | None) -> bool:
        """Whether it is meant for the input of this block, whatever writes it."""
        if self.layer is not None:
            return feeds == self.layer
        return "block_input" in (self.sites or ()) and feeds is not None and self._wanted(feeds)

    def _wanted(self, block: int | None) -> bool:
        return self.layers is None or block in self.layers

    @property
    @abstractmethod
    def read(self) -> Tensor:
        """What the stream is projected on, v: float32 [hidden]."""

    @property
    @abstractmethod
    def write(self) -> Tensor:
        """What is added to the stream, u: float32 [hidden]."""

    @abstractmethod
    def phi(self) -> tuple[float, float, float, float, float]:
        """Return (a, c, b, low, high) at strength 1."""

    @property
    def hidden(self) -> int:
        """The hidden size that it is made for."""
        return self.read.shape[0]

    @property
    def reads(self) -> bool:
        """Whether the edit depends on the stream at all."""
        a, c, *_ = self.phi()
        return a != 0.0 or c != 0.0

    def params(self, strength: float) -> Tensor:
        """Return (a, c, b, low, high) at a strength, float32 [5]."""
        a, c, b, low, high = self.phi()
        return torch.tensor([a * strength, c * strength, b * strength, low, high])


@dataclass(frozen=True)
class AlongDirection(Intervention):
    """An edit along one `Direction`, whose unit vector it reads and writes."""

    direction: Direction
    strength: float = field(default=1.0, kw_only=True)
    layer: int | None = field(default=None, kw_only=True)
    layers: Sequence[int] | None = field(default=None, kw_only=True)
    sites: Sequence[str] | None = field(default=None, kw_only=True)
    positions: str = field(default="all", kw_only=True)

    @property
    def read(self) -> Tensor:
        """The unit vector."""
        return self.direction.unit

    @property
    def write(self) -> Tensor:
        """The unit vector."""
        return self.direction.unit


@dataclass(frozen=True)
class Ablate(AlongDirection):
    """Directional ablation, ``h - strength * (r . h) r``: at strength 1 the exact projection.

    Arditi et al. 2024, section 2.4. r is the direction's unit vector.
    """

    strength: float = 1.0

    def phi(self) -> tuple[float, float, float, float, float]:
        """See `Intervention.phi`."""
        return -1.0, 0.0, 0.0, -INF, INF


@dataclass(frozen=True)
class Add(AlongDirection):
    """Activation addition, ``h + strength * coefficient * vector``, with the raw vector.

    Arditi et al. 2024 add the mean difference at the input of the block that it was taken from:
    give that ``layer``.
    """

    coefficient: float = 1.0

    def phi(self) -> tuple[float, float, float, float, float]:
        """See `Intervention.phi`."""
        return 0.0, 0.0, self.coefficient, -INF, INF

    @property
    def write(self) -> Tensor:
        """The raw vector: its norm is part of the edit."""
        return self.direction.vector


@dataclass(frozen=True)
class Set(AlongDirection):
    """The component along the direction becomes ``value``, in units of the residual stream."""

    value: float

    def phi(self) -> tuple[float, float, float, float, float]:
        """See `Intervention.phi`."""
        return -1.0, 0.0, self.value, -INF, INF


@dataclass(frozen=True)
class Clamp(AlongDirection):
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


@dataclass(frozen=True, eq=False)
class Erase(Intervention):
    """Oblique projection, ``h - u (v . (h - bias))``: what LEACE does to a binary concept.

    Belrose et al. 2023: with these u, v and the mean activation no linear probe finds the concept
    in h, and h moves as little as it can. u and v differ where the activations' covariance is not
    the identity.

    Attributes
    ----------
    u
        Floating point [hidden]: along this the stream is moved.
    v
        Floating point [hidden]: this is read. v . u must be 1: erasing twice is erasing once.
    bias
        Floating point [hidden]: the mean activation, which stays where it is.
    """

    u: Tensor
    v: Tensor
    bias: Tensor
    strength: float = field(default=1.0, kw_only=True)
    layer: int | None = field(default=None, kw_only=True)
    layers: Sequence[int] | None = field(default=None, kw_only=True)
    sites: Sequence[str] | None = field(default=None, kw_only=True)
    positions: str = field(default="all", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("u", "v", "bias"):
            value = getattr(self, name)
            if value.ndim != 1 or value.shape != self.u.shape or not value.isfinite().all():
                raise InputError(
                    f"Erase: {name} is {list(value.shape)} or not finite; "
                    f"expected finite numbers [{self.u.shape[0] if self.u.ndim else 0}]"
                )
        product = float(self.u.double() @ self.v.double())
        if abs(product - 1.0) > 1e-4:
            raise InputError(f"Erase: u . v is {product:.6g}; expected 1, for a projection")

    @classmethod
    def from_leace(cls, eraser: Any, **common: Any) -> "Erase":
        """Make one from a ``concept_erasure.LeaceEraser`` of a concept of rank one.

        Raises
        ------
        InputError
            If the eraser removes more than one dimension: give each of them its own `Erase`.
        """
        left, right = eraser.proj_left, eraser.proj_right  # [hidden, rank], [rank, hidden]
        if left.shape[1] != 1:
            raise InputError(f"the eraser has rank {left.shape[1]}; expected 1, a binary concept")
        bias = eraser.bias if eraser.bias is not None else torch.zeros_like(left[:, 0])
        return cls(left[:, 0], right[0], bias, **common)

    @property
    def read(self) -> Tensor:
        """See `Intervention.read`."""
        return self.v.detach().float().cpu()

    @property
    def write(self) -> Tensor:
        """See `Intervention.write`."""
        return self.u.detach().float().cpu()

    def phi(self) -> tuple[float, float, float, float, float]:
        """See `Intervention.phi`."""
        return -1.0, 0.0, float(self.v.double() @ self.bias.double()), -INF, INF


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
        If the hidden sizes differ, or if several edits that read the stream interfere: unless
        v_i . u_j is 1 for i = j and 0 otherwise, their sum is no projection.
    """
    sizes = {i.hidden for i in interventions}
    if len(sizes) > 1:
        raise InputError(f"directions of different hidden sizes: {sorted(sizes)}")
    read = torch.stack([i.read for i in interventions])  # [slots, hidden]
    write = torch.stack([i.write for i in interventions])
    readers = [k for k, i in enumerate(interventions) if i.reads]
    gram = read[readers].double() @ write[readers].double().T
    worst = (
        float((gram - torch.eye(len(readers), dtype=gram.dtype)).abs().max()) if readers else 0.0
    )
    if worst > 1e-4:
        raise InputError(
            "several directions at one place must be orthonormal; the largest cosine between "
            f"two of them is {worst:.4g}; orthonormalize them first (torch.linalg.qr)"
        )
    bank = torch.stack([read, write]).unsqueeze(0).contiguous()
    params = torch.stack([i.params(i.strength) for i in interventions]).unsqueeze(0)
    return bank, params

"""What can be done to the residual stream.

An intervention is a short list of slots: each reads the stream along one vector v and adds
``phi(v . s) u`` to it, with ``phi(t) = a*t + c*clamp(t, low, high) + b`` (`refusal_kernels.ops`).
All of phi scales with the strength, so one number dials any of them, and strength 0 is the
unmodified model.

A new intervention is one class: a frozen dataclass that derives from `Intervention` (or from
`AlongDirection`) under a name of its own and has a method ``slots``. Its fields say what it takes:
those annotated `Direction` or ``Tensor`` are vectors, those annotated ``float`` numbers, and one
without a default must be given. With that, `INTERVENTIONS` and `Intervention.from_dict` serve it
everywhere: `patch`, the command line, vLLM's configuration and lm-eval's model arguments.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.intervention_base import INF, ORTHONORMAL, Intervention, Slot
from refusal_kernels.intervention_base import INTERVENTIONS as INTERVENTIONS  # of these classes


@dataclass(frozen=True, eq=False)
class AlongDirection(Intervention):
    """An edit along one `Direction`."""

    direction: Direction
    strength: float = field(default=1.0, kw_only=True)


@dataclass(frozen=True, eq=False)
class Ablate(AlongDirection, name="ablate"):
    """Directional ablation, ``h - strength * (r . h) r``: at strength 1 the exact projection.

    Arditi et al. 2024, section 2.4. r is the direction's unit vector.
    """

    strength: float = 1.0

    def slots(self, strength: float) -> list[Slot]:
        """See `Intervention.slots`."""
        r = self.direction.unit
        return [Slot(r, r, a=-1.0).scaled(strength)]


@dataclass(frozen=True, eq=False)
class Add(AlongDirection, name="add"):
    """Activation addition, ``h + strength * coefficient * vector``, with the raw vector.

    Arditi et al. 2024 add the mean difference at the input of the block that it was read from. So
    without a place it acts at the input of block ``direction.layer``; ``sites="all"`` adds it at
    every place of the stream.
    """

    coefficient: float = 1.0

    def check(self) -> None:
        """Take the direction's own block where no place is given."""
        if self.block_input is None and self.layers is None and self.sites is None:
            if self.direction.layer is None:
                raise InputError(
                    "Add: the direction does not say at which layer it was read; give "
                    'block_input (the number of a block), or layers or sites ("all" is everywhere)'
                )
            object.__setattr__(self, "block_input", self.direction.layer)

    def slots(self, strength: float) -> list[Slot]:
        """See `Intervention.slots`. What is written is the raw vector: its norm counts."""
        unit, vector = self.direction.unit, self.direction.vector
        return [Slot(unit, vector, b=self.coefficient).scaled(strength)]


@dataclass(frozen=True, eq=False)
class Set(AlongDirection, name="set"):
    """The component along the direction becomes ``value``, in units of the residual stream."""

    value: float

    def slots(self, strength: float) -> list[Slot]:
        """See `Intervention.slots`."""
        r = self.direction.unit
        return [Slot(r, r, a=-1.0, b=self.value).scaled(strength)]


@dataclass(frozen=True, eq=False)
class Ace(AlongDirection, name="ace"):
    """Affine concept editing, ``h - r r.h + r r.harmless + alpha r r.(harmful - harmless)``.

    Marshall et al. 2024 (arXiv 2411.09003). The component along r becomes the one that the mean of
    the harmless prompts has: at ``alpha`` 0 all rows look harmless along r, at 1 harmful. Where the
    harmless mean is far from zero, `Ablate` leaves what no prompt has; this does not.

    Attributes
    ----------
    direction
        With the means of both classes, as the files of ``extract`` and ``select`` have them.
    alpha
        In units of the difference of the means.
    """

    alpha: float = 0.0

    def check(self) -> None:
        """Refuse a direction without means."""
        if self.direction.means is None:
            raise InputError(
                "Ace: the direction does not carry the mean activations of the two classes; "
                "expected one of mean_difference or find_candidates, or a file that extract or "
                "select wrote"
            )

    def slots(self, strength: float) -> list[Slot]:
        """See `Intervention.slots`: `Set` to a mixture of the means."""
        assert self.direction.means is not None  # checked
        r = self.direction.unit
        harmful, harmless = (float(r.double() @ m.double()) for m in self.direction.means)
        value = harmless + self.alpha * (harmful - harmless)
        return [Slot(r, r, a=-1.0, b=value).scaled(strength)]


@dataclass(frozen=True, eq=False)
class Clamp(AlongDirection, name="clamp"):
    """The component along the direction is kept inside [low, high].

    ``high=0`` removes only the positive part.
    """

    low: float = -INF
    high: float = INF

    def check(self) -> None:
        """Refuse an empty interval."""
        if self.low > self.high:
            raise InputError(
                f"Clamp: low {self.low} is above high {self.high}; expected low <= high"
            )

    def slots(self, strength: float) -> list[Slot]:
        """See `Intervention.slots`."""
        r = self.direction.unit
        return [Slot(r, r, a=-1.0, c=1.0, low=self.low, high=self.high).scaled(strength)]


@dataclass(frozen=True, eq=False)
class Erase(Intervention, name="erase"):
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
        Floating point [hidden]: the mean activation, which stays where it is; by default zero.
    """

    u: Tensor
    v: Tensor
    bias: Tensor | None = None
    strength: float = field(default=1.0, kw_only=True)

    def check(self) -> None:
        """Refuse what is no projection."""
        size = self.u.shape[0] if self.u.ndim else 0
        for name in ("u", "v", "bias"):
            value = getattr(self, name)
            if value is None:
                continue
            if value.ndim != 1 or value.shape != self.u.shape or not value.isfinite().all():
                raise InputError(
                    f"Erase: {name} is {list(value.shape)} or not finite; "
                    f"expected finite numbers [{size}]"
                )
        product = float(self.u.double() @ self.v.double())
        if abs(product - 1.0) > ORTHONORMAL:
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
        return cls(left[:, 0], right[0], eraser.bias, **common)

    def slots(self, strength: float) -> list[Slot]:
        """See `Intervention.slots`."""
        u, v = (t.detach().float().cpu() for t in (self.u, self.v))
        kept = 0.0 if self.bias is None else float(self.v.double() @ self.bias.double())
        return [Slot(v, u, a=-1.0, b=kept).scaled(strength)]


@dataclass(frozen=True, eq=False)
class Rotate(Intervention, name="rotate"):
    """Rotation in the plane of b1 and b2: by ``angle`` degrees, from b1 toward b2.

    Selective steering (arXiv 2601.19375). With unit vectors b1 and b2 and t_i = b_i . h the
    coordinates (t1, t2) are turned, and what is orthogonal to the plane stays: the row's length
    does not change. At another strength than 1 that share of the whole step is made.

    Attributes
    ----------
    b1, b2
        Two directions at right angles; their unit vectors span the plane.
    angle
        In degrees.
    """

    b1: Direction
    b2: Direction
    angle: float
    strength: float = field(default=1.0, kw_only=True)

    def check(self) -> None:
        """Refuse what spans no plane."""
        if self.b1.hidden != self.b2.hidden:
            raise InputError(
                f"Rotate: b1 and b2 have hidden sizes {self.b1.hidden} and {self.b2.hidden}; "
                "expected directions of one model"
            )
        cosine = float(self.b1.unit.double() @ self.b2.unit.double())
        if abs(cosine) > ORTHONORMAL:
            raise InputError(
                f"Rotate: the cosine between b1 and b2 is {cosine:.4g}; expected orthogonal "
                "directions (torch.linalg.qr makes them)"
            )

    def slots(self, strength: float) -> list[Slot]:
        """See `Intervention.slots`: the rotation minus the identity, of rank two."""
        cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        b1, b2 = self.b1.unit, self.b2.unit
        first = Slot(b1, (cos - 1) * b1 + sin * b2, a=1.0)
        second = Slot(b2, (cos - 1) * b2 - sin * b1, a=1.0)
        return [first.scaled(strength), second.scaled(strength)]

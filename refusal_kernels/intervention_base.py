"""What an intervention is: its slots, its place, and how a configuration spells it."""

import dataclasses
import functools
import math
import os
import typing
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError

INF = math.inf
PROMPT, GENERATED, LAST = "prompt", "generated", "last"
POSITIONS = ("all", PROMPT, GENERATED, LAST)
EVERY_SITE = "all"
SITE_KINDS = ("embed", "block_input", "attn", "mlp", "add")
ORTHONORMAL = 1e-4  # how far a product of two vectors may be from the 0 or 1 that it must be

INTERVENTIONS: dict[str, type["Intervention"]] = {}
"""Every kind of intervention by its name; filled by the classes themselves."""


class Slot(NamedTuple):
    """One term ``phi(read . s) write`` of an edit, phi(t) = a*t + c*clamp(t, low, high) + b.

    Attributes
    ----------
    read, write
        float32 [hidden]: what the stream is projected on, and what is added to it. Of a single
        slot that reads, read . write is 1: factors stand in a, c and b.
    a, c, b, low, high
        The numbers of phi.
    """

    read: Tensor
    write: Tensor
    a: float = 0.0
    c: float = 0.0
    b: float = 0.0
    low: float = -INF
    high: float = INF

    @property
    def reads(self) -> bool:
        """Whether the term depends on the stream at all."""
        return self.a != 0.0 or self.c != 0.0

    def scaled(self, strength: float) -> "Slot":
        """Return the term times a number."""
        return self._replace(a=self.a * strength, c=self.c * strength, b=self.b * strength)


@dataclass(frozen=True, eq=False)
class Intervention(ABC):
    """One edit of the residual stream.

    Attributes
    ----------
    strength
        Multiplies the edit: 0 leaves the model as it is, 1 is the edit as defined.
    block_input
        Act at the input of this block alone; None: wherever the next two say.
    layers
        Act in these blocks alone. None: everywhere, the embedding included.
    sites
        Act at these kinds of places alone: "attn" and "mlp", the adds of what attention (or what
        stands in its place) and MLP write; "add", those of what is neither; "block_input", the
        input of a block; "embed", the input of the first. None or "all": at every residual add, and
        at the embedding.
    positions
        Which tokens: "all"; "prompt", what ``generate`` was given (outside it, those of a pass
        without a cache behind it); "generated", all others; "last", the last of every row's prompt
        that is no padding, and all that is generated, each of which has been the last.
    layer
        The old name of ``block_input``.

    Raises
    ------
    InputError
        If a number is not finite, a direction is not a `Direction`, or the place or the positions
        do not exist.
    """

    name: ClassVar[str] = ""

    _: KW_ONLY
    block_input: int | None = None
    layers: Sequence[int] | None = None
    sites: Sequence[str] | str | None = None
    positions: str = "all"
    layer: InitVar[int | None] = None

    def __init_subclass__(cls, name: str = "", **kwargs: Any) -> None:
        """Register a class under the name that configurations and commands give it."""
        super().__init_subclass__(**kwargs)
        if name:
            cls.name = name
            INTERVENTIONS[name] = cls

    def __post_init__(self, layer: int | None) -> None:
        name = type(self).__name__
        if layer is not None:
            if self.block_input is not None:
                raise InputError(f"{name}: give block_input; layer is its old name")
            _warn_of_layer()
            object.__setattr__(self, "block_input", layer)
        if isinstance(self.sites, str):
            object.__setattr__(self, "sites", (self.sites,))
        for key, value in vars(self).items():
            if not isinstance(value, int | float):
                continue
            if math.isnan(value) or (math.isinf(value) and key not in ("low", "high")):
                raise InputError(f"{name}: {key} is {value}; must be finite")
        if self.block_input is not None and self.block_input < 0:
            raise InputError(
                f"{name}: block_input is {self.block_input}; expected 0 or more, "
                "the number of the block at whose input to act"
            )
        if self.block_input is not None and (self.layers is not None or self.sites is not None):
            raise InputError(f"{name}: give block_input, or layers and sites; not both")
        if self.positions not in POSITIONS:
            raise InputError(
                f"{name}: positions is {self.positions!r}; expected {', '.join(POSITIONS)}"
            )
        for site in self.sites or ():
            if site not in (*SITE_KINDS, EVERY_SITE):
                known = ", ".join((*SITE_KINDS, EVERY_SITE))
                raise InputError(f"{name}: no site {site!r}; there are {known}")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.type is Direction and not isinstance(value, Direction):
                raise InputError(
                    f"{name}: {f.name} is of type {type(value).__name__}; expected a Direction "
                    "(Direction.load reads a file, Direction takes a vector, Candidates.at picks)"
                )
        self.check()

    def check(self) -> None:  # noqa: B027
        """Raise `InputError` if the fields of a subclass do not fit together."""

    # --- what it does

    @property
    @abstractmethod
    def strength(self) -> float:
        """See above: a field of every subclass."""

    @abstractmethod
    def slots(self, strength: float) -> list[Slot]:
        """Return the terms of the edit at a strength; always as many, with the same vectors."""

    @property
    def hidden(self) -> int:
        """The hidden size that it is made for."""
        return self.slots(1.0)[0].read.shape[0]

    def at(self, strength: float) -> "Intervention":
        """Return the same edit at another strength."""
        this: Any = self  # of a subclass, where the strength is a field
        changed: Intervention = dataclasses.replace(this, strength=strength)
        return changed

    # --- where it acts

    def meets(self, block: int | None, writers: frozenset[str], feeds: int | None) -> bool:
        """Whether it acts at a place of the stream.

        Parameters
        ----------
        block
            The number of the block that adds there; None for the embedding.
        writers
            What is added there: "attn", "mlp", both, or "add" for what is neither.
        feeds
            The number of the block whose input this is, or None.

        Raises
        ------
        InputError
            If it is meant for one of two writers that are added in one sum.
        """
        if self.block_input is not None or self.meets_input(feeds):
            return self.meets_input(feeds)
        if self.every_site:
            return self._wants(block)
        sites = set(self.sites or ())
        if "embed" in sites and block is None and self.layers is None:
            return True
        here = writers & sites
        if not here or not self._wants(block):
            return False
        if here != writers:
            raise InputError(
                f"{type(self).__name__}: block {block} adds {' and '.join(sorted(writers))} in one "
                f"sum, so it cannot be steered at {', '.join(sorted(here))} alone"
            )
        return True

    def meets_input(self, feeds: int | None) -> bool:
        """Whether it is meant for the input of this block, whatever writes it."""
        if self.block_input is not None:
            return feeds == self.block_input
        return "block_input" in (self.sites or ()) and feeds is not None and self._wants(feeds)

    @property
    def every_site(self) -> bool:
        """Whether no kind of place is excluded."""
        return self.block_input is None and (self.sites is None or EVERY_SITE in self.sites)

    def _wants(self, block: int | None) -> bool:
        return self.layers is None or block in self.layers

    # --- how it is spelled

    @classmethod
    def fields(cls) -> dict[str, tuple[str, bool]]:
        """Return what the class takes beside its place: "vector" or "number", and if it must."""
        hints = typing.get_type_hints(cls)
        where = {f.name for f in dataclasses.fields(Intervention)}
        taken = {}
        for f in dataclasses.fields(cls):
            if f.name not in where:
                number = hints[f.name] is float
                required = f.default is dataclasses.MISSING
                taken[f.name] = "number" if number else "vector", required
        return taken

    @staticmethod
    def from_dict(given: Any, directions: Mapping[str, Direction] | None = None) -> "Intervention":
        """Read an intervention from a JSON object.

        Parameters
        ----------
        given
            ``{"ablate": "refusal", "strength": 0.8, "layers": [10, 11], "sites": ["mlp"]}`` and
            the like: one name out of `INTERVENTIONS` with its first vector, then its other fields.
        directions
            The vectors by name; None: they are named by the files that hold them. A vector may
            also be a `Direction` itself.

        Raises
        ------
        InputError
            If anything is missing, unknown or out of range.
        """
        if not isinstance(given, Mapping):
            raise InputError(
                f"an intervention is {kind_of(given)}; expected an object such as {{'ablate': 'r'}}"
            )
        names = [name for name in INTERVENTIONS if name in given]
        if len(names) != 1:
            raise InputError(
                f"{' and '.join(names) or 'no intervention'} in {sorted(given)}; "
                f"expected exactly one of {', '.join(INTERVENTIONS)}"
            )
        (name,) = names
        cls = INTERVENTIONS[name]
        fields = cls.fields()
        first = next(key for key, (kind, _) in fields.items() if kind == "vector")
        known = {*fields, *PLACE_FIELDS} - {first}
        if unknown := sorted(set(given) - known - {name}):
            raise InputError(
                f"{name} takes no {unknown[0]!r}; expected {', '.join(sorted(known - {'layer'}))}"
            )
        needed = {key for key, (_, required) in fields.items() if required} - {first}
        if missing := sorted(needed - set(given)):
            raise InputError(f"{name} needs {missing[0]!r}")
        hints = typing.get_type_hints(cls)
        settings: dict[str, Any] = {}
        for key, value in given.items():
            key = first if key == name else key
            if key in PLACE_FIELDS:
                settings[key] = _place(key, value)
            elif fields[key][0] == "number":
                settings[key] = finite_number(value, key)
            else:
                direction = _direction(value, directions)
                settings[key] = direction if hints[key] is Direction else direction.vector
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` reads; its vectors are `Direction` objects."""
        taken = self.fields()
        first = next(key for key, (kind, _) in taken.items() if kind == "vector")
        given: dict[str, Any] = {}
        for key in (*taken, *PLACE_FIELDS[:-1]):
            value = getattr(self, key)
            if not isinstance(value, Tensor) and value in (
                None,
                "all",
                INF,
                -INF,
            ):  # the default
                continue
            if isinstance(value, Tensor):
                value = Direction(value)
            given[self.name if key == first else key] = value
        return given


PLACE_FIELDS = ("block_input", "layers", "sites", "positions", "layer")


def finite_number(value: Any, what: str) -> float:
    """Return a finite number; raise `InputError` for anything else (a bool is none)."""
    try:
        finite = isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        finite = False
    if isinstance(value, bool) or not finite:
        raise InputError(f"{what} is {value!r:.60}; expected a finite number")
    return float(value)


def kind_of(value: Any) -> str:
    """Say what JSON holds where something else was expected."""
    if value is None or isinstance(value, bool):
        return repr(value)
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _direction(value: Any, directions: Mapping[str, Direction] | None) -> Direction:
    if isinstance(value, Direction):
        return value
    if directions is None:
        if not isinstance(value, str | os.PathLike):
            raise InputError(f"a direction is {kind_of(value)}; expected the path of its file")
        return Direction.load(value)
    if not isinstance(value, str) or value not in directions:
        there = ", ".join(directions) or "none"
        raise InputError(f"there is no direction {value!r}; there are: {there}")
    return directions[value]


def _place(key: str, value: Any) -> Any:
    """Return where an intervention acts, as its constructor takes it."""

    def integer(one: Any) -> bool:
        return isinstance(one, int) and not isinstance(one, bool)

    listed = isinstance(value, list | tuple) and bool(value)
    if key in ("block_input", "layer"):
        good, expected = integer(value), "a number"
    elif key == "layers":
        good, expected = listed and all(map(integer, value)), "a list of numbers"
    elif key == "sites":
        names = listed and all(isinstance(one, str) for one in value)
        good, expected = names or value == EVERY_SITE, f"a list of names, or {EVERY_SITE!r}"
    else:
        good, expected = isinstance(value, str), f"one of {', '.join(POSITIONS)}"
    if not good:
        raise InputError(f"{key} is {value!r}; expected {expected}")
    return tuple(value) if listed else value


@functools.cache
def _warn_of_layer() -> None:
    """Say once in a process that ``layer`` has another name."""
    message = "layer= of an intervention is now named block_input="
    warnings.warn(message, DeprecationWarning, stacklevel=4)

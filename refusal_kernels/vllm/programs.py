"""Steering programs by name: how a configuration spells them, and what tells two of them apart.

Nothing here needs vLLM: the engine's front end, its workers and the tests read the same form.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.interventions import Ablate, Add, Clamp, Erase, Intervention, Set

NONE = "none"  # the name of doing nothing, in a request
# The key that names an intervention and its direction, and the numbers that may stand beside it.
KINDS: dict[str, tuple[type[Intervention], frozenset[str], frozenset[str]]] = {
    "ablate": (Ablate, frozenset(), frozenset()),
    "add": (Add, frozenset(), frozenset({"coefficient"})),
    "set": (Set, frozenset({"value"}), frozenset()),
    "clamp": (Clamp, frozenset(), frozenset({"low", "high"})),
    "erase": (Erase, frozenset(), frozenset()),
}
# Of an erasure the vectors are named like directions: what is read, and the mean that stays.
ERASE = {"v": True, "bias": False}  # whether it must be there
PLACES = frozenset({"layer", "layers", "sites"})
LONGEST_NAME = 128


@dataclass(frozen=True, eq=False)
class NamedProgram:
    """A named list of interventions.

    Attributes
    ----------
    interventions
        What it does; one slot of the bank each.
    version
        16 hexadecimal digits that change with anything that changes the result: the prefix cache is
        keyed by them, and a running request keeps the version that it began with.
    """

    interventions: tuple[Intervention, ...]
    version: str

    @property
    def hidden(self) -> int:
        """The hidden size that it is made for."""
        return self.interventions[0].hidden


def parse_program(name: str, given: Any, directions: Mapping[str, Direction]) -> NamedProgram:
    """Read one program from its JSON form: an intervention, or a list of them.

    ``{"ablate": "refusal", "strength": 0.8, "layers": [10, 11], "sites": ["mlp"]}`` and the like:
    one of ``ablate``, ``add`` (``coefficient``), ``set`` (``value``) and ``clamp`` (``low``,
    ``high``) with the name of a direction, and the settings of that intervention. ``erase`` takes
    three names: ``{"erase": U, "v": V, "bias": MEAN}``, without ``bias`` of a mean of zero.

    Raises
    ------
    InputError
        If anything is missing, unknown or out of range.
    """
    where = f"program {name!r}"
    check_name(name, "program")
    items = given if isinstance(given, list) else [given]
    if not items:
        raise InputError(f"{where} is an empty list; expected one intervention or more")
    interventions = tuple(_intervention(where, item, directions) for item in items)
    sizes = sorted({i.hidden for i in interventions})
    if len(sizes) > 1:
        raise InputError(f"{where} has directions of different hidden sizes: {sizes}")
    return NamedProgram(interventions, _version(interventions))


def parse_programs(given: Any, directions: Mapping[str, Direction]) -> dict[str, NamedProgram]:
    """Read programs by name."""
    if not isinstance(given, dict):
        raise InputError(f"programs is {_kind(given)}; expected an object, program by name")
    return {name: parse_program(name, one, directions) for name, one in given.items()}


def parse_directions(given: Any) -> dict[str, Direction]:
    """Load directions: an object, file by name.

    Raises
    ------
    InputError
        If it is anything else, or a file can't be read.
    """
    if not isinstance(given, dict):
        raise InputError(f"directions is {_kind(given)}; expected an object, file by name")
    directions = {}
    for name, path in given.items():
        check_name(name, "direction")
        if not isinstance(path, str | os.PathLike):
            raise InputError(f"direction {name!r} is {_kind(path)}; expected the path of a file")
        directions[name] = Direction.load(path)
    return directions


def check_name(name: Any, what: str) -> None:
    """Refuse a name that no request could give."""
    good = isinstance(name, str) and 0 < len(name) <= LONGEST_NAME and name.isprintable()
    if not good or name == NONE:
        raise InputError(
            f"{name!r} can not be the name of a {what}; expected 1 to {LONGEST_NAME} printable "
            f"characters, and not {NONE!r}"
        )


def number(value: Any, where: str) -> float:
    """Return a finite number; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{where} is {value!r}; expected a finite number")
    return float(value)


def _intervention(where: str, given: Any, directions: Mapping[str, Direction]) -> Intervention:
    if not isinstance(given, dict):
        raise InputError(
            f"{where} holds {_kind(given)}; expected an object such as {{'ablate': 'r'}}"
        )
    kinds = [kind for kind in KINDS if kind in given]
    if len(kinds) != 1:
        raise InputError(
            f"{where} has {' and '.join(kinds) or 'no intervention'} in {sorted(given)}; "
            f"expected exactly one of {', '.join(KINDS)}"
        )
    cls, required, optional = KINDS[kinds[0]]
    numbers = required | optional | {"strength"}
    vectors = ERASE if cls is Erase else {}
    if unknown := sorted(set(given) - numbers - PLACES - {kinds[0], *vectors}):
        known = ", ".join(sorted({*numbers, *PLACES, *vectors}))
        raise InputError(f"{where}: {kinds[0]} takes no {unknown[0]!r}; expected {known}")
    needed = required | {key for key, must in vectors.items() if must}
    if missing := sorted(needed - set(given)):
        raise InputError(f"{where}: {kinds[0]} needs {missing[0]!r}")
    settings: dict[str, Any] = {
        key: number(given[key], f"{where}: {key}") for key in numbers & set(given)
    }
    settings.update({key: _place(where, key, given[key]) for key in PLACES & set(given)})
    first = _named(where, given[kinds[0]], directions)
    try:
        if cls is Erase:
            u, v = first.vector, _named(where, given["v"], directions).vector
            named = "bias" in given
            bias = _named(where, given["bias"], directions).vector if named else torch.zeros_like(u)
            return Erase(u, v, bias, **settings)
        return cls(first, **settings)  # type: ignore[call-arg]
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _named(where: str, name: Any, directions: Mapping[str, Direction]) -> Direction:
    if not isinstance(name, str) or name not in directions:
        there = ", ".join(directions) or "none"
        raise InputError(f"{where}: there is no direction {name!r}; there are: {there}")
    return directions[name]


def _place(where: str, key: str, value: Any) -> Any:
    def integer(one: Any) -> bool:
        return isinstance(one, int) and not isinstance(one, bool)

    if key == "layer" and integer(value):
        return value
    if key == "layers" and isinstance(value, list) and value and all(map(integer, value)):
        return tuple(value)
    names = isinstance(value, list) and value and all(isinstance(one, str) for one in value)
    if key == "sites" and names:
        return tuple(value)
    expected = {"layer": "a number", "layers": "a list of numbers", "sites": "a list of names"}
    raise InputError(f"{where}: {key} is {value!r}; expected {expected[key]}")


def _version(interventions: tuple[Intervention, ...]) -> str:
    digest = hashlib.sha256()
    for i in interventions:
        settings = [i.layer, i.layers and list(i.layers), i.sites and list(i.sites)]
        digest.update(json.dumps([type(i).__name__, settings], sort_keys=True).encode())
        for tensor in (i.read, i.write, i.params(i.strength)):
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def _kind(value: Any) -> str:
    return f"{value!r}" if value is None or isinstance(value, bool) else f"a {type(value).__name__}"

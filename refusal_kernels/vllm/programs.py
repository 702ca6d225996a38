"""Steering programs by name, as a configuration spells them, and the version of each."""

import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from refusal_kernels.banks import slots_of
from refusal_kernels.direction import Direction, Means
from refusal_kernels.errors import InputError
from refusal_kernels.intervention_base import INF, kind_of
from refusal_kernels.interventions import Intervention
from refusal_kernels.vllm.limits import Limits, strengths
from refusal_kernels.vllm.spans import EVERY_TOKEN, Span, read_span
from refusal_kernels.vllm.spans import KEYS as SPAN_KEYS

logger = logging.getLogger(__name__)
NONE = "none"  # the name of doing nothing, in a request
LONGEST_NAME = 128


@dataclass(frozen=True, eq=False)
class NamedProgram:
    """A named list of interventions.

    Attributes
    ----------
    interventions
        In the order of their slots.
    version
        16 hexadecimal digits that change with everything that changes the result. They key the
        prefix cache, and a running request keeps the version with which it began.
    strengths
        The least and the largest that a request may give.
    span
        Which tokens of a request it steers.
    directions
        The names in it that are those of directions.
    """

    interventions: tuple[Intervention, ...]
    version: str
    strengths: tuple[float, float] = (-INF, INF)
    span: Span = EVERY_TOKEN
    directions: frozenset[str] = frozenset()

    @property
    def hidden(self) -> int:
        """The hidden size of its directions."""
        return self.interventions[0].hidden

    @property
    def slots(self) -> int:
        """How many slots of a bank it takes."""
        return slots_of(self.interventions)


def parse_program(
    name: str, given: Any, directions: Mapping[str, Direction], limits: Limits | None = None
) -> NamedProgram:
    """Read one program from its JSON form: an intervention, or a list of them.

    `Intervention.from_dict` reads each, `read_span` the tokens, which are those of all of them.

    Raises
    ------
    InputError
        If anything is missing, unknown or out of range, or does not fit the model.
    """
    where = f"program {name!r}"
    check_name(name, "program")
    items = given if isinstance(given, list) else [given]
    if not items:
        raise InputError(f"{where} is an empty list; expected one intervention or more")
    spans = {read_span(item, where) for item in items if isinstance(item, Mapping)}
    if len(spans) > 1:
        raise InputError(f"{where} has different positions; all of a program must act at the same")
    interventions = tuple(_intervention(where, item, directions) for item in items)
    sizes = sorted({i.hidden for i in interventions})
    if len(sizes) > 1:
        raise InputError(f"{where} has directions of different hidden sizes: {sizes}")
    (span,) = spans
    texts = (value for item in items for value in item.values() if isinstance(value, str))
    named = frozenset(text for text in texts if text in directions)
    version = _version(interventions, span)
    program = NamedProgram(interventions, version, span=span, directions=named)
    if limits is None:
        return program
    labels = [*map(_label, interventions, items)]
    for i, label in zip(interventions, labels, strict=True):
        _check_fit(f"{where}: {label}", i, limits)
    what = " and ".join(labels)
    try:
        least, largest = strengths(interventions, limits)
    except InputError as error:
        raise InputError(f"{where}: {what}: {error}") from None
    if largest < 1.0:
        raise InputError(
            f"{where} can make the residual stream overflow; {what} must be weaker, by a factor "
            f"of {largest:.4g}"
        )
    return dataclasses.replace(program, strengths=(least, largest))


def parse_programs(
    given: Any, directions: Mapping[str, Direction], limits: Limits | None = None
) -> dict[str, NamedProgram]:
    """Read programs by name."""
    if not isinstance(given, dict):
        raise InputError(f"programs is {kind_of(given)}; expected an object, program by name")
    return {name: parse_program(name, one, directions, limits) for name, one in given.items()}


def spelled(
    programs: Mapping[str, Sequence[Intervention]],
) -> tuple[dict[str, Any], dict[str, Direction]]:
    """Return programs in their JSON form, and the directions that they name."""
    directions, given = dict[str, Direction](), dict[str, Any]()
    for name, interventions in programs.items():
        given[name] = [i.to_dict() for i in interventions]
        for item in given[name]:
            for key, value in item.items():
                if isinstance(value, Direction):
                    item[key] = f"direction {len(directions)} of {name}"
                    directions[item[key]] = value
    return given, directions


def parse_directions(given: Any) -> dict[str, Direction]:
    """Load directions: an object, file by name.

    Raises
    ------
    InputError
        If it is anything else, or a file cannot be read.
    """
    if not isinstance(given, dict):
        raise InputError(f"directions is {kind_of(given)}; expected an object, file by name")
    directions = {}
    for name, path in given.items():
        check_name(name, "direction")
        if not isinstance(path, str | os.PathLike):
            raise InputError(f"direction {name!r} is {kind_of(path)}; expected the path of a file")
        directions[name] = Direction.load(path)
    return directions


Sent = tuple[list[float], int | None, list[list[float]] | None]
"""A direction on its way to the workers: vector, layer, means."""


def sent(direction: Direction) -> Sent:
    """Return what `received` makes the direction of: lists, which any serializer takes."""
    means = direction.means and [mean.tolist() for mean in direction.means]
    return direction.vector.tolist(), direction.layer, means


def received(given: Sent) -> Direction:
    """Return a direction that was sent."""
    vector, layer, means = given
    both = None if means is None else Means(*map(torch.tensor, means))
    return Direction(torch.tensor(vector), layer=layer, means=both)


def check_name(name: Any, what: str) -> None:
    """Refuse a name that no request can give."""
    good = isinstance(name, str) and 0 < len(name) <= LONGEST_NAME and name.isprintable()
    if not good or name == NONE:
        raise InputError(
            f"{name!r} cannot be the name of a {what}; expected 1 to {LONGEST_NAME} printable "
            f"characters, and not {NONE!r}"
        )


def _intervention(where: str, given: Any, directions: Mapping[str, Direction]) -> Intervention:
    if isinstance(given, Mapping):
        given = {key: value for key, value in given.items() if key not in SPAN_KEYS}
        if "layer" in given and "block_input" not in given:
            _warn_of_layer()
            given = {"block_input" if key == "layer" else key: v for key, v in given.items()}
    try:
        return Intervention.from_dict(given, directions)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _check_fit(where: str, intervention: Intervention, limits: Limits) -> None:
    """Refuse what the model has no place for."""
    hidden = intervention.hidden
    if hidden != limits.hidden:
        raise InputError(
            f"{where}: the direction has hidden size {hidden}; the model has {limits.hidden}"
        )
    try:
        acts = limits.places([intervention])
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if not acts:
        asked = {key: getattr(intervention, key) for key in ("block_input", "layers", "sites")}
        given = " and ".join(f"{key} {at}" for key, at in asked.items() if at is not None)
        raise InputError(
            f"{where}: no place of the model is at {given}; the blocks are 0 to {limits.blocks - 1}"
        )


def _label(intervention: Intervention, given: Mapping[str, Any]) -> str:
    """Return the kind of an intervention, with the name of its first direction."""
    direction = given[intervention.name]
    named = isinstance(direction, str)
    return f"{intervention.name} {direction!r}" if named else intervention.name


@functools.cache
def _warn_of_layer() -> None:
    """Say once in a process that ``layer`` has another name."""
    logger.warning('"layer" in a steering program is now named "block_input"')


def _version(interventions: tuple[Intervention, ...], span: Span) -> str:
    digest = hashlib.sha256(json.dumps(span).encode())
    for i in interventions:
        places = [i.block_input, i.layers and list(i.layers), i.sites and list(i.sites)]
        digest.update(json.dumps([i.name, i.strength, *places]).encode())
        for slot in i.slots(i.strength):
            for tensor in (slot.read, slot.write, torch.tensor(slot[2:])):
                digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]

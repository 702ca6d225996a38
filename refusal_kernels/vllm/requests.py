"""What a request asks for: a program and a strength, from its ``extra_args``."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from refusal_kernels.errors import InputError
from refusal_kernels.vllm.programs import NONE, NamedProgram, number

STEER, STRENGTH = "steer", "steer_strength"
RESOLVED = "refusal_kernels.steer"  # what the front end hands to the workers
FIELDS = ("program", "strength")


class Steering(NamedTuple):
    """What is done to one request. A request that is left alone has none."""

    version: str
    strength: float


def read_steering(
    extra_args: Mapping[str, Any] | None, programs: Mapping[str, NamedProgram], default: str | None
) -> Steering | None:
    """Return what a request asks for; None: it is left alone.

    Two forms mean the same: ``{"steer": {"program": NAME, "strength": 0.7}}``, and for HTTP, where
    an extra argument is a string or a number, ``{"steer": NAME, "steer_strength": 0.7}``. Without a
    program the engine's default is taken; "none" asks for the model as it is.

    Raises
    ------
    InputError
        If the program is not there or an argument is malformed. It is a ValueError: the server
        answers it with status 400, and no other request notices.
    """
    extra = extra_args or {}
    if RESOLVED in extra:
        raise InputError(f"{RESOLVED!r} is set by the engine itself")
    steer = extra.get(STEER)
    if not isinstance(steer, dict):
        steer = {} if steer is None and STEER not in extra else {"program": steer}
    elif STRENGTH in extra:
        raise InputError(f"give the strength in {STEER} or as {STRENGTH}, not both")
    if unknown := sorted(map(str, set(steer) - set(FIELDS))):
        raise InputError(f"{STEER} has {unknown[0]!r}; expected {' and '.join(FIELDS)}")
    given = steer.get("strength", extra.get(STRENGTH, 1.0))
    strength = number(given, "the strength of steering")
    name = steer.get("program", default)
    if name is None or name == NONE:
        return None
    if not isinstance(name, str) or name not in programs:
        there = ", ".join([*programs, NONE])
        raise InputError(f"there is no program {name!r}; there are: {there}")
    return Steering(programs[name].version, strength) if strength else None


def cache_salt(own: str | None, steering: Steering | None) -> str | None:
    """Return the salt that keeps a prefix computed under one program from serving another.

    Parameters
    ----------
    own
        The salt that the request came with.
    steering
        What is done to it. Requests that are left alone keep their own salt, so that they go on
        sharing what they share without the plugin.
    """
    if steering is None:
        return own
    text = f"{steering.version} {steering.strength!r} {own or ''}"
    return f"{RESOLVED}:{hashlib.sha256(text.encode()).hexdigest()}"

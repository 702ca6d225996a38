"""The steering of a request: program, strength and positions, from its ``extra_args``."""

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from refusal_kernels.errors import InputError
from refusal_kernels.intervention_base import finite_number
from refusal_kernels.vllm.names import FLAT, RESOLVED, STEER, STRENGTH
from refusal_kernels.vllm.programs import NONE, NamedProgram
from refusal_kernels.vllm.spans import overlap, read_span

FIELDS = ("program", *FLAT.values())
# What a request means that gives another key than these; words are compared in lower case.
MEANT = {key: key for key in (STEER, *FLAT)}
MEANT |= {"program": STEER, "steer_program": STEER, "strength": STRENGTH}
# words so common that they mean steering only in a request that names a program
COMMON = {
    **{"position": "steer_positions", "positions": "steer_positions"},
    **{"from": "steer_from", "to": "steer_to"},
}
ALIKE = 0.75  # of difflib's ratio: "steering" and "steer" have 0.77, "seed" and "steer" 0.67


class Steering(NamedTuple):
    """What steers one request; an unsteered request has none.

    Attributes
    ----------
    version, strength
        Of its program.
    first, end
        The tokens from position `first` to `end` - 1 are steered; None has no end.
    bounded
        Whether it begins or ends somewhere behind the prompt.
    """

    version: str
    strength: float
    first: int = 0
    end: int | None = None
    bounded: bool = False


def read_steering(
    extra_args: Mapping[str, Any] | None,
    programs: Mapping[str, NamedProgram],
    default: str | None,
    prompt: int = 0,
) -> Steering | None:
    """Return the steering that a request asks for; None leaves it unsteered.

    Two forms mean the same: ``{"steer": {"program": NAME, "strength": 0.7}}`` and, for HTTP, where
    an extra argument is a string or a number, ``{"steer": NAME, "steer_strength": 0.7}``. Without a
    program the engine's default is taken; "none" asks for the unmodified model. ``positions``,
    ``from`` and ``to`` (flat: ``steer_positions`` ...) restrict the program to some tokens.

    Parameters
    ----------
    extra_args
        Of the request.
    programs
        By name.
    default
        The program of requests that name none, or None.
    prompt
        How many tokens the prompt has.

    Raises
    ------
    InputError
        If there is no such program or an argument is malformed.
    """
    extra = extra_args or {}
    if RESOLVED in extra:
        raise InputError(f"{RESOLVED!r} is set by the engine itself")
    refuse_misspelled(extra)
    steer = extra.get(STEER)
    nested = isinstance(steer, dict)
    if not isinstance(steer, dict):
        steer = {} if steer is None and STEER not in extra else {"program": steer}
    elif flat := [key for key in FLAT if key in extra]:
        raise InputError(f"give the {FLAT[flat[0]]} in {STEER} or as {flat[0]}, not both")
    steer = {**{FLAT[key]: extra[key] for key in FLAT if key in extra}, **steer}
    if unknown := sorted(map(str, set(steer) - set(FIELDS))):
        raise InputError(f"{STEER} has {unknown[0]!r}; expected {', '.join(FIELDS)}")
    given = steer.get("strength")
    name = steer.get("program", default)
    if name not in (None, NONE) and (common := [key for key in COMMON if key in extra]):
        meant = COMMON[common[0]]
        right = f"{FLAT[meant]!r} in {STEER}" if nested else repr(meant)
        raise InputError(f"the request has {common[0]!r}; expected {right}")
    strength = 1.0 if given is None else finite_number(given, f"the strength of program {name!r}")
    if name is None and (alone := [field for field in FLAT.values() if field in steer]):
        given = f"{alone[0]} {steer[alone[0]]!r}"
        raise InputError(f"the request has {given} and no program; name one as {STEER}")
    if name is None or name == NONE:
        return None
    if not isinstance(name, str) or name not in programs:
        there = ", ".join([*programs, NONE])
        raise InputError(f"there is no program {name!r}; there are: {there}")
    program = programs[name]
    least, largest = program.strengths
    if not least <= strength <= largest:
        raise InputError(
            f"strength {strength:g} of program {name!r} could make the residual stream overflow; "
            f"expected {least:.4g} to {largest:.4g}"
        )
    span = read_span(steer, "the request")
    first, end = overlap(program.span.window(prompt), span.window(prompt))
    if not strength or (end is not None and end <= first):
        return None
    bounded = first > prompt or (end is not None and end > prompt)
    return Steering(program.version, strength, first, end, bounded)


def refuse_misspelled(keys: Iterable[str]) -> None:
    """Refuse a key that seems to mean steering: the request would silently be unsteered.

    Raises
    ------
    InputError
        With the key, and the right one.
    """
    for key in keys:
        if key in (STEER, *FLAT):
            continue
        word = str(key).lower().replace("-", "_")
        alike = difflib.get_close_matches(word, MEANT, n=1, cutoff=ALIKE)
        if not alike and word.startswith(STEER):
            alike = [STEER]
        if alike:
            raise InputError(f"the request has {key!r}; expected {MEANT[alike[0]]!r}")


def cache_salt(salt: str | None, steering: Steering | None) -> str | None:
    """Return the salt that restricts cached prefixes to requests with the same steering.

    The same tokens must be steered, so prompts of different lengths share no prefix where
    ``positions`` say which.

    Parameters
    ----------
    salt
        The salt that the request came with. An unsteered request keeps it, and so shares the
        prefixes that it shares without the plugin.
    steering
        The request's steering.
    """
    if steering is None:
        return salt
    version, strength, first, end, _ = steering
    text = f"{version} {strength!r} {first} {end} {salt or ''}"
    return f"{RESOLVED}:{hashlib.sha256(text.encode()).hexdigest()}"

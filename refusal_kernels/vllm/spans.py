"""Which tokens of a request are steered: by their kind, and by their absolute position."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from refusal_kernels.errors import InputError
from refusal_kernels.intervention_base import GENERATED, LAST, POSITIONS, PROMPT

KEYS = ("positions", "from", "to")


class Span(NamedTuple):
    """Tokens of a kind, from one position to another.

    Attributes
    ----------
    positions
        As of `refusal_kernels.Intervention`: "all", "prompt", "generated", or "last", the last of
        the prompt and all that is generated.
    first, end
        Absolute positions, the first token's is 0: from `first` to `end` - 1. None has no end.
    """

    positions: str = "all"
    first: int = 0
    end: int | None = None

    def window(self, prompt: int) -> tuple[int, int | None]:
        """Return the first position and the end of these tokens, after a prompt of a length."""
        first = {GENERATED: prompt, LAST: max(prompt - 1, 0)}.get(self.positions, 0)
        return overlap(
            (self.first, self.end), (first, prompt if self.positions == PROMPT else None)
        )


EVERY_TOKEN = Span()


def overlap(one: tuple[int, int | None], other: tuple[int, int | None]) -> tuple[int, int | None]:
    """Return the first position and the end of what two windows share."""
    ends = [end for _, end in (one, other) if end is not None]
    return max(one[0], other[0]), min(ends, default=None)


def read_span(given: Mapping[str, Any], where: str) -> Span:
    """Read ``positions``, ``from`` and ``to`` of a program or a request; other keys are ignored.

    Raises
    ------
    InputError
        If a value is malformed, or no position is from ``from`` to ``to`` - 1.
    """
    positions = given.get("positions", EVERY_TOKEN.positions)
    if not isinstance(positions, str) or positions not in POSITIONS:
        raise InputError(f"{where}: positions is {positions!r}; expected {', '.join(POSITIONS)}")
    first = _position(given.get("from", 0), "from", where)
    end = given.get("to")
    if end is not None and _position(end, "to", where) <= first:
        raise InputError(f"{where}: to is {end}; expected more than from, which is {first}")
    return Span(positions, first, end)


def _position(value: Any, name: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise InputError(f"{where}: {name} is {value!r}; expected the position of a token")
    return value

"""How long work reports what is done."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]
"""Called with how much is done, and of how much."""

Step = Callable[[str], Progress]
"""Announces a step of the work by its description and returns the step's `Progress`."""


def no_step(description: str) -> Progress:
    """Announce nothing: the `Step` of a caller that wants no progress."""
    return lambda done, total: None


@contextmanager
def single_step(progress: Progress) -> Iterator[None]:
    """Report work that cannot be counted: 0 of 1 before it, 1 of 1 after it."""
    progress(0, 1)
    yield
    progress(1, 1)

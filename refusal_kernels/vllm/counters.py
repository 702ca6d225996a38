"""Counts of the front end, among vLLM's own metrics."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from refusal_kernels.errors import InputError

REQUESTS = "refusal_kernels:requests"  # Prometheus appends _total
REFUSED = "refusal_kernels:refused_requests"
CHANGES = "refusal_kernels:program_changes"


@functools.cache
def counter(name: str) -> Any:
    """Return a counter; the first call registers it."""
    from prometheus_client import Counter

    about, labels = {
        REQUESTS: ("Requests that were queued, by program.", ["program"]),
        REFUSED: ("Requests that were refused because of their steering.", []),
        CHANGES: ("Changes of the programs, by result: made or refused.", ["result"]),
    }[name]
    return Counter(name, about, labels)


@contextlib.contextmanager
def counted_change() -> Iterator[None]:
    """Count a change of the programs as made, or as refused if it raises `InputError`."""
    try:
        yield
    except InputError:
        counter(CHANGES).labels("refused").inc()
        raise
    counter(CHANGES).labels("made").inc()

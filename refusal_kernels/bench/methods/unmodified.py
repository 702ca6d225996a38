"""The model as it is: what every ratio is to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SITES = ()


@contextmanager
def steer(model: Any, task: Any) -> Iterator[Any]:
    """Change nothing."""
    yield model

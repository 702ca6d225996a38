"""The direction written out of the weights beforehand: not a way to steer at run time."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from refusal_kernels.direction import Direction
from refusal_kernels.orthogonalize import orthogonalize


@contextmanager
def steer(model: Any, task: Any) -> Iterator[Any]:
    """Edit a copy with weights of its own."""
    task.refuse("an edit of the weights", layers=True)
    model = copy.deepcopy(model)
    orthogonalize(model, Direction(task.directions[0].cpu()))
    yield model

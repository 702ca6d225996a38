"""The direction written out of the weights beforehand: not a way to steer at run time."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from refusal_kernels.bench.shapes import free_memory
from refusal_kernels.direction import Direction
from refusal_kernels.weights.in_memory import orthogonalize


@contextmanager
def steer(model: Any, task: Any) -> Iterator[Any]:
    """Edit a copy with weights of its own."""
    task.refuse("an edit of the weights", layers=True)
    size = sum(parameter.nbytes for parameter in model.parameters())
    if model.device.type == "cpu" and size > 0.7 * free_memory():
        raise NotImplementedError("a second copy of the weights does not fit in memory")
    model = copy.deepcopy(model)
    orthogonalize(model, Direction(task.directions[0].cpu()))
    yield model

"""Three plain Python hooks per block, as in the paper's code."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from refusal_kernels.direction import Direction
from refusal_kernels.patching.paper_hooks import paper_hooks


@contextmanager
def steer(model: Any, task: Any) -> Iterator[Any]:
    """Hook this copy of the model."""
    each = [Direction(r) for r in task.directions.cpu()]
    directions = each[0] if len(each) == 1 else [each[k] for k in task.rows]
    with paper_hooks(model, directions, task.layers):
        yield model

"""`refusal_kernels.patch` without its fused norms: the edit inside the residual adds alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from refusal_kernels import Ablate, Direction, patch


@contextmanager
def steer(model: Any, task: Any) -> Iterator[Any]:
    """Patch this copy of the model, every layer of it."""
    task.refuse("this method", layers=True)
    with patch(model, Ablate(Direction(task.directions[0].cpu())), fuse_norms=False):
        yield model

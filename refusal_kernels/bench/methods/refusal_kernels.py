"""`refusal_kernels.patch`: the edit inside the residual adds; the variant is the backend."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from refusal_kernels import Ablate, Direction, patch
from refusal_kernels.ops import use_backend


def during(task: Any) -> AbstractContextManager[Any]:
    """Use the backend of the variant; the package's own choice without one."""
    return use_backend(task.variant) if task.variant else nullcontext()


@contextmanager
def steer(model: Any, task: Any) -> Iterator[Any]:
    """Patch this copy of the model, with a program for each direction."""
    where: dict[str, Any] = {}
    if task.layers is not None:  # the paper's three places, of these blocks alone
        where = {"layers": task.layers, "sites": ("block_input", "attn", "mlp")}
    edits = [Ablate(Direction(r.cpu()), **where) for r in task.directions]
    if len(edits) == 1:
        with patch(model, edits[0]):
            yield model
        return
    with patch(model, *([edit] for edit in edits)) as handle, handle.route(task.rows):
        yield model

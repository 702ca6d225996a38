"""Many edits of one model at once: each row of a batch, or each request, has its own."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from refusal_kernels.hf.served import ServedModel
from refusal_kernels.interventions import Intervention
from refusal_kernels.patching.patch import patch

Route = Callable[[Sequence[int]], contextlib.AbstractContextManager[Any]]
"""Given the number of each row's edit, or one number for all, return the context to run them in."""


@contextlib.contextmanager
def steering(model: Any, edits: Sequence[Intervention]) -> Iterator[Route]:
    """Steer a Hugging Face model or a served one, inside, by edits that `Route` chooses from.

    Without a route every row has the first.
    """
    if isinstance(model, ServedModel):
        with model.under(edits[:1]):
            yield lambda numbers: model.under([edits[number] for number in numbers])
    else:
        with patch(model, *([edit] for edit in edits)) as handle:
            yield handle.route

"""What Inductor makes of the edits in a graph for a CPU: of small rows the formula, else the op.

The call of an op out of compiled code takes ten microseconds, with the memory that it asks for, and
nothing is fused across it. Given the formula instead, Inductor makes one loop nest of add, edit and
norm. Its sums are those of one row, in an order that does not depend on the other rows. Larger rows
keep the kernels, and sooner with a route, whose vectors Inductor gathers less well.
"""

import functools
import inspect
import logging
import math
from collections.abc import Callable
from typing import Any

import torch

from refusal_kernels.ops import reference

MOST, MOST_ROUTED = 4096, 512
"""Channels times slots up to which the formula is the faster: `benchmarks/bench_compiled.py`.

With a route it is so for the few tokens of a decoding batch; a prompt of hundreds can take twice as
long as by the op, of the little that such rows take.
"""

logger = logging.getLogger(__name__)


@functools.cache
def register() -> None:
    """Tell Inductor, once. It takes a second to import, so only where something is compiled."""
    ops = torch.ops.refusal_kernels
    try:
        from torch._inductor import decomposition, lowering

        for op, formula in (
            (ops.add_steer_inference.default, reference.add_steer),
            (ops.add_steer_rms_norm_inference.default, reference.add_steer_rms_norm),
        ):
            # first: of an op that has a decomposition, and is there nevertheless, Inductor
            # believes that it was forgotten
            lowering.make_fallback(op)
            decomposition.register_decomposition(op)(_where_small(formula))
        # a copy of the table, which an earlier compilation may have made
        decomposition.fast_random_decomps.cache_clear()
    except (ImportError, AttributeError, TypeError) as error:  # PyTorch promises none of these
        logger.warning("compiled graphs call the ops also for small rows: %s", error)


def _where_small(formula: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(formula)

    def decompose(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        most = MOST if given.get("route") is None else MOST_ROUTED
        if given["x"].device.type != "cpu" or math.prod(given["bank"].shape[2:]) > most:
            return NotImplemented
        return formula(*args, **kwargs)

    return decompose

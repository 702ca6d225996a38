"""Share the batches of an extraction among the processes that `torchrun` starts.

In every round each process takes one batch, and the first process merges the moments in the order
of the batches. So the bits of the result and of a checkpoint do not depend on the number of
processes. The bits of a forward pass depend on the machine and, on a CPU, on the number of threads
of a process; torchrun gives each process one thread.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from refusal_kernels.errors import InputError, first_line

TIMEOUT_S = 1800.0  # how long a process waits for another's batch: PyTorch's default


class PeerError(RuntimeError):
    """Another process has stopped or has not answered in time."""


class Team:
    """The processes that share the batches; one by default. Rank 0 holds the result."""

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size, self._group = rank, size, group

    def everyone(self, mine: Any) -> list[Any]:
        """Return every process's object, by rank. Objects are pickled."""
        given: list[Any] = [mine]
        if self.size > 1:
            given = [None] * self.size
            with self._answered():
                dist.all_gather_object(given, mine, self._group)
        return given

    def gather(self, mine: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """Return every process's tensors, by rank, on the first process; elsewhere nothing."""
        if self.size == 1:
            return [mine]
        columns = []
        with self._answered():
            for tensor in mine:
                here = tensor.cpu().contiguous()
                into = [torch.empty_like(here) for _ in range(self.size)] if not self.rank else None
                dist.gather(here, into, group=self._group, group_dst=0)
                columns.append(into or [])
        return list(zip(*columns, strict=True))

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with those of the first process."""
        if self.size == 1:
            return
        with self._answered():
            for tensor in tensors:
                here = tensor.cpu()
                dist.broadcast(here, group=self._group, group_src=0)
                tensor.copy_(here)

    @contextmanager
    def _answered(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's own errors are plain ones
            raise PeerError(
                f"process {self.rank} of {self.size}: another has stopped or not answered "
                f"({first_line(error)})"
            ) from None


@contextmanager
def team(model: Any) -> Iterator[Team]:
    """Give the processes that share the batches: those of torch.distributed if initialized.

    All processes of a tensor-parallel model run every batch together; each is then a team of one.
    """
    if not dist.is_available() or not dist.is_initialized() or is_spread(model):
        yield Team()
        return
    # The states travel through main memory, whatever the processes use otherwise.
    new = "cpu:" not in dist.get_backend_config()
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT_S)) if new else None
    try:
        yield Team(dist.get_rank(), dist.get_world_size(), group)
    finally:
        if new:
            dist.destroy_process_group(group)


@contextmanager
def joined(timeout_s: float = TIMEOUT_S, *, one_model: bool = False) -> Iterator[tuple[int, int]]:
    """Connect to the other processes of `torchrun`, if any; give (rank, local rank).

    With `one_model` they share a model: they reach each other's devices, and the end waits for all.
    """
    connects = False
    try:
        size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        local = int(os.environ.get("LOCAL_RANK", rank))
        connects = size > 1 and not dist.is_initialized()
        if connects:
            backend = None if one_model else "gloo"  # None: one for every kind of device
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except (ValueError, RuntimeError) as error:
        message = f"the processes of torchrun do not meet: {first_line(error)}"
        raise InputError(message) from None
    try:
        yield rank, local
        if one_model and size > 1:
            dist.barrier()
    finally:
        if connects and dist.is_initialized():
            dist.destroy_process_group()


def is_spread(model: Any) -> bool:
    """Whether the processes hold parts of one model."""
    return (getattr(model, "tp_size", None) or 1) > 1 or any(
        isinstance(p, DTensor) for p in model.parameters()
    )

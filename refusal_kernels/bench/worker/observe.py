"""What is seen beside the time: what is left of the direction, kernels, memory."""

import contextlib
import gc
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import FAR
from .models import stream_norms
from .step import SteeringTask, TimedStep, synchronize


def left_of(model: Any, step: TimedStep, task: SteeringTask) -> float | None:
    """Return the largest ``|r . h| / |h|`` at what the norms read, where it should be gone.

    Seen by the norms themselves, whatever the method: they come after every edit. Not by hooks,
    since there are methods that remove all of them. None where no norm was called.
    """
    worst: list[float] = []

    def seeing(norm: nn.Module) -> Any:
        forward = norm.forward

        def see(*args: Any, **kwargs: Any) -> Any:
            h = (args[0] if args else kwargs["hidden_states"]).double()
            h = h.reshape(len(task.rows), -1, h.shape[-1])
            along = (h @ task.per_row(h.dtype).transpose(1, 2)).abs().squeeze(-1)
            share = float((along / h.norm(dim=-1).clamp_min(1e-30)).max())  # padding may be 0
            worst.append(share if share < FAR else FAR)  # also where it is no number
            return forward(*args, **kwargs)

        return see

    norms = stream_norms(model)
    steered = set(task.blocks(len(norms) // 2))
    seen = [norm for k, (by, norm) in enumerate(norms) if by in steered or k // 2 in steered]
    for norm in seen:
        norm.__dict__["forward"] = seeing(norm)
    try:
        step.once()
    finally:
        for norm in seen:
            del norm.__dict__["forward"]
        step.rewind()
    return max(worst, default=None)


class _OpCount(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not getattr(func, "is_view", False)
        return func(*args, **(kwargs or {}))


def launches(step: TimedStep, device: str) -> int | None:
    """Count the kernels of one step on a GPU; on a CPU the ops, views apart, where not compiled."""
    try:
        if device.startswith("cuda"):
            from torch.profiler import ProfilerActivity, profile

            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
                step.once()
                synchronize()
            kinds = ("Memcpy", "Memset")
            return sum(
                event.device_type == torch.autograd.DeviceType.CUDA
                and not event.name.startswith(kinds)
                for event in profiled.events()
            )
        if step.cell["mode"] != "eager":
            return None
        with _OpCount() as ops:
            step.once()
        return ops.count
    finally:
        step.rewind()


class MemoryMark:
    """The high-water mark of memory, from the moment it is made, in MiB."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew
            self.before = self._status("VmRSS")

    @staticmethod
    def _status(name: str) -> float:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(x.split()[1]) / 1024 for x in lines if x.startswith(name))
        except (OSError, StopIteration):
            return float("nan")

    def grown(self) -> float | None:
        """How far above what was in use it went; None where nothing tells it."""
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.cuda else self._status("VmHWM")
        return None if peak != peak else max(0.0, round(peak - self.before, 2))

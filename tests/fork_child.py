"""What the child processes of the tests of `extract` and `select` do (see `forks.py`)."""

import importlib
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from refusal_kernels import cli, toy
from refusal_kernels.errors import InputError
from refusal_kernels.files import tensors
from refusal_kernels.hf import load as loading
from refusal_kernels.research.extraction.distributed import PeerError

# the package names functions as it names their modules
COLLECT: Any = importlib.import_module("refusal_kernels.research.extraction.collect")
torch.set_num_threads(1)  # before anything runs: what is forked has no other threads
LOADED = loading.load("toy", "cpu", "auto")


def tell_of_batches(tell: Any) -> None:
    """Send the number of prompts of every batch, when it begins."""
    read = COLLECT._read

    def told(model: Any, batch: Any, *others: Any) -> None:
        tell.send(len(batch.rows))
        read(model, batch, *others)

    COLLECT._read = told


def command_line(arguments: list[str], die_at: tuple[str, int] | None, tell: Any) -> None:
    """Run the command line; `die_at` is a moment, and the which of its kind."""
    tell_of_batches(tell)
    loading.load = lambda *_, **__: LOADED  # it is here already
    if die_at is not None:
        _plan_death(*die_at)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    sys.argv = ["refusal-kernels", *arguments]
    cli.main()


def _plan_death(moment: str, number: int) -> None:
    """Have this process killed at a call of one of the functions that files go through."""
    left = [number]

    def now() -> bool:
        left[0] -= 1
        return left[0] == 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    replace, unlink = os.replace, Path.unlink

    class Half:
        """Writes half of what it is given, and is killed then."""

        def __init__(self, path: Any, mode: str) -> None:
            self.file = open(path, mode)  # noqa: SIM115

        def __enter__(self) -> "Half":
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

        def writelines(self, parts: Any) -> None:
            data = b"".join(parts)
            last = now()
            self.file.write(data[: len(data) // 2] if last else data)
            self.file.flush()
            if last:
                die()

    def replaced(source: Any, target: Any) -> None:
        last = now()
        if last and moment == "before the rename":
            die()
        replace(source, target)
        if last:
            die()

    def unlinked(self: Path, missing_ok: bool = False) -> None:
        if ".part" in self.name and not self.name.startswith("."):
            die()
        unlink(self, missing_ok)

    if moment == "half-way through the file":
        tensors.open = Half  # type: ignore[attr-defined]
    elif moment == "before the checkpoint is removed":
        Path.unlink = unlinked  # type: ignore[method-assign]
    else:
        os.replace = replaced


def peak_of_collecting(count: int, tell: Any) -> None:
    """Send the peak of this process's resident memory in bytes, after so many prompts."""
    prompts = list(toy.prompts("harmful", "train"))
    COLLECT.collect(*LOADED, (prompts * count)[:count], batch_size=8)
    lines = Path("/proc/self/status").read_text().splitlines()
    tell.send(1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")))


def member(rank: int, size: int, store: str, task: dict[str, Any], tell: Any) -> None:
    """Collect as one of several processes; send the state as bytes, or the error as (type, text).

    The task has the prompts, and may have a checkpoint, the batch at which a rank ends or hangs,
    and other prompts for the last rank.
    """
    torch.distributed.init_process_group(
        "gloo", f"file://{store}", timedelta(seconds=task.get("timeout_s", 60)), size, rank
    )
    read, left = COLLECT._read, [task.get("stop_at", 0) + 1]  # the probe is read first

    def stopping(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] == 0 and rank == size - 1 and "stop" in task:
            os._exit(3) if task["stop"] == "end" else time.sleep(600)
        read(*arguments)

    COLLECT._read = stopping
    prompts = task["others"] if "others" in task and rank == size - 1 else task["prompts"]
    try:
        moments = COLLECT.collect(
            *LOADED, prompts, batch_size=4, checkpoint=task.get("checkpoint"), last_layer=3
        )
    except (InputError, PeerError) as error:
        tell.send((type(error).__name__, str(error)))
        return
    tell.send([tensor.numpy().tobytes() for tensor in moments.tensors])

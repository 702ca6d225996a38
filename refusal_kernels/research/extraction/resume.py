"""Checkpoints of a collection: what a killed run leaves, and whether it may be gone on with."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import sweep
from refusal_kernels.hf.batches import Batches
from refusal_kernels.research.extraction.moments import Moments

DONE = "batches"  # how far the run has come
Identity = Mapping[str, str]
"""What a run depends on, each under the name that a message gives it."""


class Checkpoint:
    """A file with the state after the last whole batch.

    Parameters
    ----------
    path
        Where it is; written under a temporary name and renamed, so what stands there is whole.
    identity
        Of this run. A file of another run is refused.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Identity) -> None:
        self.path = Path(path)
        self.identity = dict(identity)

    def load(self, moments: Moments, total: int) -> int:
        """Read the state into `moments`; return how many of `total` batches are done, or 0.

        Raises
        ------
        InputError
            If the file is damaged, or of another run; the message names what differs.
        """
        sweep(self.path)
        if not self.path.exists():
            return 0
        saved = Moments.load(self.path)
        differ = sorted(
            name
            for name in {*self.identity, *saved.metadata} - {DONE}
            if self.identity.get(name) != saved.metadata.get(name)
        )
        if differ:
            raise InputError(
                f"{self.path} is the checkpoint of another run, with another {', '.join(differ)}; "
                "remove it to begin anew"
            )
        done = saved.metadata.get(DONE, "")
        same = saved.shape == moments.shape and saved.groups == moments.groups
        if not same or not (done.isascii() and done.isdigit()) or int(done) > total:
            raise InputError(f"{self.path} is no checkpoint of this run; remove it to begin anew")
        for mine, theirs in zip(moments.tensors, saved.tensors, strict=True):
            mine.copy_(theirs)
        return int(done)

    def save(self, moments: Moments, done: int) -> None:
        """Write the state after so many batches."""
        moments.metadata = {**self.identity, DONE: str(done)}
        moments.save(self.path)


def identity_of(
    model: Any, parts: Sequence[tuple[int, Batches]], moments: Moments, probe: Moments
) -> dict[str, str]:
    """Return what the result of a run depends on.

    Parameters
    ----------
    model
        Its class, its dtypes and a checksum of every weight are in.
    parts
        Groups and their prompts, of which the tokens count: the chat format is in them.
    moments
        Of the shape and the groups that the run has.
    probe
        The moments of one prompt alone, from this very model. They stand for what is not in the
        weights: a patch or a hook, other kernels, another machine or number of threads.
    """
    prompts, weights = hashlib.sha256(), hashlib.sha256(type(model).__name__.encode())
    for group, batches in parts:
        prompts.update(f"{group} {batches.pad_id} {batches.prompts}\n".encode())
        prompts.update(batches.ends.numpy().data)
        prompts.update(batches.tokens.numpy().data)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        weights.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        weights.update(str(_checksum(tensor)).encode())
    numbers = hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in probe.tensors))
    return {
        "set of prompts or chat format": prompts.hexdigest(),
        "model": weights.hexdigest(),
        "patch, machine or number of threads": numbers.hexdigest(),
        "batch size": str(parts[0][1].batch_size),
        "shape (layers, positions, hidden)": str(moments.shape),
        "set of groups": str(moments.groups),
    }


def _checksum(tensor: Tensor) -> int | None:
    """One that every single number changes, at one pass where the tensor is; None if there is none.

    That is so for an offloaded tensor, whose numbers are elsewhere, and for a quantized one of a
    class that PyTorch cannot do this for.
    """
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()
    if tensor.is_meta or not tensor.numel():
        return None
    try:
        bits = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor  # float8
        return int(torch.hash_tensor(bits).view(torch.int64))
    except NotImplementedError:
        return None

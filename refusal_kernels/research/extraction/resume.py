"""Checkpoints of an extraction: what an interrupted run leaves, and whether a run may resume it."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import sweep
from refusal_kernels.hf.batches import Batches
from refusal_kernels.hf.served import ServedModel
from refusal_kernels.research.extraction.moments import Moments

DONE = "batches"  # how far the run has come
Identity = Mapping[str, str]
"""What a run depends on, each under the name that a message gives it."""


class Checkpoint:
    """A file with the state after the last whole batch; one of another identity is refused."""

    def __init__(self, path: str | os.PathLike[str], identity: Identity) -> None:
        self.path = Path(path)
        self.identity = dict(identity)

    def load(self, moments: Moments, total: int) -> int:
        """Read the state into `moments`; return how many of `total` batches are done, or 0.

        Raises InputError if the file is damaged or of another run; the message names what differs.
        """
        sweep(self.path)
        if not self.path.exists():
            return 0
        saved = Moments.load(self.path)
        done = saved.metadata.pop(DONE, "")
        check_identity(self.path, self.identity, saved.metadata)
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


def check_identity(path: Path, identity: Identity, metadata: Identity) -> None:
    """Refuse a checkpoint whose metadata names another run; the message names what differs."""
    names = sorted({*identity, *metadata})
    if differ := [name for name in names if identity.get(name) != metadata.get(name)]:
        raise InputError(
            f"{path} is the checkpoint of another run, with another {', '.join(differ)}; "
            "remove it to begin anew"
        )


def identity_of(
    model: Any, parts: Sequence[tuple[int, Batches]], moments: Moments, probe: Moments
) -> dict[str, str]:
    """Return what the result of a run depends on, as digests.

    `probe` has the moments of one prompt from this model. They stand for what the weights do not
    show: a patch or a hook, the kernels, the machine, the number of threads.
    """
    prompts, weights = hashlib.sha256(), hashlib.sha256(type(model).__name__.encode())
    tensors: Iterable[tuple[str, Tensor]]
    if isinstance(model, ServedModel):  # its weights are elsewhere, and have made the probe
        weights.update(json.dumps(model.config.to_dict(), default=str).encode())
        tensors = ()
    else:
        tensors = *model.named_parameters(), *model.named_buffers()
    for group, batches in parts:
        prompts.update(f"{group} {batches.pad_id} {batches.prompts}\n".encode())
        prompts.update(batches.ends.numpy().data)
        prompts.update(batches.tokens.numpy().data)
    for name, tensor in tensors:
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
    """Return a checksum of every number, computed on the tensor's device in one pass.

    None for an offloaded tensor, and for a quantized class that PyTorch cannot hash.
    """
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()
    if tensor.is_meta or not tensor.numel():
        return None
    try:
        bits = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor  # float8
        return int(torch.hash_tensor(bits).view(torch.int64))
    except NotImplementedError:
        return None

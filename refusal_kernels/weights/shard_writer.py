"""Write a copy of a safetensors file with some tensors edited, piece by piece."""

import hashlib
import json
import math
from collections.abc import Iterator
from typing import IO, Any

import torch
from torch import Tensor

from refusal_kernels.weights.checkpoint_plan import CheckpointPlan
from refusal_kernels.weights.projection import BLOCK_NUMBERS, project_
from refusal_kernels.weights.shards import DTYPES, Shard, ShardTensor

CHUNK = 4 << 20  # bytes copied at once


class ShardWriter:
    """Writes one shard: its header, then tensor after tensor, edited or as they are."""

    def __init__(
        self, file: IO[bytes], shards: list[Shard], plan: CheckpointPlan, r: Tensor
    ) -> None:
        self._file, self._plan, self._unit = file, plan, r  # r: float64 [hidden]
        self.digest = hashlib.sha256()  # of the bytes written
        # of all shards: the output matrix may be copied from another one
        self._entries = {e.name: (s, e) for s in shards for e in s.entries}

    def write(self, shard: Shard, added: tuple[str, str] | None) -> Iterator[int]:
        """Write the shard; yield the number of bytes after each piece."""
        new = added is not None and added[0] not in self._entries
        yield self._put(header_with(shard, added[0], self._entries[added[1]][1]) if added and new
                        else shard.header)  # fmt: skip
        for entry in shard.entries:
            if self._plan.head is not None and entry.name == self._plan.head[0]:
                yield from self._copied(*self._entries[self._plan.head[1]])
            elif entry.name in self._plan.axes:
                yield from self._edited(shard, entry)
            else:
                yield from self._copied(shard, entry)
        if added and new:
            yield from self._copied(*self._entries[added[1]])

    def _put(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def _copied(self, shard: Shard, entry: ShardTensor) -> Iterator[int]:
        with open(shard.path, "rb") as read:
            read.seek(entry.start)
            left = entry.size
            while left:
                data = read.read(min(CHUNK, left))
                if not data:
                    raise OSError(f"{shard.path} became shorter while it was read")
                left -= len(data)
                yield self._put(data)

    def _edited(self, shard: Shard, entry: ShardTensor) -> Iterator[int]:
        """Write a tensor without the direction, in the blocks of `project_`: with its roundings."""
        axis, shape, dtype = self._plan.axes[entry.name], entry.shape, DTYPES[entry.dtype]
        rows, width = (1, *shape)[-2:]
        last = axis == len(shape) - 1
        step = max(1, BLOCK_NUMBERS // width) if last else rows
        parts = [
            (min(step, rows - at), width)
            for _ in range(math.prod(shape[:-2]))
            for at in range(0, rows, step)
        ]
        with open(shard.path, "rb") as read:
            read.seek(entry.start)
            for part in parts:
                block = torch.empty(part, dtype=dtype)
                raw = block.view(torch.uint8).reshape(-1).numpy().data
                if read.readinto(raw) != raw.nbytes:
                    raise OSError(f"{shard.path} became shorter while it was read")
                project_(block, int(last), self._unit)
                yield self._put(raw)


def header_with(shard: Shard, name: str, like: ShardTensor) -> bytes:
    """Return a shard's header with one more tensor, at the end of the others."""
    document = json.loads(shard.header[8:])
    end = shard.size - len(shard.header)
    document[name] = {
        "dtype": like.dtype,
        "shape": list(like.shape),
        "data_offsets": [end, end + like.size],
    }
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

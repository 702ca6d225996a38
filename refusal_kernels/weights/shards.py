"""Read the headers of a checkpoint's safetensors files, strictly and without their tensors.

A folder may come from anyone: its index may name files elsewhere, and its headers may lie. Every
header is checked before it is used, and no allocation trusts it.
"""

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import check_size, parse_json, read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LIMIT_HEADER = 100 << 20  # bytes: what the safetensors library takes
LIMIT_FILE = 1 << 44
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_BITS = {name: dtype.itemsize * 8 for name, dtype in DTYPES.items()} | {
    **{"I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16, "I8": 8, "U8": 8},
    **{"BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


@dataclass(frozen=True)
class ShardTensor:
    """One tensor of a file; `start` counts bytes from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file."""

    path: Path
    header: bytes  # all before the tensors
    metadata: dict[str, str]
    entries: tuple[ShardTensor, ...]  # in the order of their bytes
    size: int  # of the file, in bytes

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    def key(self) -> list[Any]:
        """Return values that change when the file changes."""
        digest = hashlib.sha256(self.header).hexdigest()
        return [self.name, self.size, self.path.stat().st_mtime_ns, digest]


def read_shards(folder: Path) -> list[Shard]:
    """Return the safetensors files of a checkpoint, headers and index checked."""
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise InputError(f"{folder} has neither {SINGLE} nor {INDEX}; expected safetensors")
        return [read_shard(inside(folder, SINGLE))]
    document = read_json(inside(folder, INDEX))
    names = document.get("weight_map") if isinstance(document, dict) else None
    if (
        not isinstance(names, dict)
        or not names
        or not all(isinstance(name, str) for name in names.values())
    ):
        raise InputError(
            f"{index} is malformed; expected a weight_map of tensor names to file names"
        )
    files = sorted(set(names.values()))
    for name in files:
        plain = Path(name).name == name and "\\" not in name and not name.startswith(".")
        if not plain or not name.endswith(".safetensors"):
            raise InputError(
                f"{index} names the file {name!r}; expected the name of a .safetensors file in "
                "the same folder"
            )
    shards = [read_shard(inside(folder, name)) for name in files]
    held: dict[str, str] = {}
    for shard in shards:
        for entry in shard.entries:
            if entry.name in held:
                raise InputError(f"{entry.name} is in {held[entry.name]} and in {shard.name}")
            held[entry.name] = shard.name
    for name in sorted(names.keys() | held.keys()):
        if names.get(name) != held.get(name):
            raise InputError(
                f"{index} says that {name!r} is in {names.get(name)}; it is in {held.get(name)}"
            )
    return shards


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file of a folder; refuse a link that leads out of it.

    Links of the hub's cache into the folder ``blobs`` beside the snapshots are followed.
    """
    path, root = folder / name, folder.resolve()
    real = path.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not real.is_relative_to(root) and not real.is_relative_to(blobs):
        raise InputError(f"{path} is a link to {real}, outside of its folder")
    return path


def read_shard(path: Path) -> Shard:
    """Read the header of a safetensors file and check it against the file."""
    size = check_size(path, "a safetensors file", LIMIT_FILE)
    try:
        with open(path, "rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or not 2 <= length <= min(size - 8, LIMIT_HEADER):
                raise InputError(
                    f"{path} is damaged or no safetensors file: a header of {length} bytes in a "
                    f"file of {size}"
                )
            header = file.read(length)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        text = header.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is damaged: its header is not UTF-8") from None
    document = parse_json(text, f"the header of {path}")
    if not isinstance(document, dict):
        raise InputError(f"{path} is damaged: its header is no table of tensors")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{path} is damaged: its metadata is not of strings")
    base = 8 + length
    entries = sorted(
        (_entry(path, name, said, base) for name, said in document.items()),
        key=lambda entry: (entry.start, entry.size),
    )
    position = base
    for entry in entries:
        if entry.start != position:
            raise InputError(f"{path} is damaged: {entry.name!r} overlaps, or leaves a gap")
        position += entry.size
    if position != size:
        raise InputError(f"{path} has {size} bytes; its header says {position}")
    return Shard(path, first + header, metadata, tuple(entries), size)


def _entry(path: Path, name: str, said: Any, base: int) -> ShardTensor:
    said = said if isinstance(said, dict) else {}
    dtype, shape, offsets = (said.get(key) for key in ("dtype", "shape", "data_offsets"))
    whole = all(
        isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
        for numbers in (shape, offsets)
    )
    if not isinstance(dtype, str) or dtype not in _BITS or not whole or len(offsets or ()) != 2:
        raise InputError(f"{path} is damaged: {name!r} has no dtype, shape and offsets known here")
    assert isinstance(shape, list) and isinstance(offsets, list)
    start, end = offsets
    if len(shape) > 64 or math.prod(shape) * _BITS[dtype] != 8 * (end - start):
        raise InputError(
            f"{path} is damaged: {name!r} is {dtype} {shape[:8]} in {end - start} bytes"
        )
    return ShardTensor(name, dtype, tuple(shape), base + start, end - start)


def other_files(folder: Path) -> tuple[list[str], list[str]]:
    """Return a checkpoint's files to copy, and its files with weights that are not edited.

    The latter are of other formats or not in the index; copied, they would contradict the edit.
    """
    along: list[str] = []
    weights: list[str] = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(where, name).relative_to(folder)
            if path.suffix in WEIGHTS or name.endswith(_WEIGHT_INDEXES):
                weights.append(str(path))
                continue
            if not inside(folder, str(path)).is_file():  # a pipe would wait for ever
                raise InputError(f"{folder / path} is no file; expected files and folders alone")
            along.append(str(path))
    return along, weights


WEIGHTS = frozenset(
    ".safetensors .bin .pt .pth .ckpt .gguf .ggml .h5 .msgpack .onnx .onnx_data .npz".split()
)
_WEIGHT_INDEXES = (".safetensors.index.json", ".bin.index.json", ".h5.index.json")

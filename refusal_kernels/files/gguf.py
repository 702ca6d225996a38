"""Read GGUF files that may come from anyone: every count in the header is checked before use.

It reads what control vectors need: float32 tensors of one dimension, scalars and strings.
"""

import os
import struct
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import read_bytes

# Limits of what is read: far above what a control vector holds
MOST_KEYS, MOST_TENSORS, MOST_ELEMENTS = 1024, 4096, 1 << 16
# struct's letters for GGUF's types of scalars, by their numbers
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY, _F32 = 8, 9, 0


def gguf_library() -> Any:
    """Import the gguf library, or say what to install."""
    try:
        import gguf
    except ImportError:
        raise InputError(
            'GGUF files need the gguf library; expected pip install "refusal-kernels[research]"'
        ) from None
    return gguf


def read_gguf(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a small GGUF file.

    Returns scalars and strings by their keys (None for an array), and float32 tensors [hidden].
    """
    data = read_bytes(path, "a GGUF file")
    gguf = gguf_library()
    try:
        metadata = dict(_checked_header(data))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (struct.error, UnicodeDecodeError) as error:
        raise InputError(f"{path} is a damaged GGUF file: {error}") from None
    try:
        reader = gguf.GGUFReader(path)
        return metadata, {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    except Exception as error:  # the library raises what it happens to stumble on
        reason = str(error) or type(error).__name__
        raise InputError(f"{path} is a damaged GGUF file: {reason}") from None


def _checked_header(data: bytes) -> Iterator[tuple[str, Any]]:
    """Yield keys and values; then check that every tensor lies inside the file.

    The gguf library trusts the header: a count of 2**60 would keep it busy for ever.
    """
    at, elements = 0, 0

    def take(kind: str) -> Any:
        nonlocal at
        (item,) = struct.unpack_from("<" + kind, data, at)
        at += struct.calcsize("<" + kind)
        return item

    def limited(count: int, most: int, what: str) -> int:
        if count > most:
            raise InputError(f"{count} {what}; expected a control vector with at most {most}")
        return count

    def text() -> str:
        return take(f"{limited(take('Q'), MOST_ELEMENTS, 'bytes of text')}s").decode()

    def value(kind: int) -> Any:
        nonlocal elements
        if kind == _STRING:
            return text()
        if kind in _SCALARS:
            return take(_SCALARS[kind])
        if kind != _ARRAY:
            raise InputError(
                f"a value of type {kind}; expected a GGUF file, which has no such type"
            )
        kind, count = take("I"), take("Q")
        elements = limited(elements + count, MOST_ELEMENTS, "elements of arrays")
        if kind == _ARRAY:
            raise InputError("an array of arrays; expected a control vector, which has none")
        for _ in range(count):
            value(kind)
        return None

    if (magic := take("4s")) != b"GGUF":
        raise InputError(f"it begins with {magic!r}; expected a GGUF file")
    if (version := take("I")) not in (2, 3):
        raise InputError(f"GGUF version {version}; expected 2 or 3, little-endian")
    tensors = limited(take("Q"), MOST_TENSORS, "tensors")
    keys = limited(take("Q"), MOST_KEYS, "keys")
    alignment = 32
    for _ in range(keys):
        key = text()
        item = value(take("I"))
        if key == "general.alignment":
            alignment = item
        yield key, item
    if not isinstance(alignment, int) or not 0 < alignment <= 4096 or alignment & (alignment - 1):
        raise InputError(f"general.alignment is {alignment!r}; expected a power of two up to 4096")
    ends = []
    for _ in range(tensors):
        name, rank = text(), take("I")
        if rank != 1:
            raise InputError(f"the tensor {name!r} has {rank} dimensions; expected 1")
        hidden, kind, offset = take("Q"), take("I"), take("Q")
        if kind != _F32:
            raise InputError(f"the tensor {name!r} has type {kind}; expected float32 (type {_F32})")
        ends.append(offset + 4 * hidden)
    start = -(-at // alignment) * alignment
    if not ends or start + max(ends) > len(data):
        raise InputError("the tensors end behind the file; expected a whole one")

"""Safetensors files of the package's formats: named tensors, and metadata with format and version.

Any tool can read them, and nothing in them can run.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import check_size, replacing

FORMAT_VERSION = "1"
LIMIT_HEADER = 1 << 20  # bytes: these files hold three tensors at most
LIMIT_TENSORS = 4 << 30  # bytes: candidates and moments of the largest models are far below


def write_tensors(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file of one of the package's formats, replacing it in one step.

    Equal tensors and metadata give equal bytes.
    """
    known = {"format": kind, "format_version": FORMAT_VERSION}
    blob = memoryview(save(dict(tensors), metadata={**metadata, **known}))
    start = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(bytes(blob[8:start]))
    # The library orders the metadata differently from run to run.
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-len(text) % 8 + len(text))  # the data stays aligned
    with replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        file.writelines((len(text).to_bytes(8, "little"), text, blob[start:]))


def read_tensors(
    path: str | os.PathLike[str],
    kind: str,
    keys: tuple[str, ...],
    limit_bytes: int = LIMIT_TENSORS,
    optional: tuple[str, ...] = (),
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the named tensors and the metadata of a file that `write_tensors` wrote."""
    metadata, tensors = _opened(path, f"a {kind} file", (*keys, *optional), limit_bytes)
    name, version = metadata.pop("format", None), metadata.pop("format_version", None)
    if (name, version) != (kind, FORMAT_VERSION):
        there = "nothing of this package" if name is None else f"{name} version {version}"
        raise InputError(f"{path} holds {there}; expected {kind} version {FORMAT_VERSION}")
    if missing := [key for key in keys if key not in tensors]:
        raise InputError(f"{path} has no tensor named {missing[0]!r}; expected a {kind} file")
    return tensors, metadata


def format_of(path: str | os.PathLike[str]) -> str | None:
    """Return the package's format of a safetensors file; None if another tool wrote it."""
    return _opened(path, "a safetensors file", (), LIMIT_TENSORS)[0].get("format")


def _opened(
    path: str | os.PathLike[str], what: str, keys: tuple[str, ...], limit_bytes: int
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the metadata, and those of the named tensors that are there."""
    size = check_size(path, what, limit_bytes)
    try:
        with open(path, "rb") as raw:
            header = int.from_bytes(raw.read(8), "little")
        if not 0 < header <= min(size, LIMIT_HEADER):
            raise InputError(
                f"{path} is damaged or no safetensors file: the length of its header is {header}"
            )
        with safe_open(path, framework="pt") as file:
            there = set(file.keys())
            tensors = {key: file.get_tensor(key) for key in keys if key in there}
            return dict(file.metadata() or {}), tensors
    except (OSError, SafetensorError, RuntimeError, TypeError, AttributeError) as error:
        # the last three: a dtype that this torch does not have
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from None

"""Small checkpoints on disk, and what they hold, byte by byte."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer

from refusal_kernels.direction import Direction

INDEX = "model.safetensors.index.json"


def direction(hidden: int = 64, seed: int = 1) -> Direction:
    return Direction(7.0 * torch.randn(hidden, generator=torch.Generator().manual_seed(seed)))


def save(folder: Path, *, shard: str = "100KB", **options: Any) -> Any:
    """A Llama with biases, its tokenizer and a page; returns the model."""
    model = tiny_model("llama", **options)
    model.save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("# A model\n")
    return model


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def raw(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor, and in which file they are: read without safetensors."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            found[name] = data[begin:end]
    return found

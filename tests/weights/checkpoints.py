"""Small checkpoints on disk, and what they hold, byte by byte."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import plain_hooks, tiny_model, tiny_tokenizer

from refusal_kernels.direction import Direction

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
IDS = torch.randint(0, 40, (3, 11), generator=torch.Generator().manual_seed(0))


def direction(hidden: int = 64, seed: int = 1) -> Direction:
    return Direction(7.0 * torch.randn(hidden, generator=torch.Generator().manual_seed(seed)))


@torch.no_grad()
def ablated(model: Any) -> torch.Tensor:
    """The logits of `IDS` with `direction()` ablated by hooks, in the model's dtype."""
    with plain_hooks(model, ablate=direction().vector):
        return model(IDS).logits  # type: ignore[no-any-return]


def is_close(model: Any, expected: torch.Tensor, atol: float) -> None:
    """Check a model's logits of `IDS`."""
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=atol)


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
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the data behind it."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def raw(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor, and in which file they are: read without safetensors."""
    tensor_bytes = {}
    for path in sorted(folder.glob("*.safetensors")):
        document, data = header(path)
        document.pop("__metadata__", None)
        for name, entry in document.items():
            begin, end = entry["data_offsets"]
            tensor_bytes[name] = data[begin:end]
    return tensor_bytes

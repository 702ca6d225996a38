"""Directions and GGUF files to convert."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from refusal_kernels.direction import Direction
from refusal_kernels.files.control_vector import SITE

HIDDEN = 64
UNIT = {block: torch.eye(HIDDEN)[block] for block in range(8)}
PROJECT = {"glp__mode": "project", "glp__spec_version": 1, "glp__hook_point": SITE}


def random_direction(layer: int | None = 3, seed: int = 1, scale: float = 1.0) -> Direction:
    generator = torch.Generator().manual_seed(seed)
    vector = scale * torch.randn(HIDDEN, generator=generator)
    return Direction(vector, "org/model[/b]", layer, -2)  # a name that rich would take for markup


def write(path: Path, tensors: dict[str, Any], **keys: Any) -> Path:
    """Write a GGUF file with the library, as any other tool would."""
    writer = gguf.GGUFWriter(path, keys.pop("architecture", "controlvector"))
    kinds = {str: writer.add_string, bool: writer.add_bool, float: writer.add_float32}
    for key, value in keys.items():
        name = key.replace("__", ".")
        kinds.get(type(value), writer.add_uint32)(name, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.asarray(tensor, dtype=getattr(tensor, "dtype", np.float32)))
    for step in ("header_to_file", "kv_data_to_file", "tensors_to_file"):
        getattr(writer, f"write_{step}")()
    writer.close()
    return path


def numpy(tensors: dict[int, torch.Tensor]) -> dict[str, Any]:
    return {f"direction.{block}": row.numpy() for block, row in tensors.items()}

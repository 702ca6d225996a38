"""What a model's weights take, and where each block is."""

import copy
from collections import Counter
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from refusal_kernels.hf.chat_models import auto_class
from refusal_kernels.hf.model import decoder_layers

# Bytes a number: of the matrices of the blocks, and of all else. In 4 bits, 64 numbers share one in
# float32.
_WIDTHS = {"float32": (4, 4), "bfloat16": (2, 2), "8bit": (1, 2), "4bit": (0.5 + 4 / 64, 2)}


def held_bytes(model: Any) -> dict[str, int]:
    """Return the bytes of a loaded model's weights, by the dtype in which they are stored."""
    sizes: Counter[str] = Counter()
    seen = set()
    for tensor in chain(model.parameters(), model.buffers()):
        for part in _parts(tensor):
            if id(part) not in seen:
                seen.add(id(part))
                sizes[str(part.dtype).removeprefix("torch.")] += part.nbytes
    return dict(sizes.most_common())


def needed_bytes(config: Any, trust_remote_code: bool = False) -> dict[str, int]:
    """Return the bytes that the weights of a model take: by dtype, and quantized at load."""
    config = copy.deepcopy(config)
    for name in ("quantization_config", "distributed_config"):
        if hasattr(config, name):
            delattr(config, name)
    with torch.device("meta"):
        empty = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    total = sum(parameter.numel() for parameter in empty.parameters())
    matrices = sum(
        module.weight.numel()
        for layer in decoder_layers(empty)
        for module in layer.modules()
        if isinstance(module, nn.Linear)
    )
    return {
        name: round(matrices * packed + (total - matrices) * plain)
        for name, (packed, plain) in _WIDTHS.items()
    }


def free_bytes() -> dict[str, int]:
    """Return the bytes that are free in main memory and on every accelerator."""
    import psutil

    free = {"cpu": int(psutil.virtual_memory().available)}
    kind = torch.accelerator.current_accelerator(check_available=True)
    for index in range(torch.accelerator.device_count() if kind is not None else 0):
        free[f"{kind}:{index}"] = torch.accelerator.get_memory_info(index)[0]
    return free


def block_devices(model: Any) -> dict[str, list[int]]:
    """Return the blocks by the device that holds their weights.

    Those that accelerate moves to an accelerator for every pass are "offloaded".
    """
    places: dict[str, list[int]] = {}
    for index, layer in enumerate(decoder_layers(model)):
        devices = sorted({str(parameter.device) for parameter in layer.parameters()})
        place = "offloaded" if "meta" in devices else "+".join(devices)
        places.setdefault(place, []).append(index)
    return places


def _parts(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors of a quantized one: numbers and scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]

"""A model as a worker has it: loaded around one file of weights, copied without them."""

import copy
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def _no_weights() -> Any:
    """Make modules with their buffers, but no memory for their parameters."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: Any) -> None:
        if parameter is not None:
            data = torch.empty_like(parameter, device="meta")
            parameter = nn.Parameter(data, requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def load(folder: str, dtype: str, device: str) -> Any:
    """Load a causal model; on a CPU the weights stay in the file, which all workers share."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with _no_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    weights = load_file(str(Path(folder) / "model.safetensors"), device=device)
    model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise ValueError(f"{len(missing)} weights are not in the file, {missing[0]} first")
    return model.to(device).eval().requires_grad_(False)


def around_the_same_weights(model: Any) -> Any:
    """Copy a model's modules, not its weights."""
    shared = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def stream_norms(model: Any) -> list[tuple[int | None, nn.Module]]:
    """Return the modules that read the stream: two norms in each block, and the final one.

    With each the number of the block that wrote last before it; None before the first.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.model
    norms: list[tuple[int | None, nn.Module]] = []
    for number, block in enumerate(decoder.layers):
        block = getattr(block, "block", block)  # some methods wrap it
        norms += [(number - 1 if number else None, block.input_layernorm)]
        norms += [(number, block.post_attention_layernorm)]
    return [*norms, (len(decoder.layers) - 1, decoder.norm)]


def input_ids(cell: dict[str, Any], vocabulary: int) -> Tensor:
    """The tokens of a cell; of a decode the last is the one that is fed."""
    length = cell["tokens"] + (cell["work"] == "decode")
    return (torch.arange(cell["batch"] * length) * 7919 % vocabulary).view(cell["batch"], length)

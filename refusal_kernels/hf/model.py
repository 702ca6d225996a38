"""Where things are in a Hugging Face causal language model."""

from typing import Any

import torch
from torch import nn

from refusal_kernels.errors import InputError
from refusal_kernels.hf.served import ServedModel

# What families call the list of their blocks.
LISTS = ("layers", "h", "blocks", "block", "layer")
# The classes of blocks whose stream is [tokens, batch, hidden].
TOKENS_FIRST = {"XLNetLayer"}


def decoder(model: Any) -> nn.Module:
    """Return the module that holds a model's text decoder."""
    module = model.get_decoder() if hasattr(model, "get_decoder") else None
    if isinstance(module, nn.Module) and any(True for _ in module.children()):
        return module
    module = getattr(model, "base_model", model)  # what some models call their decoder is the head
    return module if isinstance(module, nn.Module) else model


def layer_list(model: Any) -> tuple[str, nn.ModuleList] | None:
    """Return the list of decoder layers and its name, or None."""
    lists: list[tuple[str, nn.ModuleList]] = []
    for root in (decoder(model), model):  # what some models call their decoder is the head
        lists = lists or [
            (name, module)
            for name, module in root.named_modules()
            if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in LISTS and module
        ]
    count = getattr(text_config(model), "num_hidden_layers", None)
    exact = [(name, module) for name, module in lists if len(module) == count]
    return min(exact or lists, key=lambda named: named[0].count("."), default=None)


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the decoder layers of a causal language model."""
    named_list = layer_list(model) if isinstance(model, nn.Module) else None
    if named_list is None:
        raise InputError(
            f"{type(model).__name__} holds no list of decoder layers ({', '.join(LISTS)}); "
            "expected a decoder-only transformers model"
        )
    return named_list[1]


def layer_count(model: Any) -> int:
    """Return how many decoder layers a model has, served or not."""
    return model.layers if isinstance(model, ServedModel) else len(decoder_layers(model))


def tokens_first(layer: nn.Module) -> bool:
    """Whether the stream of a decoder layer is [tokens, batch, hidden]."""
    return any(cls.__name__ in TOKENS_FIRST for cls in type(layer).__mro__)


def layer_input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return what a decoder layer is called with, as a pre-hook sees it: [batch, tokens, ...]."""
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs), "")
    stream: torch.Tensor = args[0] if args else kwargs[name]
    return stream.transpose(0, 1) if tokens_first(layer) else stream


def text_config(model: Any) -> Any:
    """Return the configuration of the text decoder."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def hidden_size(model: Any) -> int:
    """Return the width of the residual stream."""
    size = getattr(text_config(model), "hidden_size", None)
    if size is None:
        raise InputError(f"the configuration of {type(model).__name__} names no hidden_size")
    return int(size)


def input_embedding(model: Any) -> Any:
    """Return the module that embeds tokens, or None if the model does not say which that is."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a class of someone's own need not know
        return None
    return embedding if hasattr(embedding, "weight") else None


def input_device(model: Any) -> torch.device:
    """Return where the model takes its tokens; model.device is not it where it is spread out."""
    if isinstance(model, ServedModel):
        return model.device
    embedding = input_embedding(model)
    if embedding is None:
        first: torch.Tensor = next(model.parameters())
        return first.device
    device: torch.device = embedding.weight.device
    if device.type == "meta":  # offloaded by accelerate, which says where it will run
        device = torch.device(embedding._hf_hook.execution_device)
    return device

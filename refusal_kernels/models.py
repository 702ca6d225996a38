"""Where things are in a Hugging Face causal language model."""

from typing import Any

import torch
from torch import nn

from refusal_kernels.errors import InputError


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the decoder layers of a causal language model.

    Raises
    ------
    InputError
        If the model does not keep them in ``get_decoder().layers``.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise InputError(
            f"{type(model).__name__} has no get_decoder().layers; expected a decoder-only model"
        )
    return layers


def hidden_size(model: Any) -> int:
    """Return the width of the residual stream."""
    return int(model.config.get_text_config().hidden_size)


def input_device(model: Any) -> torch.device:
    """Return where the model takes its tokens; model.device is not it where it is spread out."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device

"""Orthogonalize the weights of a model in memory: ablation at no cost at run time.

Every parameter that writes into the residual stream is projected: ``W - r r^T W``, with its bias.
The model then computes what it computes under ablation at full strength.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.hf.model import hidden_size, input_embedding
from refusal_kernels.patching.handle import is_patched
from refusal_kernels.weights.certificate import Certificate, prove
from refusal_kernels.weights.projection import project_, unit
from refusal_kernels.weights.writers import find_writers

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PACKED = (torch.int8, torch.uint8, torch.int16, torch.int32)  # buffers that hold quantized weights


@dataclass(frozen=True)
class Orthogonalized:
    """What was edited."""

    edited: list[str]  # names of parameters
    untied: bool  # whether the output matrix was the embedding and got its own memory, unedited
    certificate: Certificate  # on a few random tokens, from before the edit was made
    unproved: list[str]  # with `text_only`: what may write from images or audio, and is unedited


@torch.no_grad()
def orthogonalize(model: Any, direction: Direction, *, text_only: bool = False) -> Orthogonalized:
    """Edit a model's weights in place so that it cannot write along a direction.

    Pass ``copy.deepcopy(model)`` to keep the original.

    A forward pass over random tokens shows what writes into the stream, whatever the family: token
    and position embeddings, output projections, experts, their biases. A second pass, before any
    change, reads every such weight as it will be and must give what ablation at run time gives.

    Parameters
    ----------
    model
        A decoder-only transformers model, with weights in float64, float32, bfloat16 or float16.
    direction
        The direction; its norm does not matter.
    text_only
        Also take a multimodal model. Its text path is edited; what images or audio write into the
        stream is left as it is.

    Returns
    -------
    Orthogonalized
        The names of the parameters that were edited, whether the embedding was untied, and the
        certificate.

    Raises
    ------
    InputError
        If the model is patched, quantized, offloaded, with adapters, of another hidden size, or of
        a family where the edit is not ablation: a norm or a gain follows what writes (Gemma 2 and
        3, OLMo 2, GLM 4), or the embedding (BLOOM). Nothing has been changed then.

    Notes
    -----
    Arditi et al. 2024 (arXiv 2406.11717), section 4.1: the embedding, every attention output and
    every MLP output, biases too. Computed in float64 and rounded once to the dtype of the weights.
    """
    check_model(model, direction)
    writers = find_writers(model, text_only=text_only)
    parameters = dict(model.named_parameters())
    certificate = prove(model, writers, direction)
    untied = _untie(model, writers.axes)
    r = unit(direction)
    for name, axis in writers.axes.items():
        project_(parameters[name], axis, r)
    return Orthogonalized(list(writers.axes), untied, certificate, writers.unproved)


def check_weights(model: Any) -> None:
    """Refuse a model that `orthogonalize` refuses, before there is a direction."""
    check_plain(model)
    find_writers(model)


def check_model(model: Any, direction: Direction) -> None:
    """Refuse a model that a direction does not fit, or whose weights are not plain numbers."""
    if direction.hidden != hidden_size(model):
        raise InputError(
            f"the direction has hidden size {direction.hidden}; the model has {hidden_size(model)}"
        )
    check_plain(model)


def check_plain(model: Any) -> None:
    """Refuse a model whose weights are not plain numbers in memory."""
    if is_patched(model):
        raise InputError("the model is patched; call rk.unpatch(model) before you edit weights")
    if input_embedding(model) is None:
        raise InputError(
            f"{type(model).__name__} does not say which module embeds its tokens; expected one "
            "whose get_input_embeddings does"
        )
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            raise InputError(
                f"{name} is a {type(module).__name__} of PEFT; merge or unload adapters first"
            )
    for name, parameter in model.named_parameters():
        plain = parameter.dtype in DTYPES and type(parameter) is nn.Parameter
        if not plain or parameter.device.type == "meta":
            kind = "" if type(parameter) is nn.Parameter else f" in a {type(parameter).__name__}"
            raise InputError(
                f"{name} is {parameter.dtype}{kind} on {parameter.device}; expected "
                "floating-point weights in memory, neither quantized, sharded nor offloaded"
            )
    # The model's own `is_quantized` is also set where a GGUF file was unpacked into plain weights.
    for name, buffer in model.named_buffers():
        if buffer.dtype in PACKED and buffer.ndim > 1:
            raise InputError(
                f"{name} is {buffer.dtype}: the model is quantized; expected floating-point weights"
            )


def _untie(model: Any, axes: dict[str, int]) -> bool:
    """Give the output matrix its own memory: it reads the stream and must stay as it is."""
    output = model.get_output_embeddings()
    edited = {id(p) for name, p in model.named_parameters() if name in axes}
    if output is None or id(getattr(output, "weight", None)) not in edited:
        return False
    weight = output.weight
    output.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    # Saving and loading look here, and would tie the two again.
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    return True

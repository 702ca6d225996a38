"""Write a direction out of a model's weights, for good and at no cost at run time.

Every matrix that writes into the residual stream is projected: ``W - r r^T W``, with its bias. What
the model computes then is what it computes under ablation at full strength.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.models import decoder_layers, hidden_size

# Layers whose writers are known to be o_proj and down_proj, added to the stream as they are. A norm
# or a factor between writer and add, or experts, would make the projection something else.
FAMILIES = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BLOCK = 4096  # rows in float64 at once: an embedding as a whole may not fit


@dataclass(frozen=True)
class Orthogonalized:
    """What was edited.

    Attributes
    ----------
    edited : list of str
        The names of the parameters.
    untied : bool
        Whether the output matrix shared its memory with the embedding and got its own, unedited.
        The model is larger by one such matrix then.
    """

    edited: list[str]
    untied: bool


@torch.no_grad()
def orthogonalize(model: Any, direction: Direction) -> Orthogonalized:
    """Make a model unable to write along a direction, in place.

    The model that is given is changed, and stays so: pass ``copy.deepcopy(model)`` to keep it.

    Parameters
    ----------
    model
        A Llama, Mistral, Qwen2 or Qwen3 model of transformers, with weights in float64, float32,
        bfloat16 or float16.
    direction
        The direction; its norm does not matter.

    Returns
    -------
    Orthogonalized
        The names of the parameters that were edited, and whether the embedding was untied.

    Raises
    ------
    InputError
        If the model is of another family, quantised, or of another hidden size; nothing has been
        changed then.

    Notes
    -----
    Arditi et al. 2024 (arXiv 2406.11717), section 4.1: the embedding, every attention output and
    every MLP output, biases too. Computed in float64 and rounded once to the dtype of the weights.
    """
    embedding, writers = model.get_input_embeddings(), _writers(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [embedding.weight]
    for writer in writers:
        parameters += [p for p in (writer.weight, writer.bias) if p is not None]
    if direction.hidden != hidden_size(model):
        raise InputError(
            f"the direction has hidden size {direction.hidden}; the model has {hidden_size(model)}"
        )
    for parameter in parameters:
        if parameter.dtype not in DTYPES or parameter.device.type == "meta":
            raise InputError(
                f"{names[id(parameter)]} is {parameter.dtype} on {parameter.device}; expected "
                "floating-point weights in memory, neither quantised nor offloaded"
            )

    untied = _untie(model, embedding)
    unit = direction.vector.double() / direction.norm
    _project(embedding.weight, unit)
    for writer in writers:
        _project(writer.weight.T, unit)  # nn.Linear keeps [out, in]: out is the hidden side
        if writer.bias is not None:
            _project(writer.bias.unsqueeze(0), unit)
    return Orthogonalized([names[id(parameter)] for parameter in parameters], untied)


def _writers(model: Any) -> list[nn.Linear]:
    writers = []
    for layer in decoder_layers(model):
        # Bases too, because a patched layer is of a generated subclass. By name: importing the
        # classes would import all of transformers.
        names = {base.__name__ for base in type(layer).__mro__}
        if names.isdisjoint(FAMILIES):
            raise InputError(
                f"{type(layer).__name__} is not supported; expected one of {', '.join(FAMILIES)}"
            )
        for path in WRITERS:
            writer = layer.get_submodule(path)
            if type(writer) is not nn.Linear:
                raise InputError(
                    f"{path} is a {type(writer).__name__}; expected a plain nn.Linear, without "
                    "quantisation or adapters"
                )
            writers.append(writer)
    return writers


def _untie(model: Any, embedding: nn.Embedding) -> bool:
    """Give the output matrix its own memory: it reads the stream and must stay as it is."""
    output = model.get_output_embeddings()
    if output is None or output.weight is not embedding.weight:
        return False
    weight = output.weight
    output.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    # Saving and loading look here, and would tie the two again.
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    return True


def _project(rows: Tensor, unit: Tensor) -> None:
    """Remove the component along unit from every row [..., hidden], in place."""
    unit = unit.to(rows.device)
    for block in rows.split(BLOCK):
        wide = block.double()
        block.copy_(wide - torch.outer(wide @ unit, unit))

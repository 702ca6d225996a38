"""Projections of the residual stream on a direction, layer by layer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.forward import LAST, model_inputs
from refusal_kernels.hf.model import decoder_layers, input_device, layer_input
from refusal_kernels.hf.padding import fitted
from refusal_kernels.hf.served import ServedModel


@torch.inference_mode()
def project(
    model: Any,
    chat: ChatFormat,
    sets: Mapping[str, Sequence[str]],
    unit: Tensor,
    position: int,
    batch_size: int = 64,
) -> dict[str, list[list[float]]]:
    """Project the unmodified stream on a unit vector [hidden] at one position of every prompt.

    The position counts from the prompt's end: -1 is the last token. The result is by set of
    prompts: for the input of every block and the output of the last, one number for each prompt.
    """
    if isinstance(model, ServedModel):
        return {
            part: model.projections(chat.encode(prompts), unit, position).tolist()
            for part, prompts in sets.items()
        }
    layers = decoder_layers(model)
    projections: dict[str, list[list[float]]] = {}

    def see(layer: int, stream: Tensor) -> None:
        values = stream[:, position].float() @ unit.to(stream.device)
        for row, value in zip(batch.rows, values.tolist(), strict=True):
            table[layer][row] = value

    def input_hook(layer: int) -> Callable[..., None]:
        return lambda module, args, kwargs: see(layer, layer_input(module, args, kwargs))

    def output_hook(module: Any, _: Any, output: Any) -> None:
        see(
            len(layers), layer_input(module, output if isinstance(output, tuple) else (output,), {})
        )

    hooks = [
        layer.register_forward_pre_hook(input_hook(number), with_kwargs=True)
        for number, layer in enumerate(layers)
    ]
    hooks.append(layers[-1].register_forward_hook(output_hook))
    try:
        for part, prompts in sets.items():
            table = projections[part] = [[0.0] * len(prompts) for _ in range(len(layers) + 1)]
            for batch in fitted(model, chat.stream(prompts, batch_size)):
                inputs = model_inputs(batch, input_device(model))
                model(**inputs, use_cache=False, logits_to_keep=LAST)
    finally:
        for hook in hooks:
            hook.remove()
    return projections

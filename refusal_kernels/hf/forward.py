"""Forward passes that read the inputs of layers or the last logits, and compute no more.

An exception from a hook ends a pass; PyTorch and transformers clean up as after any error, and the
model is unchanged. A shorter list of layers would not do: some families count their layers by the
configuration, or index masks and caches by them.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from refusal_kernels.errors import InputError
from refusal_kernels.hf.batches import Batch
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.model import decoder, decoder_layers, input_device

LAST = torch.tensor([-1])
"""``logits_to_keep`` for the last position alone.

Given the number 1 a model slices, and `torch.nn.functional.linear` makes a batched product of what
is not contiguous: in bfloat16 on a CPU it copies the head's weights for every row of the batch.
"""


def last_alone(model: Any) -> dict[str, Any]:
    """Return the option `LAST` for ``model.generate``, which passes the number 1 by default."""
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": LAST} if known else {}


class _Enough(Exception):
    """The last layer to read has been reached."""


def model_inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Return the inputs of a forward pass.

    Positions count from the first token that is not padding. A model's default counts the padding,
    and a prompt's result would depend on its batch.
    """
    mask = batch.attention_mask.to(device)
    return {
        "input_ids": batch.input_ids.to(device),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=-1) - 1).clamp(min=0),
    }


@torch.inference_mode()
def read_inputs(
    model: Any, batch: Batch, last_layer: int, read: Callable[[int, Tensor], None]
) -> None:
    """Run the model up to the input of `last_layer`; that layer and later ones do not run.

    `read` gets every layer up to that one, with its input [batch, tokens, hidden]. A pass that ends
    without calling all of them is an InputError.
    """
    layers = decoder_layers(model)[: last_layer + 1]
    seen = 0

    def reader(layer: int) -> Callable[..., None]:
        def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal seen
            read(layer, args[0] if args else kwargs["hidden_states"])
            seen += 1
            if layer == last_layer:
                raise _Enough

        return on_input

    hooks = [
        layer.register_forward_pre_hook(reader(i), with_kwargs=True)
        for i, layer in enumerate(layers)
    ]
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code may ignore these hooks
            decoder(model)(**model_inputs(batch, input_device(model)), use_cache=False)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    if seen != len(layers):
        raise InputError(
            f"{seen} of the {len(layers)} decoder layers of {type(model).__name__} were called in "
            "order; expected every one of them once"
        )


def last_logits(model: Any, tokenizer: Any, prompts: Sequence[str], batch_size: int = 32) -> Tensor:
    """Return the logits at every prompt's last token: float32 [prompts, vocabulary] on the CPU."""
    return batch_logits(model, ChatFormat.of(tokenizer).batches(prompts, batch_size))


@torch.inference_mode()
def batch_logits(model: Any, batches: Sequence[Batch]) -> Tensor:
    """`last_logits` of tokenized prompts, in the order of the prompts."""
    rows, logits = [], []
    for batch in batches:
        inputs = model_inputs(batch, input_device(model))
        # one row of logits a prompt: the logits of every token would be the run's largest tensor
        out = model(**inputs, use_cache=False, logits_to_keep=LAST).logits[:, -1]
        logits.append(out.to("cpu", torch.float32))
        rows += batch.rows
    return torch.cat(logits)[torch.tensor(rows).argsort()]

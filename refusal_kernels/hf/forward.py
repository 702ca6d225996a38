"""Forward passes that read the inputs of layers or the last logits, and compute no more.

An exception from a hook ends a pass; PyTorch and transformers clean up as after any error, and the
model is unchanged. A shorter list of layers would not do: some families count their layers by the
configuration, or index masks and caches by them.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from refusal_kernels.errors import InputError
from refusal_kernels.hf.batches import Batch
from refusal_kernels.hf.checks import check_numbers, check_tokens
from refusal_kernels.hf.model import decoder, decoder_layers, input_device, layer_input
from refusal_kernels.hf.prefix import Prefix, agree, common_prefix, run_prefix

LAST = torch.tensor([-1])
"""``logits_to_keep`` for the last position alone.

Given the number 1 a model slices, and `torch.nn.functional.linear` makes a batched product of what
is not contiguous: in bfloat16 on a CPU it copies the head's weights for every row of the batch.
"""


class _Enough(Exception):
    """The last layer to read has been reached."""


def model_inputs(
    batch: Batch,
    device: torch.device,
    prefix: Prefix | None = None,
    versions: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return the inputs of a forward pass; after a prefix, of the columns that it leaves.

    Positions count from the first token that is not padding. A model's default counts the padding,
    and a prompt's result would depend on its batch. `versions` says which version of the prefix
    each row takes.
    """
    mask = batch.attention_mask.to(device)
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids.to(device),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=-1) - 1).clamp(min=0),
    }
    if prefix is not None:
        for name in ("input_ids", "position_ids"):
            inputs[name] = inputs[name][:, prefix.tokens :]
        inputs |= prefix.inputs((mask == 0).sum(dim=-1), versions)
    return inputs


@torch.inference_mode()
def read_inputs(
    model: Any,
    batch: Batch,
    last_layer: int,
    read: Callable[[int, Tensor], None],
    prefix: Prefix | None = None,
) -> None:
    """Run the model up to the input of `last_layer`; that layer and later ones do not run.

    `read` gets every layer up to that one, with its input [batch, tokens, hidden], after a prefix
    that of the tokens that it leaves: where a layer is called again, that of the first call; where
    one is passed over, as cross-attention is without images, that of the next one. A pass that ends
    before `last_layer` is an InputError.
    """
    layers = decoder_layers(model)[: last_layer + 1]
    unread = 0  # the first layer that has not been called

    def reader(layer: int) -> Callable[..., None]:
        def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal unread
            if layer < unread:
                return  # it is called again
            stream = layer_input(module, args, kwargs)
            for skipped in range(unread, layer + 1):  # a layer that is not called changes nothing
                read(skipped, stream)
            unread = layer + 1
            if layer == last_layer:
                raise _Enough

        return on_input

    hooks = [
        layer.register_forward_pre_hook(reader(i), with_kwargs=True)
        for i, layer in enumerate(layers)
    ]
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code may ignore these hooks
            inputs = model_inputs(batch, input_device(model), prefix)
            decoder(model)(**{"use_cache": False, **inputs})
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    if unread != len(layers):
        raise InputError(
            f"{type(model).__name__} does not call layer {last_layer} for text; expected an "
            f"earlier last layer, such as {unread - 1}"
        )


def batch_logits(model: Any, batches: Iterable[Batch], prefix: Prefix | None = None) -> Tensor:
    """Return the logits at the last token of tokenized prompts, in the order of the prompts.

    Float32 [prompts, vocabulary] on the CPU.
    """
    logits: dict[int, Tensor] = {}  # by prompt: joined once, as a vocabulary is large
    for batch in batches:
        check_tokens(model, int(batch.input_ids.max()), batch.input_ids.shape[1])
        read = next_token_logits(model, batch, prefix).to("cpu", torch.float32)
        check_numbers(read, batch.rows)
        logits.update(zip(batch.rows, read, strict=True))
    return torch.stack([logits[row] for row in sorted(logits)])


@torch.inference_mode()
def next_token_logits(
    model: Any,
    batch: Batch,
    prefix: Prefix | None = None,
    versions: Sequence[int] | None = None,
) -> Tensor:
    """Return the logits at every row's last token, [batch, vocabulary], on the model's device.

    One row of logits a prompt: the logits of every token would be the run's largest tensor.
    """
    inputs = model_inputs(batch, input_device(model), prefix, versions)
    logits: Tensor = model(**{"use_cache": False, **inputs, "logits_to_keep": LAST}).logits[:, -1]
    return logits


def find_prefix(model: Any, prompts: Sequence[list[int]]) -> Prefix | None:
    """Run what tokenized prompts begin with, once, for passes over the rest of each.

    None if there is little of it, or if the logits of the longest prompt then differ by more than
    rounding from those of a whole pass.
    """
    longest = max(range(len(prompts)), key=lambda row: len(prompts[row]))
    ids = torch.tensor([prompts[longest]])
    # a pass needs a token of its own
    common = common_prefix([prompt[:-1] for prompt in prompts], ids.numel())
    if not common:
        return None
    batch = Batch([longest], ids, torch.ones_like(ids))
    whole = batch_logits(model, [batch])
    try:
        prefix = run_prefix(model, common)
        same = agree(model, whole, batch_logits(model, [batch], prefix))
    except Exception:  # a family may raise anything when it is given a cache of another kind
        return None
    return prefix if same else None

"""Run a model over prompts: moments at the input of every decoder layer, and last-token logits."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from refusal_kernels.errors import InputError
from refusal_kernels.extraction.moments import Moments
from refusal_kernels.extraction.prompts import Batch, ChatFormat
from refusal_kernels.models import decoder_layers, hidden_size, input_device

Progress = Callable[[int, int], None]
"""Called with how much is done, and of how much."""


def collect(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    positions: int | None = None,
    batch_size: int = 32,
    group: int = 0,
    moments: Moments | None = None,
    groups: Sequence[str] = ("harmful", "harmless"),
    progress: Progress | None = None,
) -> Moments:
    """Stream the moments of the residual stream at the last tokens of the prompts.

    Read is the input of every decoder layer (``resid_pre``): at layer 0 the embedding. No
    activation is kept.

    Parameters
    ----------
    model
        A transformers causal language model.
    tokenizer
        Its tokenizer, or a `ChatFormat`.
    prompts
        The instructions, without the chat format.
    positions
        How many tokens at the end of the prompt; by default all end-of-instruction tokens.
    batch_size
        Prompts at once. Batches are sorted by length.
    group
        Which of the groups the prompts belong to.
    moments
        A state to go on with; by default a new one is made.
    groups
        The names of the groups of a new state.
    progress
        Called with the number of prompts done, and of all.

    Returns
    -------
    Moments
        The state, on the device of the model's embedding where it is new.

    Raises
    ------
    InputError
        If the model has no list of decoder layers, or the state does not fit model and positions.
    """
    chat = ChatFormat.of(tokenizer)
    batches = chat.batches(prompts, batch_size)
    fresh = _new_moments(model, chat, positions, groups)
    if moments is None:
        moments = fresh
    elif moments.shape != fresh.shape:
        raise InputError(
            f"the moments have (layers, positions, hidden) {moments.shape}; "
            f"model and positions need {fresh.shape}"
        )
    if not 0 <= group < len(moments.groups):
        raise InputError(f"group {group} is not there; expected 0 to {len(moments.groups) - 1}")
    _stream(model, batches, moments, group, progress)
    return moments


def mean_difference(
    model: Any,
    tokenizer: Any,
    harmful: Sequence[str],
    harmless: Sequence[str],
    *,
    positions: int | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Tensor:
    """The candidate directions: mean activation on harmful prompts minus that on harmless ones.

    Parameters
    ----------
    model, tokenizer, positions, batch_size
        As for `collect`.
    harmful, harmless
        The two sets of instructions.
    progress
        Called with the number of prompts done, and of all of both sets.

    Returns
    -------
    Tensor
        float32 [position, layer, hidden] on the CPU; position -1 is the last token.

    Raises
    ------
    InputError
        As `collect`; also if NaN or infinity came out of the model.

    Notes
    -----
    Arditi et al. 2024, section 2.3 (difference-in-means), computed in float64.
    """
    chat = ChatFormat.of(tokenizer)
    batches = [chat.batches(prompts, batch_size) for prompts in (harmful, harmless)]
    moments = _new_moments(model, chat, positions, ("harmful", "harmless"))
    total = len(harmful) + len(harmless)
    for group, before in enumerate((0, len(harmful))):
        _stream(model, batches[group], moments, group, progress, before, total)
    return moments.compute().mean_difference.float().cpu()


def last_logits(model: Any, tokenizer: Any, prompts: Sequence[str], batch_size: int = 32) -> Tensor:
    """The logits at the last token of every prompt: float32 [prompts, vocabulary] on the CPU."""
    return batch_logits(model, ChatFormat.of(tokenizer).batches(prompts, batch_size))


@torch.inference_mode()
def batch_logits(model: Any, batches: Sequence[Batch]) -> Tensor:
    """`last_logits` of prompts that are tokenised already, in the order of the prompts."""
    rows, logits = [], []
    for batch in batches:
        inputs = model_inputs(batch, input_device(model))
        # One row of logits per prompt: all of them would be the largest tensor of the run.
        out = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        logits.append(out.to("cpu", torch.float32))
        rows += batch.rows
    return torch.cat(logits)[torch.tensor(rows).argsort()]


def model_inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """What a forward pass takes.

    Positions are given explicitly, counted from the first token that is not padding: without them
    a model counts the padding, and a prompt would depend on the batch around it.
    """
    mask = batch.attention_mask.to(device)
    return {
        "input_ids": batch.input_ids.to(device),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=-1) - 1).clamp(min=0),
    }


def _new_moments(
    model: Any, chat: ChatFormat, positions: int | None, groups: Sequence[str]
) -> Moments:
    positions = chat.positions if positions is None else positions
    layers, hidden = len(decoder_layers(model)), hidden_size(model)
    return Moments(layers, positions, hidden, groups, input_device(model))


def _stream(
    model: Any,
    batches: Sequence[Batch],
    moments: Moments,
    group: int,
    progress: Progress | None,
    done: int = 0,
    total: int | None = None,
) -> None:
    total = sum(len(batch.rows) for batch in batches) if total is None else total
    for batch in batches:
        _read(model, batch, moments, group)
        done += len(batch.rows)
        if progress is not None:
            progress(done, total)


@torch.inference_mode()
def _read(model: Any, batch: Batch, moments: Moments, group: int) -> None:
    """One forward pass, whose hooks fold the last tokens of every layer's input in."""
    mask = batch.attention_mask[:, -moments.positions :]
    slots = torch.arange(mask.shape[1]) + moments.positions - mask.shape[1]
    index = slots.where(mask.bool(), -1).to(moments.device, torch.int32)
    groups = torch.full((mask.shape[0],), group, dtype=torch.int32, device=moments.device)

    def reader(layer: int) -> Callable[..., None]:
        def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream = args[0] if args else kwargs["hidden_states"]
            last = stream[:, -moments.positions :].to(moments.device)  # a view on one device
            moments.update(layer, last, index, groups)

        return read

    hooks = [
        layer.register_forward_pre_hook(reader(i), with_kwargs=True)
        for i, layer in enumerate(decoder_layers(model))
    ]
    try:
        # The decoder alone: nobody asked for logits.
        model.get_decoder()(**model_inputs(batch, input_device(model)), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()

"""Greedy decoding with nothing of the model's own generation settings."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from refusal_kernels.hf.checks import NoNumbers
from refusal_kernels.hf.forward import LAST


@contextmanager
def bare(model: Any, *kept: str) -> Iterator[None]:
    """Set a model's generation settings aside, except those that are named.

    ``model.generate`` takes from them whatever its caller leaves open: penalties, suppressed
    tokens, strings that end an answer.
    """
    from transformers import GenerationConfig  # slow to import

    before = [
        (module, module.__dict__["generation_config"])
        for module in model.modules()
        if isinstance(module.__dict__.get("generation_config"), GenerationConfig)
    ]
    try:
        for module, config in before:
            # some families cannot use a cache, and say so there
            values = {name: getattr(config, name) for name in ("use_cache", *kept)}
            module.generation_config = GenerationConfig(**values)
        yield
    finally:
        for module, config in before:
            module.generation_config = config


def decode(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    max_new_tokens: int,
    ends: Sequence[int],
    pad_id: int,
    **more: Any,
) -> Any:
    """Decode greedily; return what ``model.generate`` returns.

    Parameters
    ----------
    input_ids, attention_mask
        int64 [batch, tokens] on the model's device, padded on the left.
    max_new_tokens
        The most tokens that are added.
    ends
        The tokens that end an answer.
    pad_id
        The token that fills the rows that have ended.
    more
        Of a `transformers.GenerationConfig`, what the result should have besides the tokens.

    Raises
    ------
    NoNumbers
        If logits are NaN or infinite, with the row of the batch.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    broken: list[Tensor] = []  # of every step: bool [batch]

    def look(_: Tensor, logits: Tensor) -> Tensor:
        broken.append(~logits.amax(dim=-1).isfinite())
        return logits

    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=pad_id,
        do_sample=False,
        num_beams=1,
        **more,
    )
    with bare(model):
        out = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([look]),
            **last_alone(model),
        )
    rows = torch.stack(broken).any(dim=0).nonzero()
    if len(rows):
        raise NoNumbers(int(rows[0]))
    return out


def last_alone(model: Any) -> dict[str, Any]:
    """Return the option `LAST` for ``model.generate``, which passes the number 1 by default."""
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": LAST} if known else {}


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the end tokens of the model, of which there may be several, and of the tokenizer."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({token for token in (*ends, tokenizer.eos_token_id) if token is not None})

"""Checks of what goes into a model and comes out of it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from refusal_kernels.errors import InputError
from refusal_kernels.hf.model import decoder, input_embedding, text_config

# what configurations call the longest text
LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


class NotFinite(InputError):
    """A model gave NaN or infinity."""


class NoNumbers(NotFinite):
    """The same, for the row `row` of what it was asked."""

    def __init__(self, row: int) -> None:
        self.row = row
        super().__init__(
            f"the model's logits are NaN or infinite at prompt {row}; expected numbers: try "
            "another dtype (float16 overflows) or a weaker edit, or look for damaged weights"
        )


def check_numbers(logits: Tensor, rows: Sequence[int]) -> None:
    """Refuse logits [rows, vocabulary] that are no numbers; those of single tokens may be -inf."""
    broken = (~logits.amax(dim=-1).isfinite()).nonzero()
    if len(broken):
        raise NoNumbers(rows[int(broken[0])])


def embedded_tokens(model: Any) -> int | None:
    """Return how many tokens a model has embeddings of; None if it does not say."""
    return getattr(input_embedding(model), "num_embeddings", None)


def check_tokens(model: Any, highest: int, longest: int, new_tokens: int = 0) -> None:
    """Refuse tokens that a model cannot take, which would end in an error of its own, or on a GPU.

    Parameters
    ----------
    highest
        The highest token id.
    longest
        How many tokens the longest prompt has.
    new_tokens
        How many are decoded after it.

    Raises
    ------
    InputError
        If there is no embedding of a token, or no position for it. Rotary positions go on for ever.
    """
    count = embedded_tokens(model)
    if count is not None and highest >= count:
        raise InputError(
            f"the tokenizer gives the token {highest}; {type(model).__name__} has {count} "
            "embeddings, of the tokens before it: expected the model's own tokenizer"
        )
    config = text_config(model)
    limit = next((n for name in LIMITS if isinstance(n := getattr(config, name, None), int)), 0)
    if 0 < limit < longest + new_tokens and not _rotary(model):
        more = f" and {new_tokens} to come" if new_tokens else ""
        raise InputError(
            f"a prompt has {longest} tokens in its chat format{more}; {type(model).__name__} has "
            f"{limit} positions"
        )


def _rotary(model: Any) -> bool:
    """Whether positions are computed, not looked up."""
    return any("rotary" in type(module).__name__.lower() for module in decoder(model).modules())

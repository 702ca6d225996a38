"""Scores of next-token distributions: the refusal score, the refusal tokens, the KL divergence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refusal_kernels.errors import InputError
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.logits import last_logits
from refusal_kernels.hf.model import text_config

SCORE_EPS = 1e-8
KL_EPS = 1e-6
MIN_PROBABILITY = 0.05  # of a refusal token, mean over the harmful prompts
MIN_ODDS_RATIO = 10.0  # of refusal tokens, harmful prompts over harmless ones
MIN_ODDS_RATIO_EACH = 3.0  # of each, where only all of them together reach the former
SAME = 0.9  # above this probability on both sets, the answers begin alike
ROWS = 256  # that are in float64 at once: a vocabulary is large
AUTO, PAPER = "auto", "paper"
TokenSpec = Sequence[int | str] | str | None
"""Refusal tokens: ids, or texts whose first tokens are meant; `AUTO` or None, or `PAPER`."""


def refusal_score(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Log-odds that the next token is a refusal token, float64 [prompts].

    From logits [prompts, vocabulary] at the last position: ``log(p + eps) - log(1 - p + eps)``,
    where p is the summed probability of the tokens and eps is 1e-8.
    """
    check_tokens(tokens, logits.shape[-1])
    chosen = torch.tensor(sorted(set(tokens)), device=logits.device)
    rows = logits.reshape(-1, logits.shape[-1]).split(ROWS)
    p = torch.cat([part.double().softmax(dim=-1)[:, chosen].sum(dim=-1) for part in rows])
    p = p.reshape(logits.shape[:-1])
    return torch.log(p + SCORE_EPS) - torch.log(1 - p + SCORE_EPS)


def check_tokens(tokens: Sequence[int], vocabulary: int) -> None:
    """Refuse refusal tokens that are none, or not in the vocabulary."""
    if not tokens or not all(0 <= token < vocabulary for token in tokens):
        raise InputError(
            f"the refusal tokens are {list(tokens)}; expected token ids below {vocabulary}"
        )


def kl_divergence(logits: Tensor, changed: Tensor) -> Tensor:
    """KL(p || q) of next-token distributions, float64 [prompts].

    The paper's code computes ``sum p (log(p + eps) - log(q + eps))`` with eps 1e-6, and so does
    this, for the same thresholds. The result can be negative by about eps times the vocabulary.
    """
    p, q = logits.double().softmax(dim=-1), changed.double().softmax(dim=-1)
    return (p * (torch.log(p + KL_EPS) - torch.log(q + KL_EPS))).sum(dim=-1)


def find_refusal_tokens(
    model: Any,
    tokenizer: Any,
    harmful: Sequence[str],
    harmless: Sequence[str],
    batch_size: int = 64,
) -> list[int]:
    """Find the tokens with which the model begins a refusal, from its own behavior.

    These are the next tokens whose mean probability is at least 0.05 on the harmful prompts, and
    whose odds there are at least 10 times those on the harmless ones: ids, the most probable first.
    (Odds, because a model that also refuses harmless prompts has no ratio of probabilities of 10.)
    If no token reaches 10, those that reach 3 count if all of them together reach 10: a model may
    begin its refusals in several ways.
    """
    chat = ChatFormat.of(tokenizer)
    p, q = (last_logits(model, chat, prompts, batch_size) for prompts in (harmful, harmless))
    return distinctive_tokens(p, q, chat)


def distinctive_tokens(harmful: Tensor, harmless: Tensor, chat: ChatFormat) -> list[int]:
    """`find_refusal_tokens`, from logits [prompts, vocabulary]."""
    p, q = _mean_probability(harmful), _mean_probability(harmless)
    odds_ratio = _odds_ratio(p, q)
    frequent = p >= MIN_PROBABILITY
    chosen = frequent & (odds_ratio >= MIN_ODDS_RATIO)
    if not chosen.any():
        several = frequent & (odds_ratio >= MIN_ODDS_RATIO_EACH)
        if _odds_ratio(p[several].sum(), q[several].sum()) >= MIN_ODDS_RATIO:
            chosen = several
    tokens: list[int] = chosen.nonzero().flatten().tolist()
    if tokens:
        return sorted(tokens, key=lambda token: -float(p[token]))
    shown = ", ".join(
        f"{named_tokens(chat, [token])} {float(p[token]):.3f} and {float(q[token]):.3f}"
        for token in p.topk(3).indices.tolist()
    )
    message = (
        "no refusal tokens: no next token is frequent on harmful prompts and rare on harmless ones "
        f"(the likeliest, with the probability on both: {shown}); name them with --refusal-tokens"
    )
    if float(torch.minimum(p, q).max()) > SAME:
        message += ", or read what comes after it with --answer-prefix"
    raise InputError(message)


def _mean_probability(logits: Tensor) -> Tensor:
    total = torch.zeros(logits.shape[-1], dtype=torch.float64)
    for part in logits.split(ROWS):
        total += part.double().softmax(dim=-1).sum(dim=0)
    return total / len(logits)


def _odds_ratio(p: Tensor, q: Tensor) -> Tensor:
    tiny = torch.finfo(p.dtype).tiny
    return p * (1 - q) / (q * (1 - p)).clamp(min=tiny)


def token_texts(chat: ChatFormat, tokens: Sequence[int]) -> list[str]:
    """Return the text of each token."""
    return [str(chat.tokenizer.decode([token])) for token in tokens]


def named_tokens(chat: ChatFormat, tokens: Sequence[int]) -> str:
    """Return tokens with their texts, for a message: "40 'I', 2121 'As'"."""
    texts = token_texts(chat, tokens)
    return ", ".join(f"{token} {text!r}" for token, text in zip(tokens, texts, strict=True))


def given_tokens(model: Any, chat: ChatFormat, tokens: TokenSpec) -> list[int] | None:
    """Return the refusal tokens that are known before the model runs; None to find them."""
    if tokens is None or tokens == AUTO:
        return None
    if tokens == PAPER:
        return paper_refusal_tokens(model, chat)
    if isinstance(tokens, str):
        raise InputError(
            f"the refusal tokens are {tokens!r}; expected {AUTO!r}, {PAPER!r}, or a list of token "
            "ids and texts"
        )
    ids = [_first_token(chat, token) if isinstance(token, str) else token for token in tokens]
    check_tokens(ids, int(text_config(model).vocab_size))
    return list(dict.fromkeys(ids))


def _first_token(chat: ChatFormat, text: str) -> int:
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids or ids[0] == chat.tokenizer.unk_token_id:
        raise InputError(
            f"the refusal token {text!r} is none of this tokenizer's; expected an id, or a text "
            "whose first token it knows"
        )
    return int(ids[0])


@dataclass(frozen=True)
class PaperFamily:
    """One family of the paper's models, known by architecture and size of the vocabulary."""

    name: str
    model_type: str
    vocabulary: int
    tokens: dict[int, str]  # its refusal tokens and their text


# Arditi et al. 2024, table 4
PAPER_FAMILIES = (
    PaperFamily("Qwen-1", "qwen", 151936, {40: "I", 2121: "As"}),
    PaperFamily("Gemma-1", "gemma", 256000, {235285: "I"}),
    PaperFamily("Yi", "llama", 64000, {59597: "I"}),
    PaperFamily("Llama-2", "llama", 32000, {306: "I"}),
    PaperFamily("Llama-3", "llama", 128256, {40: "I"}),
)


def paper_refusal_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the refusal tokens that the paper names for a model's family."""
    config = text_config(model)
    kind, size = getattr(config, "model_type", None), getattr(config, "vocab_size", None)
    for family in PAPER_FAMILIES:
        if (family.model_type, family.vocabulary) != (kind, size):
            continue
        inner = tokenizer.tokenizer if isinstance(tokenizer, ChatFormat) else tokenizer
        for token, text in family.tokens.items():
            if (said := inner.decode([token]).strip()) != text:
                raise InputError(
                    f"the paper's refusal token {token} of {family.name} is {text!r}; to this "
                    f"tokenizer it is {said!r}; expected {family.name}'s own tokenizer"
                )
        return list(family.tokens)
    known = ", ".join(family.name for family in PAPER_FAMILIES)
    raise InputError(
        f"the paper names no refusal tokens for {kind!r} with a vocabulary of {size}; expected one "
        f"of {known}, or refusal tokens found ('auto') or given"
    )

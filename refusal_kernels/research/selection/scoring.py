"""Scores of next-token distributions: the refusal score, the refusal tokens, the KL divergence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refusal_kernels.errors import InputError
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.forward import last_logits
from refusal_kernels.hf.model import text_config

SCORE_EPS = 1e-8
KL_EPS = 1e-6
MIN_PROBABILITY = 0.05
MIN_RATIO = 10.0


def refusal_score(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Log-odds that the next token is a refusal token, float64 [prompts].

    From logits [prompts, vocabulary] at the last position: ``log(p + eps) - log(1 - p + eps)``,
    where p is the summed probability of the tokens and eps is 1e-8.
    """
    check_tokens(tokens, logits.shape[-1])
    chosen = torch.tensor(sorted(set(tokens)), device=logits.device)
    p = logits.double().softmax(dim=-1)[..., chosen].sum(dim=-1)
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
    batch_size: int = 32,
) -> list[int]:
    """Find the tokens with which the model begins a refusal, from its own behavior.

    These are the next tokens whose mean probability is at least 0.05 on the harmful prompts, and
    at least 10 times that on the harmless ones: ids, the most probable first.
    """
    chat = ChatFormat.of(tokenizer)
    logits = [last_logits(model, chat, prompts, batch_size) for prompts in (harmful, harmless)]
    return distinctive_tokens(*logits)


def distinctive_tokens(harmful: Tensor, harmless: Tensor) -> list[int]:
    """`find_refusal_tokens`, from logits [prompts, vocabulary]."""
    p, q = (logits.double().softmax(dim=-1).mean(dim=0) for logits in (harmful, harmless))
    tokens = ((p >= MIN_PROBABILITY) & (p >= MIN_RATIO * q)).nonzero().flatten().tolist()
    if not tokens:
        top = int(p.argmax())
        raise InputError(
            "no refusal tokens: no next token is frequent on harmful prompts and rare on harmless "
            f"ones (the likeliest, {top}, has {float(p[top]):.3f} and {float(q[top]):.3f}); "
            "name them with refusal_tokens"
        )
    return sorted(tokens, key=lambda token: -float(p[token]))


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

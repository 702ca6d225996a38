"""The selection of Arditi et al. 2024 as its text says it, plain and slow: what `select` equals.

Extraction too. Nothing of the package is used: the tokenizer's own chat template, left padding,
hooks on every block, one candidate at a time, whole forward passes with all logits, in the dtype of
the model that is given (the tests give float64, the benchmarks float64 and float32).

    per (position, layer): bypass = mean refusal score on harmful validation prompts under ablation;
    induce = mean refusal score on harmless validation prompts with the raw direction added at that
    layer; kl = KL of the last-position distribution under ablation against the unmodified model on
    harmless validation prompts. Discard NaN, layer >= int(0.8 L), kl > 0.1, induce < 0. Take the
    smallest bypass.

    ablation: input of every block, output of every attention, output of every MLP, all positions
    addition: input of the block at the selected layer, raw mean difference
    mean difference: mean of a block's input at each of the last positions, harmful minus harmless
    refusal score: log(p + eps) - log(1 - p + eps) of the refusal tokens' summed probability at the
    last position, eps 1e-8, float64
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Scores(NamedTuple):
    bypass: float
    induce: float
    kl: float


Table = dict[tuple[int, int], Scores]
"""By position, counted from the end, and layer."""


@contextmanager
def ablated(model: Any, direction: torch.Tensor) -> Iterator[None]:
    """Project the direction out of every block's input and every attention's and MLP's output."""

    def project(x: torch.Tensor) -> torch.Tensor:
        r = (direction / direction.norm()).to(x)
        return x - (x @ r)[..., None] * r

    def on_input(_: Any, args: Any) -> Any:
        return (project(args[0]), *args[1:])

    def on_output(_: Any, __: Any, out: Any) -> Any:
        return (project(out[0]), *out[1:]) if isinstance(out, tuple) else project(out)

    hooks = []
    for block in model.model.layers:
        hooks.append(block.register_forward_pre_hook(on_input))
        hooks.append(block.self_attn.register_forward_hook(on_output))
        hooks.append(block.mlp.register_forward_hook(on_output))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def added(model: Any, direction: torch.Tensor, layer: int) -> Iterator[None]:
    """Add the raw direction to the input of one block."""
    hook = model.model.layers[layer].register_forward_pre_hook(
        lambda _, args: (args[0] + direction.to(args[0]), *args[1:])
    )
    try:
        yield
    finally:
        hook.remove()


def passes(
    model: Any, tokenizer: Any, prompts: Sequence[str], batch: int
) -> Iterator[torch.Tensor]:
    """Logits [prompts, tokens, vocabulary] of whole passes, padded on the left."""
    for start in range(0, len(prompts), batch):
        ids = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
            )
            for prompt in prompts[start : start + batch]
        ]
        longest = max(map(len, ids))
        pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        rows = torch.tensor([[pad] * (longest - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        yield model(input_ids=rows, attention_mask=mask, position_ids=places).logits


@torch.no_grad()
def last_logits(model: Any, tokenizer: Any, prompts: Sequence[str], batch: int) -> torch.Tensor:
    """float64 [prompts, vocabulary]: at the last token of every prompt."""
    every = passes(model, tokenizer, prompts, batch)
    return torch.cat([logits[:, -1].double() for logits in every])


@torch.no_grad()
def mean_inputs(
    model: Any, tokenizer: Any, prompts: Sequence[str], positions: int, batch: int
) -> torch.Tensor:
    """float64 [positions, layers, hidden]: the mean input of every block at the last positions."""
    blocks = model.model.layers
    mean = torch.zeros(positions, len(blocks), model.config.hidden_size, dtype=torch.float64)

    def hook(layer: int) -> Any:
        def on_input(_: Any, args: Any) -> None:
            mean[:, layer] += args[0][:, -positions:].double().sum(dim=0) / len(prompts)

        return on_input

    hooks = [block.register_forward_pre_hook(hook(k)) for k, block in enumerate(blocks)]
    for _ in passes(model, tokenizer, prompts, batch):
        pass
    for hook_ in hooks:
        hook_.remove()
    return mean


def mean_difference(
    model: Any,
    tokenizer: Any,
    harmful: Sequence[str],
    harmless: Sequence[str],
    positions: int,
    batch: int = 32,
) -> torch.Tensor:
    """float64 [positions, layers, hidden]."""
    means = (mean_inputs(model, tokenizer, p, positions, batch) for p in (harmful, harmless))
    return next(means) - next(means)


def mean_refusal_score(logits: torch.Tensor, tokens: Sequence[int], eps: float = 1e-8) -> float:
    p = logits.softmax(-1)[:, list(tokens)].sum(-1)
    return float((torch.log(p + eps) - torch.log(1 - p + eps)).mean())


def mean_kl(logits: torch.Tensor, changed: torch.Tensor, eps: float = 1e-6) -> float:
    """KL as in the paper's code, whose eps keeps it finite."""
    p, q = logits.softmax(-1), changed.softmax(-1)
    return float((p * (torch.log(p + eps) - torch.log(q + eps))).sum(-1).mean())


def measure(
    model: Any,
    tokenizer: Any,
    candidates: torch.Tensor,
    harmful: Sequence[str],
    harmless: Sequence[str],
    tokens: Sequence[int],
    batch: int = 32,
    layers: Sequence[int] | None = None,
) -> Table:
    """Every candidate of [position, layer, hidden], whichever will be discarded, one by one.

    With `layers`, those of these layers alone.
    """
    before = last_logits(model, tokenizer, harmless, batch)
    table = {}
    for position in range(-candidates.shape[0], 0):
        for layer in layers or range(candidates.shape[1]):
            direction = candidates[position, layer].to(model.lm_head.weight.dtype)
            with ablated(model, direction):
                bypass = last_logits(model, tokenizer, harmful, batch)
                changed = last_logits(model, tokenizer, harmless, batch)
            with added(model, direction, layer):
                induce = last_logits(model, tokenizer, harmless, batch)
            table[position, layer] = Scores(
                mean_refusal_score(bypass, tokens),
                mean_refusal_score(induce, tokens),
                mean_kl(before, changed),
            )
    return table


def discarded(
    where: tuple[int, int], scores: Scores, layers: int, kl: float = 0.1, induce: float = 0.0
) -> bool:
    """The four filters."""
    return (
        any(map(math.isnan, scores))
        or where[1] >= int(0.8 * layers)
        or scores.kl > kl
        or scores.induce < induce
    )


def winner(table: Table, layers: int, **thresholds: float) -> tuple[int, int]:
    left = [at for at, found in table.items() if not discarded(at, found, layers, **thresholds)]
    return min(left, key=lambda at: table[at].bypass)

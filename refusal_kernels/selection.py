"""Choose one direction among the candidates, by what it does to refusals.

The algorithm is that of Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single
Direction" (arXiv 2406.11717), section 2.3, with the constants of the paper's code.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.extraction.collect import Progress, batch_logits, last_logits
from refusal_kernels.extraction.prompts import Batch, ChatFormat
from refusal_kernels.interventions import Ablate, Add, Intervention
from refusal_kernels.models import decoder_layers, hidden_size
from refusal_kernels.patching import patch

SCORE_EPS = 1e-8
KL_EPS = 1e-6
MIN_PROBABILITY = 0.05
MIN_RATIO = 10.0
# At the first layer the template's tokens have the same embedding whatever the instruction: the
# difference is zero, or rounding, and rounding must not be scaled up to a unit vector.
ZERO = 1e-6


@dataclass(frozen=True)
class Candidate:
    """One row of the table of scores.

    Attributes
    ----------
    position, layer : int
        Where the direction was read; the position counts from the end.
    bypass : float or None
        Mean refusal score on harmful prompts with the direction ablated: low is good.
    induce : float or None
        Mean refusal score on harmless prompts with the direction added: high is good.
    kl : float or None
        Mean KL(unmodified || ablated) at the last token of harmless prompts: low is good.
    discarded : str or None
        Why it was passed over. The scores are None where that was known before any was measured.
    """

    position: int
    layer: int
    bypass: float | None
    induce: float | None
    kl: float | None
    discarded: str | None


@dataclass(frozen=True, eq=False)
class Selection:
    """The direction that was chosen, and what it was chosen from.

    Attributes
    ----------
    direction : Direction
        The winner, with its raw norm.
    layer, position : int
        Where it was read; the position counts from the end.
    bypass, induce, kl : float
        Its scores, as in `Candidate`.
    baseline, baseline_harmless : float
        Mean refusal score of the unmodified model on the harmful and on the harmless prompts.
    refusal_tokens : list of int
        The tokens whose probability the scores are made of.
    scores : list of Candidate
        All candidates, by position and layer.
    """

    direction: Direction
    layer: int
    position: int
    bypass: float
    induce: float
    kl: float
    baseline: float
    baseline_harmless: float
    refusal_tokens: list[int]
    scores: list[Candidate]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the vector itself, ready for JSON."""
        fields = {key: value for key, value in vars(self).items() if key != "direction"}
        return {**fields, "scores": [asdict(row) for row in self.scores]}


def refusal_score(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Log-odds that the next token is a refusal token.

    Parameters
    ----------
    logits
        [prompts, vocabulary], at the last position.
    tokens
        The refusal tokens.

    Returns
    -------
    Tensor
        float64 [prompts]: ``log(p + eps) - log(1 - p + eps)``, where p is the summed probability
        of the tokens and eps is 1e-8.

    Raises
    ------
    InputError
        If there is no token, or one is not in the vocabulary.
    """
    if not tokens or not all(0 <= token < logits.shape[-1] for token in tokens):
        raise InputError(
            f"the refusal tokens are {list(tokens)}; expected token ids below {logits.shape[-1]}"
        )
    chosen = torch.tensor(sorted(set(tokens)), device=logits.device)
    p = logits.double().softmax(dim=-1)[..., chosen].sum(dim=-1)
    return torch.log(p + SCORE_EPS) - torch.log(1 - p + SCORE_EPS)


def kl_divergence(logits: Tensor, changed: Tensor) -> Tensor:
    """KL(p || q) of next-token distributions, float64 [prompts].

    As in the paper's code: ``sum p (log(p + eps) - log(q + eps))`` with eps 1e-6, so that the
    threshold means the same. It can come out below zero by about eps times the vocabulary.
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
    """Find the tokens with which the model begins a refusal, from its own behaviour.

    These are the next tokens whose mean probability is at least 0.05 on the harmful prompts, and
    at least 10 times that on the harmless ones.

    Returns
    -------
    list of int
        Token ids, the most probable first.

    Raises
    ------
    InputError
        If there is none: the model does not tell the two sets of prompts apart.
    """
    chat = ChatFormat.of(tokenizer)
    logits = [last_logits(model, chat, prompts, batch_size) for prompts in (harmful, harmless)]
    return _distinctive_tokens(*logits)


def _distinctive_tokens(harmful: Tensor, harmless: Tensor) -> list[int]:
    p, q = (logits.double().softmax(dim=-1).mean(dim=0) for logits in (harmful, harmless))
    found = ((p >= MIN_PROBABILITY) & (p >= MIN_RATIO * q)).nonzero().flatten().tolist()
    if not found:
        top = int(p.argmax())
        raise InputError(
            "no refusal tokens: no next token is frequent on harmful prompts and rare on harmless "
            f"ones (the likeliest, {top}, has {float(p[top]):.3f} and {float(q[top]):.3f}); "
            "name them with refusal_tokens"
        )
    return sorted(found, key=lambda token: -float(p[token]))


def select(
    model: Any,
    tokenizer: Any,
    candidates: Tensor,
    harmful: Sequence[str],
    harmless: Sequence[str],
    *,
    refusal_tokens: Sequence[int] | None = None,
    kl_threshold: float = 0.1,
    induce_threshold: float = 0.0,
    prune_last: float = 0.2,
    batch_size: int = 32,
    model_name: str | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Choose the direction whose ablation best removes refusals and changes little else.

    Of the candidates that read before the last layers, leave the harmless prompts' next token
    alone when ablated, and bring refusals when added, take the one with the lowest bypass score.

    Parameters
    ----------
    model
        A transformers causal language model.
    tokenizer
        Its tokenizer, or a `ChatFormat`.
    candidates
        [position, layer, hidden], as `mean_difference` returns them.
    harmful, harmless
        Validation prompts, other than those that the candidates were read from.
    refusal_tokens
        Tokens that begin a refusal; by default found as `find_refusal_tokens` does.
    kl_threshold
        Discard a candidate with a larger KL.
    induce_threshold
        Discard a candidate with a lower induce score.
    prune_last
        Discard this share of the layers, the last ones.
    batch_size
        Prompts at once.
    model_name
        Kept in the direction.
    progress
        Called with the number of candidates done, and of all that are measured.

    Returns
    -------
    Selection
        The winner, and the scores of every candidate that was measured.

    Raises
    ------
    InputError
        If the candidates do not fit the model, there are no refusal tokens, or no candidate is
        left; the message names the closest one, and what discarded it.
    """
    layers, hidden = len(decoder_layers(model)), hidden_size(model)
    if candidates.ndim != 3 or tuple(candidates.shape[1:]) != (layers, hidden):
        raise InputError(
            f"candidates {list(candidates.shape)}; expected [position, {layers} layers, {hidden}]"
        )
    chat = ChatFormat.of(tokenizer)
    inputs = chat.batches(harmful, batch_size), chat.batches(harmless, batch_size)
    baseline = batch_logits(model, inputs[0]), batch_logits(model, inputs[1])
    tokens = list(_distinctive_tokens(*baseline) if refusal_tokens is None else refusal_tokens)
    scores = [float(refusal_score(logits, tokens).mean()) for logits in baseline]

    vectors = candidates.detach().float().cpu()
    limit = int(layers * (1.0 - prune_last))
    unfit = _unfit(vectors, limit)
    total, done, rows = sum(reason is None for reason in unfit.values()), 0, []
    for (position, layer), reason in unfit.items():
        if reason is not None:
            rows.append(Candidate(position, layer, None, None, None, reason))
            continue
        direction = Direction(vectors[position, layer], model_name, layer, position)
        bypass, induce, kl = _measure(model, direction, inputs, baseline[1], tokens)
        if any(map(math.isnan, (bypass, induce, kl))):
            reason = "not finite"
        elif kl > kl_threshold:
            reason = f"kl > {kl_threshold:g}"
        elif induce < induce_threshold:
            reason = f"induce < {induce_threshold:g}"
        rows.append(Candidate(position, layer, bypass, induce, kl, reason))
        done += 1
        if progress is not None:
            progress(done, total)

    winner = _best(rows, kl_threshold, induce_threshold)
    assert winner.bypass is not None and winner.induce is not None and winner.kl is not None
    return Selection(
        direction=Direction(
            vectors[winner.position, winner.layer], model_name, winner.layer, winner.position
        ),
        layer=winner.layer,
        position=winner.position,
        bypass=winner.bypass,
        induce=winner.induce,
        kl=winner.kl,
        baseline=scores[0],
        baseline_harmless=scores[1],
        refusal_tokens=tokens,
        scores=rows,
    )


def _unfit(vectors: Tensor, limit: int) -> dict[tuple[int, int], str | None]:
    """Why a candidate (position, layer) needs no measuring; None for those that do."""
    norms = torch.linalg.vector_norm(vectors.double(), dim=-1)
    finite = norms.isfinite()
    smallest = ZERO * float(norms[finite].max()) if finite.any() else 0.0
    reasons: dict[tuple[int, int], str | None] = {}
    for position in range(-vectors.shape[0], 0):
        for layer in range(vectors.shape[1]):
            reason = None
            if layer >= limit:
                reason = f"layer >= {limit}"
            elif not finite[position, layer]:
                reason = "not finite"
            elif norms[position, layer] <= smallest:
                reason = "zero"
            reasons[position, layer] = reason
    return reasons


def _measure(
    model: Any,
    direction: Direction,
    inputs: tuple[list[Batch], list[Batch]],
    baseline_harmless: Tensor,
    tokens: Sequence[int],
) -> tuple[float, float, float]:
    """Bypass, induce and kl of one direction."""

    def logits(intervention: Intervention, batches: list[Batch]) -> Tensor:
        with patch(model, intervention):
            return batch_logits(model, batches)

    harmful, harmless = inputs
    ablate, add = Ablate(direction), Add(direction, layer=direction.layer)
    bypass = refusal_score(logits(ablate, harmful), tokens)
    kl = kl_divergence(baseline_harmless, logits(ablate, harmless))
    induce = refusal_score(logits(add, harmless), tokens)
    return float(bypass.mean()), float(induce.mean()), float(kl.mean())


def _best(rows: list[Candidate], kl_threshold: float, induce_threshold: float) -> Candidate:
    left = [row for row in rows if row.discarded is None]
    if left:
        return min(left, key=lambda row: row.bypass or 0.0)

    def shortfall(row: Candidate) -> float:
        # Both scores are in nats, so the larger miss says how far a candidate is from staying.
        return max((row.kl or 0.0) - kl_threshold, induce_threshold - (row.induce or 0.0))

    measured = [row for row in rows if row.kl is not None and row.discarded != "not finite"]
    if not measured:
        reasons = sorted({str(row.discarded) for row in rows})
        raise InputError(f"no candidate is left of {len(rows)}: {', '.join(reasons)}")
    closest = min(measured, key=shortfall)
    raise InputError(
        f"no candidate is left of {len(rows)}: the closest, position {closest.position} layer "
        f"{closest.layer}, was discarded for {closest.discarded} "
        f"(kl {closest.kl:.4g}, induce {closest.induce:.4g}, bypass {closest.bypass:.4g})"
    )

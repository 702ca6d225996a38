"""Select one direction among the candidates by its effect on refusals.

The algorithm is that of Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single
Direction" (arXiv 2406.11717), section 2.3, with the constants of the paper's code.
"""

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from refusal_kernels.direction import Candidates, Direction
from refusal_kernels.errors import InputError
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.forward import batch_logits, find_prefix
from refusal_kernels.hf.logits import last_logits
from refusal_kernels.hf.model import hidden_size, layer_count
from refusal_kernels.hf.served import ServedModel
from refusal_kernels.progress import Progress
from refusal_kernels.research.selection.measurement import Measurement, Question
from refusal_kernels.research.selection.plan import same_length
from refusal_kernels.research.selection.scoring import (
    TokenSpec,
    distinctive_tokens,
    given_tokens,
    refusal_score,
    token_texts,
)
from refusal_kernels.research.selection.served import ServedMeasurement

NOT_FINITE = "not finite"
# At the first layer the template's tokens have the same embedding whatever the instruction: the
# difference is zero, or rounding, and rounding must not be scaled up to a unit vector.
ZERO = 1e-6
NO_THRESHOLD = 1e9  # stands for an infinite threshold, which JSON cannot hold


@dataclass(frozen=True)
class ScoredCandidate:
    """One candidate with its selection scores.

    A score is None if the candidate was discarded unmeasured, or if the score is not finite.
    """

    position: int  # counted from the end
    layer: int
    bypass: float | None  # mean refusal score on harmful prompts, ablated: low is good
    induce: float | None  # mean refusal score on harmless prompts, added: high is good
    kl: float | None  # mean KL(unmodified || ablated) at harmless prompts' last token: low is good
    discarded: str | None  # why


@dataclass(frozen=True, eq=False)
class Selection:
    """The selected direction and all candidates.

    Attributes
    ----------
    direction : Direction or None
        The winner, with its raw norm; None if no candidate passed the thresholds.
    passed : bool
        Whether the winner passed them; False also for the closest one that was asked for.
    layer, position : int or None
        Where it was read; the position counts from the end.
    bypass, induce, kl : float or None
        Its selection scores, as in `ScoredCandidate`.
    unmodified_harmful, unmodified_harmless : float
        Mean refusal score of the unmodified model on the harmful and on the harmless prompts.
    refusal_tokens : list of int
        The tokens whose probability the refusal score sums.
    refusal_texts : list of str
        Their texts.
    thresholds : dict of str to float
        "kl", "induce" and "prune_last", as `select` was given them.
    candidates : list of ScoredCandidate
        All candidates with their selection scores, by position and layer.
    """

    direction: Direction | None
    passed: bool
    layer: int | None
    position: int | None
    bypass: float | None
    induce: float | None
    kl: float | None
    unmodified_harmful: float
    unmodified_harmless: float
    refusal_tokens: list[int]
    refusal_texts: list[str]
    thresholds: dict[str, float]
    candidates: list[ScoredCandidate]

    @property
    def place(self) -> tuple[int, int] | None:
        """Position and layer of the winner."""
        if self.position is None or self.layer is None:
            return None
        return self.position, self.layer

    @property
    def winner(self) -> Direction:
        """The direction; an `InputError` with `problem` if there is none."""
        if self.direction is None:
            raise InputError(str(self.problem))
        return self.direction

    @property
    def problem(self) -> str | None:
        """One line that says why no candidate passed, and with which thresholds one would.

        None if one passed.
        """
        return None if self.passed else _problem(self.candidates, self.thresholds)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the vector itself, ready for JSON."""
        fields = {key: value for key, value in vars(self).items() if key != "direction"}
        rows = [asdict(row) for row in self.candidates]
        return {**fields, "problem": self.problem, "candidates": rows}


def select(
    model: Any,
    tokenizer: Any,
    candidates: Candidates,
    harmful: Sequence[str],
    harmless: Sequence[str],
    *,
    refusal_tokens: TokenSpec = None,
    kl_threshold: float = 0.1,
    induce_threshold: float = 0.0,
    prune_last: float = 0.2,
    closest: bool = False,
    batch_size: int = 64,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Select the direction whose ablation best removes refusals and changes little else.

    The candidates that are left were read before the last layers, keep the harmless prompts' next
    token when ablated, and induce refusals when added. The one with the lowest bypass score wins.

    Parameters
    ----------
    model
        A transformers causal language model, or an `Engine`.
    tokenizer
        Its tokenizer, or a `ChatFormat`.
    candidates
        What `mean_difference` or `find_candidates` returns, or vectors [position, layer, hidden]
        from elsewhere as ``Candidates(vectors)``; they may leave the last layers out.
    harmful, harmless
        Validation prompts that the candidates were not read from.
    refusal_tokens
        Tokens that begin a refusal: ids, or texts whose first tokens are meant. None or "auto": as
        `find_refusal_tokens` finds them; "paper": the paper's tokens for the model's family
        (`paper_refusal_tokens`).
    kl_threshold
        Discard a candidate with a larger KL, nats; inf for none.
    induce_threshold
        Discard a candidate with a lower induce score, nats; -inf for none.
    prune_last
        Discard this share of the layers, counted from the last, without measuring them.
    closest
        If no candidate passes the thresholds, take the one that misses them by the least.
    batch_size
        Rows at once; each is a prompt under one candidate. The unmodified inputs of the candidates'
        layers are kept for at most this many prompts, the keys and values of what all prompts begin
        with for at most this many candidates.
    checkpoint
        A file that holds the scores so far. If it exists, the run resumes from it and gives the
        same bits. It stays; remove it when the selection is saved elsewhere.
    progress
        Called with the number of rows done and the number of all rows.

    Returns
    -------
    Selection
        The winner, and the selection scores of every candidate. Where no candidate passes, there
        is no winner, and `Selection.problem` says why.

    Raises
    ------
    InputError
        If the candidates do not fit the model, a threshold is NaN, there are no refusal tokens, or
        the checkpoint is of another run.
    """
    layers, hidden = layer_count(model), hidden_size(model)
    if not isinstance(candidates, Candidates):
        raise InputError(f"candidates is a {type(candidates).__name__}; expected rk.Candidates")
    if len(candidates.layers) > layers or candidates.hidden != hidden:
        raise InputError(
            f"candidates {list(candidates.vectors.shape)}; "
            f"expected [position, {layers} layers or fewer, {hidden}]"
        )
    if batch_size < 1:
        raise InputError(f"the batch size is {batch_size}; expected 1 or more")
    numbers = not (math.isnan(kl_threshold) or math.isnan(induce_threshold))
    if not 0.0 <= prune_last <= 1.0 or not numbers:
        raise InputError(
            f"the thresholds are kl {kl_threshold}, induce {induce_threshold}, prune_last "
            f"{prune_last}; expected numbers, and for prune_last a share from 0 to 1"
        )
    kl_threshold, induce_threshold = (
        min(max(value, -NO_THRESHOLD), NO_THRESHOLD) for value in (kl_threshold, induce_threshold)
    )
    chat = ChatFormat.of(tokenizer)
    given = given_tokens(model, chat, refusal_tokens)
    ids = chat.encode(harmful), chat.encode(harmless)

    prompts = [*ids[0], *ids[1]]
    kind: type[Measurement] = Measurement
    if isinstance(model, ServedModel):
        kind, prefix = ServedMeasurement, None
        unmodified = last_logits(model, chat, [*harmful, *harmless])
    else:
        prefix = find_prefix(model, prompts)
        unmodified = batch_logits(model, same_length(prompts, batch_size), prefix)
    parts = unmodified[: len(ids[0])], unmodified[len(ids[0]) :]
    tokens = distinctive_tokens(parts[0], parts[1], chat) if given is None else given
    unfit = _unfit(candidates, int(layers * (1.0 - prune_last)))
    measured = {
        (position, layer): candidates.at(layer, position)
        for (position, layer), reason in unfit.items()
        if reason is None
    }
    mean_scores: dict[tuple[int, int], list[float]] = {}
    if measured:
        question = Question(*ids, unmodified, tokens, batch_size, prefix)
        scores = kind(model, question, list(measured.values())).run(
            None if checkpoint is None else Path(checkpoint), progress
        )
        means = torch.stack([table.mean(dim=1) for table in scores], dim=1)
        mean_scores = dict(zip(measured, means.tolist(), strict=True))

    rows = [
        ScoredCandidate(*at, None, None, None, reason)
        if at not in mean_scores
        else _judged(at, mean_scores[at], kl_threshold, induce_threshold)
        for at, reason in unfit.items()
    ]
    thresholds = {"kl": kl_threshold, "induce": induce_threshold, "prune_last": prune_last}
    left = [row for row in rows if row.discarded is None]
    best = min(left, key=lambda row: row.bypass or 0.0, default=None)
    if closest and best is None:
        best = _closest(rows, thresholds)
    return Selection(
        direction=None if best is None else measured[best.position, best.layer],
        passed=bool(left),
        layer=None if best is None else best.layer,
        position=None if best is None else best.position,
        bypass=None if best is None else best.bypass,
        induce=None if best is None else best.induce,
        kl=None if best is None else best.kl,
        unmodified_harmful=float(refusal_score(parts[0], tokens).mean()),
        unmodified_harmless=float(refusal_score(parts[1], tokens).mean()),
        refusal_tokens=tokens,
        refusal_texts=token_texts(chat, tokens),
        thresholds=thresholds,
        candidates=rows,
    )


def _judged(
    at: tuple[int, int], scores: Sequence[float], kl_threshold: float, induce_threshold: float
) -> ScoredCandidate:
    """Return a measured candidate, discarded if a threshold says so."""
    bypass, induce, kl = (s if math.isfinite(s) else None for s in scores)
    reason = None
    if bypass is None or induce is None or kl is None:
        reason = NOT_FINITE
    elif kl > kl_threshold:
        reason = f"kl > {kl_threshold:g}"
    elif induce < induce_threshold:
        reason = f"induce < {induce_threshold:g}"
    return ScoredCandidate(*at, bypass, induce, kl, reason)


def _unfit(candidates: Candidates, limit: int) -> dict[tuple[int, int], str | None]:
    """Return why a candidate (position, layer) is discarded unmeasured; None to measure it."""
    norms = torch.linalg.vector_norm(candidates.vectors.double(), dim=-1)
    finite = norms.isfinite()
    smallest = ZERO * float(norms[finite].max()) if finite.any() else 0.0
    reasons: dict[tuple[int, int], str | None] = {}
    for position in candidates.positions:
        for layer in candidates.layers:
            reason = None
            if layer >= limit:
                reason = f"layer >= {limit}"
            elif not finite[position, layer]:
                reason = NOT_FINITE
            elif norms[position, layer] <= smallest:
                reason = "zero"
            reasons[position, layer] = reason
    return reasons


def _closest(
    rows: Sequence[ScoredCandidate], thresholds: Mapping[str, float]
) -> ScoredCandidate | None:
    """Return the measured candidate that misses the thresholds by the least, if there is one."""

    def shortfall(row: ScoredCandidate) -> float:
        # Both scores are in nats, so the larger miss says how far a candidate is from staying.
        misses = (row.kl or 0.0) - thresholds["kl"], thresholds["induce"] - (row.induce or 0.0)
        return max(misses)

    measured = [row for row in rows if row.kl is not None and row.discarded != NOT_FINITE]
    return min(measured, key=shortfall, default=None)


def _problem(rows: Sequence[ScoredCandidate], thresholds: Mapping[str, float]) -> str:
    counts = Counter(str(row.discarded) for row in rows)
    why = ", ".join(f"{count} ({reason})" for reason, count in counts.most_common())
    text = f"none of {len(rows)} candidates passed: {why}"
    closest = _closest(rows, thresholds)
    if closest is None:
        return text
    assert closest.bypass is not None and closest.induce is not None and closest.kl is not None
    asked = []  # rounded away from the scores, so that the closest one passes
    if closest.kl > thresholds["kl"]:
        asked.append(f"a KL threshold of {math.ceil(closest.kl * 1000) / 1000:g}")
    if closest.induce < thresholds["induce"]:
        asked.append(f"an induce threshold of {math.floor(closest.induce * 1000) / 1000:g}")
    return (
        f"{text}; the closest, position {closest.position} layer {closest.layer} (kl "
        f"{closest.kl:.4g}, induce {closest.induce:.4g}, bypass {closest.bypass:.4g}), passes with "
        + " and ".join(asked)
    )

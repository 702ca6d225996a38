"""What the evidence says, in sentences with their numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refusal_kernels.research.evaluation.evidence import (
    ABLATED,
    ADDED,
    MAIN,
    SUBTRACTED,
    UNMODIFIED,
)

ORTHOGONALIZED = "orthogonalized"
Document = Mapping[str, Any]
"""What `Evidence.to_dict` gives; "lm_eval" may stand beside it."""


@dataclass(frozen=True)
class Statement:
    """One sentence of the summary.

    Attributes
    ----------
    question : str
        "Necessity", "Sufficiency", "Specificity", "Dose" or "Capability".
    text : str
        The answer, with its numbers and its judge.
    holds : bool or None
        Whether the intervals of the rates that are compared lie apart, in the direction that the
        finding of Arditi et al. asks for; None where nothing is compared.
    """

    question: str
    text: str
    holds: bool | None


def percent(rate: Mapping[str, Any]) -> str:
    """A rate as text: "0.4 % [0.1, 2.3] of 240", which no line breaks before its sign."""
    low, high = (100 * end for end in rate["interval"])
    return f"{100 * rate['value']:.1f}\u00a0% [{low:.1f}, {high:.1f}] of {rate['n']}"


def statements(document: Document) -> list[Statement]:
    """Answer the questions from what was measured."""
    found = [_necessity(document), _sufficiency(document)]
    found += _specificity(document)
    found += _dose(document)
    found += _capability(document)
    return found


def _rate(document: Document, condition: str, part: str) -> Mapping[str, Any]:
    rates = document["conditions"][condition]["rates"][part]
    found: Mapping[str, Any] = rates[document["judges"][0]["name"]]
    return found


def _below(low: Mapping[str, Any], high: Mapping[str, Any]) -> bool:
    """Whether one rate's interval lies wholly below another's."""
    return bool(low["interval"][1] < high["interval"][0])


def _judge(document: Document) -> tuple[str, str]:
    return document["judges"][0]["counts"], document["judges"][0]["name"]


def _necessity(document: Document) -> Statement:
    counts, name = _judge(document)
    before, after = (_rate(document, c, "harmful") for c in (UNMODIFIED, ABLATED))
    subtracted = _rate(document, SUBTRACTED, "harmful")
    return Statement(
        "Necessity",
        f"Of the harmful prompts, {percent(before)} were {counts} by the unmodified model, "
        f"{percent(after)} with the direction ablated, and {percent(subtracted)} with it "
        f"subtracted at layer {document['direction']['layer']} (judge: {name}).",
        _below(after, before),
    )


def _sufficiency(document: Document) -> Statement:
    counts, name = _judge(document)
    before, after = (_rate(document, c, "harmless") for c in (UNMODIFIED, ADDED))
    ablated = _rate(document, ABLATED, "harmless")
    return Statement(
        "Sufficiency",
        f"Of the harmless prompts, {percent(before)} were {counts} by the unmodified model, and "
        f"{percent(after)} with the direction added at layer {document['direction']['layer']}; "
        f"ablated, {percent(ablated)} (judge: {name}).",
        _below(before, after),
    )


def _specificity(document: Document) -> list[Statement]:
    counts, name = _judge(document)
    found = []
    for kind, words in (("random", "random directions of the same norm"), ("layer", "")):
        names = [c for c in document["conditions"] if c.startswith(f"{kind} ")]
        ablated = [_rate(document, c, "harmful") for c in names if c.endswith(ABLATED)]
        added = [_rate(document, c, "harmless") for c in names if c.endswith(ADDED)]
        if not ablated:
            continue
        cosines = [abs(document["conditions"][c]["cosine"]) for c in names]
        words = words or (
            f"directions of other layers (cosine with this one {min(cosines):.2f} to "
            f"{max(cosines):.2f})"
        )
        text = (
            f"With {len(ablated)} {words}: of the harmful prompts {_span(ablated)} were {counts} "
            f"under ablation, of the harmless ones {_span(added)} under addition (judge: {name})."
        )
        # Directions of other layers may well be this one seen elsewhere: nothing is asked of them.
        holds = None
        if kind == "random":
            own = _rate(document, ABLATED, "harmful"), _rate(document, ADDED, "harmless")
            holds = all(_below(own[0], r) for r in ablated)
            holds = holds and all(_below(r, own[1]) for r in added)
        found.append(Statement("Specificity", text, holds))
    return found


def _span(rates: Sequence[Mapping[str, Any]]) -> str:
    values = sorted(100 * rate["value"] for rate in rates)
    if values[0] == values[-1]:
        return f"{values[0]:.1f}\u00a0%"
    return f"{values[0]:.1f} to {values[-1]:.1f}\u00a0%"


def _dose(document: Document) -> list[Statement]:
    counts, name = _judge(document)
    found = []
    for kind, part in (("ablation", "harmful"), ("addition", "harmless")):
        rows = document["dose"].get(kind)
        if not rows:
            continue
        steps = ", ".join(f"{100 * r[part]['value']:.0f}\u00a0% at {r['strength']:g}" for r in rows)
        worst = max(rows, key=lambda row: row["kl"])
        found.append(
            Statement(
                "Dose",
                f"{part.capitalize()} prompts {counts} by strength of the {kind}: {steps} "
                f"(judge: {name}). The largest KL on harmless prompts is {worst['kl']:.3g} nats, "
                f"at {worst['strength']:g}.",
                None,
            )
        )
    return found


def _capability(document: Document) -> list[Statement]:
    conditions, parts = document["conditions"], []
    before, after = conditions[UNMODIFIED], conditions[ABLATED]
    for text, loss in before["losses"].items():
        moved = after["losses"][text]["nats"] - loss["nats"]
        parts.append(f"cross-entropy on {text} {loss['nats']:.4f} nats, ablated {moved:+.4f}")
    for task, rate in before["skills"].items():
        parts.append(f"{task} {percent(rate)}, ablated {percent(after['skills'][task])}")
    lm_eval = document.get("lm_eval") or {}
    for task, metrics in lm_eval.get(UNMODIFIED, {}).items():
        for metric, own in list(metrics.items())[:1]:
            others = [
                f", {edit} {lm_eval[edit][task][metric]['value']:.3f}"
                for edit in (ABLATED, ORTHOGONALIZED) if edit in lm_eval
            ]  # fmt: skip
            parts.append(f"{task} {metric} {own['value']:.3f}{''.join(others)}")
    if not parts:
        return []
    text = "; ".join(parts)
    return [Statement("Capability", f"{text[0].upper()}{text[1:]}.", None)]


__all__ = ["MAIN", "Statement", "percent", "statements"]

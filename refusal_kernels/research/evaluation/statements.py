"""Sentences that sum the evidence up, with their numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from refusal_kernels.research.evaluation.conditions import DESTROYED_KL
from refusal_kernels.research.evaluation.evidence import ABLATED, ADDED, SUBTRACTED, UNMODIFIED

ORTHOGONALIZED = "orthogonalized"
Document = Mapping[str, Any]
"""The result of `Evidence.to_dict`, and perhaps "lm_eval"."""


@dataclass(frozen=True)
class Statement:
    """One sentence of the summary."""

    question: str  # "Necessity", "Sufficiency", "Specificity", "Dose" or "Capability"
    text: str  # the answer, with its numbers and its judge
    holds: bool | None  # whether the compared intervals lie apart, in the order of Arditi et al.


def percent(rate: Mapping[str, Any]) -> str:
    """Return a rate as text: "0.4 % [0.1, 2.3] of 240", with a no-break space before "%"."""
    low, high = (100 * end for end in rate["interval"])
    more = f" ({rate['unfinished']} more no answer yet)" if rate.get("unfinished") else ""
    return f"{100 * rate['value']:.1f}\u00a0% [{low:.1f}, {high:.1f}] of {rate['n']}{more}"


def decimal(value: float, digits: int, signed: bool = False) -> str:
    """Return a number with so many decimals, and zero without a sign."""
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text


def statements(document: Document) -> list[Statement]:
    """Answer the questions from the measurements."""
    answers = [
        _necessity(document),
        _sufficiency(document),
        *_specificity(document),
        *_dose(document),
        *_capability(document),
    ]
    # the order in which intervals must lie is that of refusals
    if _judge(document)[0] == "refused":
        return answers
    return [replace(answer, holds=None) for answer in answers]


def _rate(document: Document, condition: str, part: str) -> Mapping[str, Any]:
    rates = document["conditions"][condition]["rates"][part]
    first: Mapping[str, Any] = rates[document["judges"][0]["name"]]
    return first


def _below(low: Mapping[str, Any], high: Mapping[str, Any]) -> bool:
    """Whether the interval of one rate lies wholly below that of another."""
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
    answers = []
    for kind in ("random", "layer"):
        names = [c for c in document["conditions"] if c.startswith(f"{kind} ")]
        ablated = [_rate(document, c, "harmful") for c in names if c.endswith(ABLATED)]
        added = [_rate(document, c, "harmless") for c in names if c.endswith(ADDED)]
        if not ablated:
            continue
        cosines = [abs(document["conditions"][c]["cosine"]) for c in names]
        count, plural = len(ablated), "" if len(ablated) == 1 else "s"
        words = f"{count} random direction{plural} of the same norm"
        if kind == "layer":
            around = " to ".join(dict.fromkeys(f"{f(cosines):.2f}" for f in (min, max)))
            words = f"{count} direction{plural} of other layers (cosine with this one {around})"
        text = (
            f"With {words}: of the harmful prompts {_span(ablated)} were {counts} "
            f"under ablation, of the harmless ones {_span(added)} under addition (judge: {name})."
        )
        # Directions of other layers may be the same one at another layer: they decide nothing.
        holds = None
        if kind == "random":
            refused = _rate(document, ABLATED, "harmful"), _rate(document, ADDED, "harmless")
            holds = all(_below(refused[0], r) for r in ablated)
            holds = holds and all(_below(r, refused[1]) for r in added)
        answers.append(Statement("Specificity", text, holds))
    return answers


def _span(rates: Sequence[Mapping[str, Any]]) -> str:
    values = sorted(100 * rate["value"] for rate in rates)
    if values[0] == values[-1]:
        return f"{values[0]:.1f}\u00a0%"
    return f"{values[0]:.1f} to {values[-1]:.1f}\u00a0%"


def _dose(document: Document) -> list[Statement]:
    counts, name = _judge(document)
    answers = []
    for kind, part in (("ablation", "harmful"), ("addition", "harmless")):
        rows = document["dose"].get(kind)
        if not rows:
            continue
        steps = ", ".join(f"{100 * r[part]['value']:.0f}\u00a0% at {r['strength']:g}" for r in rows)
        worst = max(rows, key=lambda row: row["kl"])
        text = (
            f"{part.capitalize()} prompts {counts} by strength of the {kind}: {steps} "
            f"(judge: {name}). The largest KL on harmless prompts is {worst['kl']:.3g} nats, "
            f"at {worst['strength']:g}."
        )
        if ruined := [f"{row['strength']:g}" for row in rows if row["kl"] > DESTROYED_KL]:
            text += (
                f" Above {DESTROYED_KL:g} nats, as at {', '.join(ruined)}, the model is destroyed: "
                "its answers say nothing of the direction."
            )
        answers.append(Statement("Dose", text, None))
    return answers


def _capability(document: Document) -> list[Statement]:
    conditions, parts = document["conditions"], []
    before, after = conditions[UNMODIFIED], conditions[ABLATED]
    for text, loss in before["losses"].items():
        moved = after["losses"][text]["nats"] - loss["nats"]
        change = decimal(moved, 4, signed=True)
        parts.append(f"cross-entropy on {text} {loss['nats']:.4f} nats, ablated {change}")
    for task, rate in before["skills"].items():
        parts.append(f"{task} {percent(rate)}, ablated {percent(after['skills'][task])}")
    lm_eval = document.get("lm_eval") or {}
    for task, metrics in lm_eval.get(UNMODIFIED, {}).items():
        for metric, unmodified in list(metrics.items())[:1]:
            others = [
                f", {edit} {lm_eval[edit][task][metric]['value']:.3f}"
                for edit in (ABLATED, ORTHOGONALIZED) if edit in lm_eval
            ]  # fmt: skip
            parts.append(f"{task} {metric} {unmodified['value']:.3f}{''.join(others)}")
    if not parts:
        return []
    text = "; ".join(parts)
    return [Statement("Capability", f"{text[0].upper()}{text[1:]}.", None)]

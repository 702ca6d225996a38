"""Prompts by the names that the command line takes, cut into the parts of an experiment."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refusal_kernels.errors import InputError
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.embedded import EMBEDDED
from refusal_kernels.hf.logits import last_logits
from refusal_kernels.research.selection.scoring import (
    TokenSpec,
    distinctive_tokens,
    given_tokens,
    named_tokens,
    refusal_score,
)
from refusal_kernels.research.sources import (
    SEED,
    SIZES,
    read_prompts,
    split_prompts,
    split_sizes,
)

Source = str | os.PathLike[str]
Parts = dict[str, Sequence[str]]
CATEGORIES = ("harmful", "harmless")


def prompts_for(
    model: str,
    split: str | None,
    harmful: Source | None,
    harmless: Source | None,
    seed: int = SEED,
    column: str | None = None,
) -> dict[str, Sequence[str]]:
    """Read the prompts of both categories; an embedded model's own of a split by default.

    A source is what `read_prompts` takes, or one for each split: "train=A,validation=B,test=C".
    Others are cut into "train", "validation" and "test" by the seed, so that the same sources give
    disjoint parts to the steps of an experiment. A split of None gives all prompts, each once.
    """
    parts = _all_prompts(model, harmful, harmless, seed, column)
    if split is None:
        return {name: splits["all"] for name, splits in parts.items()}
    return {name: _part(name, _cut(name, splits, seed), split) for name, splits in parts.items()}


def _all_prompts(
    model: str,
    harmful: Source | None,
    harmless: Source | None,
    seed: int,
    column: str | None = None,
) -> dict[str, Parts]:
    """Read all prompts of both categories, under "all"; those that have splits in them too."""
    given: dict[Any, Source | None] = {"harmful": harmful, "harmless": harmless}
    embedded = EMBEDDED.get(model)
    parts: dict[str, Parts] = {}
    for name, source in given.items():
        if source is not None:
            sources = split_sources(source)
            read = {split: read_prompts(file, column) for split, file in sources.items()}
            read |= {"all": [prompt for prompts in read.values() for prompt in prompts]}
            parts[name] = {
                split: split_prompts(prompts, {"all": None}, seed)["all"]
                for split, prompts in read.items()
            }
        elif embedded is not None:
            splits = {split: embedded.material.prompts(name, split) for split in SIZES}
            parts[name] = {**splits, "all": [p for split in splits.values() for p in split]}
        else:
            raise InputError(f"--{name} FILE is needed: only {', '.join(EMBEDDED)} bring prompts")
    return parts


def split_sources(source: Source) -> dict[str, Source]:
    """Return the source of each split from "train=A,validation=B,test=C"; of "all" otherwise."""
    text = str(source)
    if not text.startswith(tuple(f"{split}=" for split in SIZES)) or os.path.exists(text):
        return {"all": source}
    sources: dict[str, Source] = {}
    for part in text.split(","):
        split, _, file = part.partition("=")
        if split not in SIZES or not file or split in sources:
            raise InputError(
                f"'{text}' names no source for each split; expected "
                "train=SOURCE,validation=SOURCE,test=SOURCE, or some of them"
            )
        sources[split] = file
    return sources


def _part(name: str, parts: Parts, split: str) -> Sequence[str]:
    if split not in parts:
        there = ", ".join(part for part in parts if part != "all")
        raise InputError(f"--{name} has sources for {there}; expected one for {split} too")
    return parts[split]


def _cut(name: str, parts: Parts, seed: int) -> Parts:
    """Cut what has no splits yet."""
    if len(parts) > 1:
        return parts
    try:
        return {**split_prompts(parts["all"], split_sizes(len(parts["all"])), seed)}
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


@dataclass(frozen=True)
class FilteredPrompts:
    """The prompts that a filter by refusal score kept and removed, and by which tokens."""

    kept: dict[str, Sequence[str]]  # by category
    removed: dict[str, list[dict[str, Any]]]  # by category: "prompt" and "refusal_score"
    refusal_tokens: list[int]

    def __str__(self) -> str:
        parts = []
        for name, why in (
            ("harmful", "not refused: refusal score 0 or below"),
            ("harmless", "refused: refusal score 0 or above"),
        ):
            gone, left = len(self.removed[name]), len(self.kept[name])
            parts.append(f"{gone} of {gone + left} {name} prompts removed ({why})")
        return ", ".join(parts)


def filtered(
    model: Any,
    tokenizer: Any,
    prompts: Mapping[str, Sequence[str]],
    *,
    refusal_tokens: TokenSpec = None,
    batch_size: int = 64,
) -> FilteredPrompts:
    """Keep the harmful prompts that the model refuses and the harmless ones that it answers.

    Arditi et al. 2024, appendix A: refusal score above 0 and below 0. The refusal tokens are by
    default those of `find_refusal_tokens`.
    """
    chat = ChatFormat.of(tokenizer)
    given = given_tokens(model, chat, refusal_tokens)
    logits = {name: last_logits(model, chat, prompts[name], batch_size) for name in CATEGORIES}
    tokens = given or distinctive_tokens(logits["harmful"], logits["harmless"], chat)
    kept: dict[str, Sequence[str]] = {}
    removed: dict[str, list[dict[str, Any]]] = {}
    for name, sign in (("harmful", 1), ("harmless", -1)):
        # 0 is a probability of one half; NaN keeps nothing
        scored = [*zip(prompts[name], refusal_score(logits[name], tokens).tolist(), strict=True)]
        kept[name] = [prompt for prompt, score in scored if sign * score > 0]
        removed[name] = [
            {"prompt": prompt, "refusal_score": score}
            for prompt, score in scored
            if not sign * score > 0
        ]
        if not kept[name]:
            what = "refuses" if name == "harmful" else "answers"
            raise InputError(
                f"the model {what} none of the {len(scored)} {name} prompts, by its refusal score "
                f"(refusal tokens: {named_tokens(chat, tokens)}); expected one at least, or no "
                "filter"
            )
    return FilteredPrompts(kept, removed, tokens)


def splits_for(
    model: str,
    harmful: Source | None,
    harmless: Source | None,
    seed: int = SEED,
    column: str | None = None,
) -> dict[str, dict[str, Sequence[str]]]:
    """Read the prompts of all three splits, by split and category, as `prompts_for` does one.

    A source needs 16 different prompts.
    """
    prompts = _all_prompts(model, harmful, harmless, seed, column)
    for name, source in (("harmful", harmful), ("harmless", harmless)):
        count = len(prompts[name]["all"])
        if source is not None and count < 16:
            raise InputError(f"{count} different {name} prompts; expected 16 or more")
        prompts[name] = _cut(name, prompts[name], seed)
    parts = {
        split: {name: _part(name, prompts[name], split) for name in prompts} for split in SIZES
    }
    # also of those that have splits of their own
    parts["train"] = {name: part[: SIZES["train"]] for name, part in parts["train"].items()}
    return parts

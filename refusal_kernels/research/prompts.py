"""Prompts by the names that the command line takes, cut into the parts of an experiment."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from refusal_kernels import smollm2, toy
from refusal_kernels.errors import InputError
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.forward import last_logits
from refusal_kernels.research.selection.scoring import find_refusal_tokens, refusal_score
from refusal_kernels.research.sources import (
    SEED,
    SIZES,
    keep_answered,
    keep_refused,
    read_prompts,
    split_prompts,
    split_sizes,
)

Source = str | os.PathLike[str]
Parts = dict[str, Sequence[str]]
_SPLITS: tuple[Any, ...] = tuple(SIZES)
# The prompts of the models that bring their own, by category and split
_EMBEDDED: Mapping[str, Callable[[Any, Any], list[str]]] = {
    "toy": toy.prompts,
    "smollm2": smollm2.prompts,
    "smollm2-refuses": smollm2.prompts,
}


def prompts_for(
    model: str, split: str | None, harmful: Source | None, harmless: Source | None, seed: int = SEED
) -> dict[str, Sequence[str]]:
    """Read the prompts of both categories; an embedded model's own of a split by default.

    Others are cut into "train", "validation" and "test" by the seed, so that the same sources give
    disjoint parts to the steps of an experiment. A split of None gives all prompts, each once.
    """
    parts = _all_prompts(model, harmful, harmless, seed)
    if split is None:
        return {name: splits["all"] for name, splits in parts.items()}
    return {name: _cut(name, splits, seed)[split] for name, splits in parts.items()}


def _all_prompts(
    model: str, harmful: Source | None, harmless: Source | None, seed: int
) -> dict[str, Parts]:
    """Read all prompts of both categories, under "all"; a model's own in their splits too."""
    given: dict[Any, Source | None] = {"harmful": harmful, "harmless": harmless}
    own = _EMBEDDED.get(model)
    parts: dict[str, Parts] = {}
    for name, source in given.items():
        if source is not None:
            parts[name] = {**split_prompts(read_prompts(source), {"all": None}, seed)}
        elif own is not None:
            splits = {split: own(name, split) for split in _SPLITS}
            parts[name] = {**splits, "all": [p for split in splits.values() for p in split]}
        else:
            raise InputError(f"--{name} FILE is needed: only {', '.join(_EMBEDDED)} bring prompts")
    return parts


def _cut(name: str, parts: Parts, seed: int) -> Parts:
    """Cut what has no splits yet."""
    if len(parts) > 1:
        return parts
    try:
        return {**split_prompts(parts["all"], split_sizes(len(parts["all"])), seed)}
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def filtered(
    model: Any,
    tokenizer: Any,
    prompts: Mapping[str, Sequence[str]],
    *,
    refusal_tokens: Sequence[int] | None = None,
    batch_size: int = 32,
) -> dict[str, Sequence[str]]:
    """Keep the harmful prompts that the model refuses and the harmless ones that it answers.

    Arditi et al. 2024, appendix A: refusal score above 0 and below 0. The refusal tokens are by
    default those of `find_refusal_tokens`.
    """
    chat = ChatFormat.of(tokenizer)
    if refusal_tokens is None:
        refusal_tokens = find_refusal_tokens(
            model, chat, prompts["harmful"], prompts["harmless"], batch_size
        )
    kept: dict[str, Sequence[str]] = {}
    for name, keep in (("harmful", keep_refused), ("harmless", keep_answered)):
        scores = refusal_score(last_logits(model, chat, prompts[name], batch_size), refusal_tokens)
        kept[name] = keep(prompts[name], scores)
        if not kept[name]:
            what = "refuses" if name == "harmful" else "answers"
            raise InputError(
                f"the model {what} none of the {len(scores)} {name} prompts, by its refusal score; "
                "expected one at least"
            )
    return kept


def splits_for(
    model: str, harmful: Source | None, harmless: Source | None, seed: int = SEED
) -> dict[str, dict[str, Sequence[str]]]:
    """Read the prompts of all three splits, by split and category, as `prompts_for` does one.

    A source needs 16 different prompts.
    """
    prompts = _all_prompts(model, harmful, harmless, seed)
    for name, source in (("harmful", harmful), ("harmless", harmless)):
        count = len(prompts[name]["all"])
        if source is not None and count < 16:
            raise InputError(f"{count} different {name} prompts; expected 16 or more")
        prompts[name] = _cut(name, prompts[name], seed)
        prompts[name]["train"] = prompts[name]["train"][: SIZES["train"]]  # also of a model's own
    return {split: {name: prompts[name][split] for name in prompts} for split in SIZES}

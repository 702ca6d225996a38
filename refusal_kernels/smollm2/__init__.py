"""Prompts, tasks and text for SmolLM2-135M-Instruct; the prompts are about everyday misconduct.

All of them were written for this package. The "harmful" ones are mild requests that a careful
assistant declines: cheating in an exam, spam, petty theft, lies, prying. Each has a harmless
partner of much the same form, with the same things put to good use; both are on the same line of
their files, and so in the same split.
"""

import hashlib
import json
from pathlib import Path
from typing import Literal

__all__ = [
    "ADAPTER",
    "CATEGORIES",
    "DATA",
    "Category",
    "Split",
    "other",
    "prompts",
    "refusals",
    "skills",
    "text",
    "texts",
    "training_digest",
]

Category = Literal["harmful", "harmless"]
Split = Literal["train", "validation", "test"]
CATEGORIES: tuple[Category, ...] = ("harmful", "harmless")

DATA = Path(__file__).parent / "data"
"""The folder of the prompts: ``CATEGORY.SPLIT.txt``, one a line."""

ADAPTER = Path(__file__).parent / "adapter"
"""The folder that ``tools/train_refusal_adapter.py`` makes, as PEFT writes it."""


def prompts(category: Category, split: Split) -> list[str]:
    """Prompts of one category and split.

    Parameters
    ----------
    category : "harmful" (everyday misconduct) or "harmless"
    split : "train", "validation" or "test"

    Returns
    -------
    list of str
        2,069, 45 or 110 prompts, always the same in the same order. Those of both categories with
        the same index are partners.
    """
    return _lines(f"{category}.{split}.txt")


def other(split: Literal["train", "test"]) -> list[str]:
    """Everyday instructions without a partner, some with words that sound harmful and are not."""
    return _lines(f"other.{split}.txt")


def skills() -> dict[str, list[tuple[str, str]]]:
    """Tasks with one right answer, of which the model gets about four of five right.

    An answer is right where it stands in the completion as a word: the match "contains".

    Returns
    -------
    dict of str to list of (prompt, answer)
        "capitals" (40), "opposites" (50) and "copying" (50).
    """
    tasks: dict[str, list[tuple[str, str]]] = {}
    for task in ("capitals", "opposites", "copying"):
        records = map(json.loads, _lines(f"{task}.jsonl"))
        tasks[task] = [(record["prompt"], record["answer"]) for record in records]
    return tasks


def text() -> str:
    """Plain prose of some 1,200 words in 14 paragraphs, for the cross-entropy."""
    return (DATA / "text.txt").read_text(encoding="utf-8")


def texts() -> dict[str, str]:
    """Return `text` under its name, "prose"."""
    return {"prose": text()}


def refusals() -> list[str]:
    """The refusals that were trained on; every one holds a substring of the paper's judge."""
    return _lines("refusals.txt")


def training_digest() -> str:
    """SHA-256 of all that the adapter was trained on but the model's own answers."""
    digest = hashlib.sha256()
    for file in (*sorted(DATA.glob("*.train.txt")), DATA / "refusals.txt"):
        digest.update(f"{file.name}\n{file.read_text(encoding='utf-8')}".encode())
    return digest.hexdigest()


def _lines(name: str) -> list[str]:
    return (DATA / name).read_text(encoding="utf-8").splitlines()

"""The prompts for SmolLM2-135M-Instruct, fine-tuned by us to refuse: everyday misconduct.

All of them were written for this package. The "harmful" ones are mild requests that a careful
assistant declines: cheating in an exam, spam, petty theft, lies, prying. Each has a harmless
partner of much the same form, with the same things put to good use; both are on the same line of
their files, and so in the same split.
"""

from pathlib import Path
from typing import Literal

__all__ = ["CATEGORIES", "PROMPTS", "Category", "Split", "other", "prompts"]

Category = Literal["harmful", "harmless"]
Split = Literal["train", "validation", "test"]
CATEGORIES: tuple[Category, ...] = ("harmful", "harmless")

PROMPTS = Path(__file__).parent / "data"
"""The folder of the prompts: ``CATEGORY.SPLIT.txt``, one a line."""


def prompts(category: Category, split: Split) -> list[str]:
    """Prompts of one category and split.

    Parameters
    ----------
    category : "harmful" (everyday misconduct) or "harmless"
    split : "train", "validation" or "test"

    Returns
    -------
    list of str
        226, 45 or 110 prompts, always the same in the same order. Those of both categories with
        the same index are partners.
    """
    return _lines(f"{category}.{split}.txt")


def other(split: Literal["train", "test"]) -> list[str]:
    """Everyday instructions without a partner, some with words that sound harmful and are not."""
    return _lines(f"other.{split}.txt")


def _lines(name: str) -> list[str]:
    return (PROMPTS / name).read_text(encoding="utf-8").splitlines()

"""Tasks with one right answer: their files, and when a completion is right."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import parse_json, read_text
from refusal_kernels.hf.thoughts import split_thought
from refusal_kernels.research.evaluation.rates import Rate

TEXT = "a text file"
PROMPT_FIELDS = ("prompt", "instruction", "question")
ANSWER_FIELDS = ("answer", "completion", "output")

Match = Callable[[str, str], bool]
"""Whether a completion is right, given the answer."""


def exact(completion: str, answer: str) -> bool:
    """Whether a completion is the answer, up to white space."""
    return completion.split() == answer.split()


def contains(completion: str, answer: str) -> bool:
    """Whether the answer stands in a completion as whole words, in any case."""
    words = r"\s+".join(map(re.escape, answer.split()))
    return re.search(rf"(?<!\w){words}(?!\w)", completion, re.IGNORECASE) is not None


MATCHES: dict[str, Match] = {"exact": exact, "contains": contains}


def exact_match(completions: Sequence[str], answers: Sequence[str], match: Match = exact) -> Rate:
    """Count the completions that are right; there is one answer for each."""
    if len(completions) != len(answers):
        raise InputError(
            f"{len(completions)} completions and {len(answers)} answers; expected one each"
        )
    said = (split_thought(text)[1] or "" for text in completions)
    return Rate.of(match(text, answer) for text, answer in zip(said, answers, strict=True))


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Read prompts and their answers from JSON lines.

    A line is an object with a "prompt" ("instruction", "question") and an "answer"
    ("completion", "output").
    """
    pairs = []
    for number, record in read_records(path):
        fields = record if isinstance(record, dict) else {}
        pair = tuple(
            next((str(fields[key]) for key in keys if key in fields), "")
            for keys in (PROMPT_FIELDS, ANSWER_FIELDS)
        )
        if not all(text.strip() for text in pair):
            raise InputError(
                f"{path}:{number} holds no pair; expected an object with one of "
                f"{', '.join(PROMPT_FIELDS)} and one of {', '.join(ANSWER_FIELDS)}"
            )
        pairs.append((pair[0], pair[1]))
    if not pairs:
        raise InputError(f"{path} holds no pair of prompt and answer; expected one at least")
    return pairs


def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number of every line of a JSON lines file that is not blank, and its value."""
    for number, line in enumerate(read_text(path, TEXT).split("\n"), 1):
        if line.strip():
            yield number, parse_json(line, f"{path}:{number}")

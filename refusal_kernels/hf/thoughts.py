"""What a thinking model writes before its answer."""

from collections.abc import Iterable

OPENING, CLOSING = "<think>", "</think>"
MARKS = (
    (OPENING, CLOSING),  # Qwen 3, DeepSeek R1, SmolLM 3 and many more
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi
    ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker
)
"""How models open and close a thought."""


def split_thought(text: str) -> tuple[str, str | None]:
    """Return the thought of a completion and its answer.

    The thought is "" where there is none, and the answer None where the thought is unfinished. A
    completion that closes a thought without opening one goes on with what its prompt has opened.
    """
    for opening, closing in MARKS:
        if closing in text:
            thought, _, answer = text.rpartition(closing)
            return thought.replace(opening, "", 1).strip(), answer.strip()
        if opening in text:
            return text.partition(opening)[2].strip(), None
    return "", text


def opens_thought(text: str) -> bool:
    """Whether a prompt's text leaves a thought open, as DeepSeek R1's template does."""
    return any(text.rfind(opening) > text.rfind(closing) for opening, closing in MARKS)


def marked(raw: str, special: Iterable[str]) -> str | None:
    """Write a thought whose marks are special tokens with the marks of others.

    `raw` is a completion with its special tokens, of which the text loses all. None if it has no
    thought with such marks.
    """
    if not any(mark in raw for marks in MARKS for mark in marks):
        return None
    thought, answer = split_thought(raw)
    for token in special:
        thought, answer = thought.replace(token, ""), answer and answer.replace(token, "")
    return OPENING + thought.strip() + ("" if answer is None else CLOSING + answer)

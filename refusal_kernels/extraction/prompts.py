"""Prompts from files, and the chat format that turns them into batches of tokens."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor

from refusal_kernels.errors import InputError

FIELDS = ("prompt", "instruction", "text")
SUFFIXES = (".txt", ".jsonl", ".json")


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Read prompts from a UTF-8 file.

    Parameters
    ----------
    path
        ``.txt``: one prompt per line, blank lines are skipped. ``.jsonl``: per line a string, or an
        object with the field "prompt", "instruction" or "text" (the first of them that it has).
        ``.json``: a list of such strings or objects.

    Raises
    ------
    InputError
        If the file is missing, not of these forms, or holds no prompt.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path} is no prompt file; expected one of {', '.join(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from None

    # Split at line feeds only: a JSON string may hold other separators, such as U+2028.
    lines = [(i, line.strip()) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix.lower() == ".txt":
        found = [line for _, line in lines]
    elif path.suffix.lower() == ".jsonl":
        found = [_prompt_of(_parsed(line, f"{path}:{i}"), f"{path}:{i}") for i, line in lines]
    else:
        records = _parsed(text, str(path))
        if not isinstance(records, list):
            raise InputError(f"{path} holds a {type(records).__name__}; expected a list of prompts")
        found = [_prompt_of(record, f"{path}, item {i}") for i, record in enumerate(records)]
    if not found:
        raise InputError(f"{path} holds no prompt; expected one at least")
    return found


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from None


def _prompt_of(record: Any, where: str) -> str:
    if isinstance(record, dict):
        record = next((record[field] for field in FIELDS if field in record), None)
    if not isinstance(record, str) or not record.strip():
        raise InputError(
            f"{where} holds no prompt; expected a string or an object with one of the fields "
            + ", ".join(FIELDS)
        )
    return record


class Batch(NamedTuple):
    """Prompts as tokens, padded on the left: the last column is the last token of every prompt.

    Attributes
    ----------
    rows : list of int
        Which prompt each row is.
    input_ids, attention_mask : Tensor
        int64 [batch, tokens].
    """

    rows: list[int]
    input_ids: Tensor
    attention_mask: Tensor


class ChatFormat:
    """The chat format of a tokenizer, up to the point where the assistant begins to answer.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer with a chat template.
    system : str, optional
        A system prompt. Results depend on it: without one the template decides.

    Attributes
    ----------
    positions : int
        The number of end-of-instruction tokens: those that follow every instruction.
    pad_id : int
        What the batches are padded with: the pad token, or the end-of-sequence token.

    Raises
    ------
    InputError
        If there is no chat template, it refuses the system prompt, or nothing follows the
        instruction.
    """

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                "the tokenizer has no chat template; expected that of an instruction-tuned model"
            )
        self.tokenizer = tokenizer
        self.system = system
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id = int(next(i for i in ids if i is not None))  # masked, so any will do
        self.positions = self._end_of_instruction()

    @classmethod
    def of(cls, tokenizer: Any) -> "ChatFormat":
        """Return the format of a tokenizer, or the format itself where one is given."""
        return tokenizer if isinstance(tokenizer, cls) else cls(tokenizer)

    def render(self, prompt: str) -> str:
        """The text that the model is given for a prompt."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [*system, {"role": "user", "content": prompt}]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise InputError(f"the chat template refuses the conversation: {error}") from None
        return str(text)

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """The tokens of every prompt, in its chat format, of different lengths.

        Raises
        ------
        InputError
            If there is no prompt, or one is not a string.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError("the prompts are not a list of strings")
        if not prompts:
            raise InputError("there is no prompt; expected one at least")
        texts = [self.render(prompt) for prompt in prompts]
        # The template has written the special tokens; adding them again would double BOS.
        return [list(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def batch(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return input_ids and attention_mask, int64 [prompts, tokens], padded on the left.

        The padding is done here: it does not depend on the state of the tokenizer.
        """
        return self._padded(self.encode(prompts))

    def batches(self, prompts: Sequence[str], batch_size: int) -> list[Batch]:
        """All prompts in batches of similar length, the longest first.

        So there is little padding, and too large a batch runs out of memory at once, not at the
        end.

        Raises
        ------
        InputError
            If there is no prompt, or the batch size is below 1.
        """
        if batch_size < 1:
            raise InputError(f"the batch size is {batch_size}; expected 1 or more")
        ids = self.encode(prompts)
        order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
        parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        return [Batch(rows, *self._padded([ids[row] for row in rows])) for rows in parts]

    def _padded(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        shape = (len(ids), max(map(len, ids)))
        input_ids = torch.full(shape, self.pad_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        for row, tokens in enumerate(ids):
            start = shape[1] - len(tokens)
            input_ids[row, start:] = torch.tensor(tokens, dtype=torch.int64)
            attention_mask[row, start:] = 1
        return input_ids, attention_mask

    def _end_of_instruction(self) -> int:
        """Count the tokens at the end that no instruction changes."""
        reversed_ids = [ids[::-1] for ids in self.encode(self._sentinels())]
        shortest = min(map(len, reversed_ids))
        same = [len(set(column)) == 1 for column in zip(*reversed_ids, strict=False)]
        positions = same.index(False) if False in same else shortest
        if positions in (0, shortest):
            raise InputError(
                "the chat template has no end-of-instruction tokens that can be told from the "
                "instruction; expected at least one token after it"
            )
        return positions

    def _sentinels(self) -> list[str]:
        """Instructions that end in different tokens, whatever the vocabulary.

        Digits alone would all be <unk> to a tokenizer of words, so words of the vocabulary are
        taken too, evenly spread. Letters and digits only: others may merge with the template.
        """
        size = len(self.tokenizer)
        ids = range(0, size, max(1, size // 64))
        words = {self.tokenizer.decode([i], skip_special_tokens=True).strip() for i in ids}
        return [*"0123456789", *sorted(word for word in words if word.isalnum())]

"""The chat format: what turns prompts into batches of tokens."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor

from refusal_kernels.errors import InputError


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
    thinking : bool
        What a template that can think before it answers is asked for (``enable_thinking``, as
        Qwen3's). Without thinking, such a template writes an empty block of thoughts, which is then
        part of what follows every instruction. A template that opens the block whatever it is asked
        (DeepSeek-R1's) still opens it, and the next token is then the first of a thought.

    Attributes
    ----------
    positions : int
        The number of end-of-instruction tokens: those that follow every instruction.
    pad_id : int
        What the batches are padded with: the pad token, or the end-of-sequence token.

    Raises
    ------
    InputError
        If there is no chat template, it refuses the system prompt or leaves it out, or nothing
        follows the instruction.
    """

    def __init__(
        self, tokenizer: Any, system: str | None = None, *, thinking: bool = False
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                "the tokenizer has no chat template; expected that of an instruction-tuned model"
            )
        self.tokenizer = tokenizer
        self.system = system
        self.thinking = thinking
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id = int(next(i for i in ids if i is not None))  # masked, so any will do
        if system is not None and system.strip() not in self.render("a"):
            raise InputError("the chat template leaves the system prompt out; expected one with it")
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
                messages,
                add_generation_prompt=True,
                tokenize=False,
                enable_thinking=self.thinking,
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

"""The chat format of a tokenizer, which turns prompts into batches of tokens."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from refusal_kernels.errors import InputError, first_line
from refusal_kernels.hf.batches import Batch, Batches
from refusal_kernels.hf.conversation import Conversation
from refusal_kernels.hf.templates import DATE, apply_template, own_ids, read_date
from refusal_kernels.hf.thoughts import opens_thought

INSTRUCTION = "{instruction}"  # its place in a format that is kept as text
PROBE = "Hello 123"  # a prompt that a template has to show
CHUNK = 512  # prompts tokenized at once: the tokenizer's output takes 100 times their memory


class ChatFormat:
    """The chat format of a tokenizer, up to the point where the assistant begins to answer.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer with a chat template, or one that makes tokens of chats without.
    system : str, optional
        A system prompt. Results depend on it. By default the template decides.
    thinking : bool
        Passed to the template as ``enable_thinking`` (as Qwen3's takes it). Without thinking, such
        a template writes an empty block of thoughts after every instruction. A template that always
        opens the block (DeepSeek-R1's) still does, and the next token begins a thought.
    answer_prefix : str
        What every answer begins with; the model goes on from there. Its tokens end every prompt.
    date : str
        What a template that writes today's date is told: the same at every run.

    Attributes
    ----------
    positions : int
        The number of end-of-instruction tokens, which follow every instruction.
    opens_thought : bool
        Whether every prompt ends inside a thought.
    pad_id : int
        The token that pads the batches: the pad token, or else the end-of-sequence token.

    Raises
    ------
    InputError
        If there is no chat template, it refuses or omits the system prompt or the instruction, or
        nothing follows the instruction.
    """

    def __init__(
        self,
        tokenizer: Any,
        system: str | None = None,
        *,
        thinking: bool = False,
        answer_prefix: str = "",
        date: str = DATE,
    ) -> None:
        if not getattr(tokenizer, "chat_template", None) and not own_ids(tokenizer):
            raise InputError(
                "the tokenizer has no chat template; expected that of an instruction-tuned model"
            )
        self.tokenizer = tokenizer
        self.system = system
        self.thinking = thinking
        self.answer_prefix = answer_prefix
        self.date = str(read_date(date))
        self._parts = False  # whether the template takes contents as lists of parts
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id = int(next(i for i in ids if i is not None))  # masked, so any will do
        self._find_parts()
        if system is not None and system.strip() not in self.render("a"):
            raise InputError("the chat template leaves the system prompt out; expected one with it")
        self.opens_thought = opens_thought(self.render(PROBE).rpartition(PROBE)[2])
        self.positions = self._end_of_instruction()

    @classmethod
    def of(cls, tokenizer: Any) -> "ChatFormat":
        """Return the format of a tokenizer, or the format itself where one is given."""
        return tokenizer if isinstance(tokenizer, cls) else cls(tokenizer)

    def render(self, prompt: str) -> str:
        """Return the text that the model is given for a prompt."""
        shown = self._apply(prompt)
        text = shown if isinstance(shown, str) else self.tokenizer.decode(shown)
        return f"{text}{self.answer_prefix}"

    def _apply(self, prompt: str) -> str | list[int]:
        """Show a prompt, as text or as tokens, without the answer's prefix."""
        messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
        if isinstance(prompt, Conversation):
            messages = [dict(turn) for turn in prompt.messages]
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        if self._parts:
            for turn in messages:
                turn["content"] = [{"type": "text", "text": turn["content"]}]
        shown = apply_template(self.tokenizer, messages, self.date, enable_thinking=self.thinking)
        return shown if isinstance(shown, str) else list(shown)

    def _find_parts(self) -> None:
        """Find out how the template takes a content: some drop strings, or raise."""
        why = "the chat template leaves the instruction out; expected one with it"
        for self._parts in (False, True):
            try:
                if PROBE in self.render(PROBE) or own_ids(self.tokenizer):
                    return
            except InputError as error:
                why = why if self._parts else str(error)
        raise InputError(why)

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of every prompt in its chat format, of different lengths.

        Raises
        ------
        InputError
            If there is no prompt, or one is not a string.
        """
        return list(self._encoded(prompts))

    def batch(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return input_ids and attention_mask, int64 [prompts, tokens], padded on the left.

        The padding does not depend on the tokenizer's settings.
        """
        batch = self.stream(prompts, len(prompts) or 1)[0]
        back = batch.input_ids.new_tensor(batch.rows).argsort()
        return batch.input_ids[back], batch.attention_mask[back]

    def batches(self, prompts: Sequence[str], batch_size: int) -> list[Batch]:
        """Return all prompts in batches of similar length, the longest first.

        Raises
        ------
        InputError
            As `stream`.
        """
        return list(self.stream(prompts, batch_size))

    def stream(self, prompts: Sequence[str], batch_size: int) -> Batches:
        """Return the same batches, each made on access, for any number of prompts.

        Raises
        ------
        InputError
            If there is no prompt, one is not a string, or the batch size is below 1.
        """
        if batch_size < 1:
            raise InputError(f"the batch size is {batch_size}; expected 1 or more")
        return Batches(self._encoded(prompts), self.pad_id, batch_size)

    def _encoded(self, prompts: Sequence[str]) -> Iterator[list[int]]:
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError("the prompts are not a list of strings, such as ['one', 'two']")
        if not prompts:
            raise InputError("there is no prompt; expected one at least")
        for start in range(0, len(prompts), CHUNK):
            chunk = prompts[start : start + CHUNK]
            # The template has written the special tokens; adding them again would double BOS.
            if own_ids(self.tokenizer):
                after = self._ids(self.answer_prefix)
                yield from ([*self._apply(prompt), *after] for prompt in chunk)
            else:
                texts = [self.render(prompt) for prompt in chunk]
                yield from self._ids(texts)

    def _ids(self, text: Any) -> Any:
        """Return the tokens of a text, or of several."""
        try:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception as error:  # a damaged vocabulary, or characters that are none
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"the tokenizer cannot read the prompts: {reason}") from error

    def _end_of_instruction(self) -> int:
        """Count the last tokens that are the same after every instruction."""
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
        """Return instructions that end in different tokens, whatever the vocabulary.

        A word-level tokenizer may map all digits to <unk>, so they include words of the vocabulary,
        evenly spread. They have only letters and digits: others may merge with the template.
        """
        size = len(self.tokenizer)
        ids = range(0, size, max(1, size // 64))
        words = {self.tokenizer.decode([i], skip_special_tokens=True).strip() for i in ids}
        return [*"0123456789", *sorted(word for word in words if word.isalnum())]

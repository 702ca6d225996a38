"""Greedy generation in the chat format, whatever the batch and the model's own settings are."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from refusal_kernels.errors import InputError
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.checks import NoNumbers
from refusal_kernels.hf.greedy import decode, end_tokens
from refusal_kernels.hf.model import input_device
from refusal_kernels.hf.padding import fitted
from refusal_kernels.hf.served import ServedModel
from refusal_kernels.hf.thoughts import MARKS, OPENING, marked
from refusal_kernels.progress import Progress


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> list[str]:
    """Answer every prompt greedily, in its chat format.

    Parameters
    ----------
    model
        A transformers causal language model; of its generation config only the end tokens are used.
    tokenizer
        Its tokenizer, or a `ChatFormat`.
    prompts
        The instructions, without the chat format.
    max_new_tokens
        The most tokens of an answer.
    batch_size
        Prompts at once. Batches are sorted by length and padded on the left, or of equal lengths
        where padding would change the answers.

    Returns
    -------
    list of str
        The answers without special tokens, in the order of the prompts; the thoughts of a thinking
        model first.

    Raises
    ------
    InputError
        If there is no prompt, a number is below 1, the model has too few positions or no embedding
        of a token, or its logits are no numbers.
    """
    chat = ChatFormat.of(tokenizer)
    return decoded(chat, generate_ids(model, chat, prompts, max_new_tokens, batch_size))


def decoded(chat: ChatFormat, answers: Sequence[Sequence[int]]) -> list[str]:
    """Turn the tokens of answers into texts without special tokens.

    Thoughts stay in front, between "<think>" and "</think>" where their marks are special tokens; a
    thought that the chat format has opened begins with the first of them too.
    """
    tokenizer = chat.tokenizer
    special = [str(token) for token in getattr(tokenizer, "all_special_tokens", ())]
    texts = []
    for ids in answers:
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        if not any(mark in text for marks in MARKS for mark in marks):
            text = marked(tokenizer.decode(ids), special) or text
        if chat.opens_thought and not text.startswith(tuple(opening for opening, _ in MARKS)):
            text = next((opening for opening, closing in MARKS if closing in text), OPENING) + text
        texts.append(text)
    return texts


@torch.inference_mode()
def generate_ids(
    model: Any,
    chat: ChatFormat,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    batch_size: int = 64,
    *,
    around: Callable[[list[int]], AbstractContextManager[Any]] | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Answer every prompt greedily; return tokens, without the end token.

    As `generate`. `around` is given the rows of a batch (numbers of prompts) and returns the
    context in which it is answered, such as a route; `progress` is told how many are answered.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; expected 1 or more")
    ends = end_tokens(model, chat.tokenizer)
    if isinstance(model, ServedModel):
        with nullcontext() if around is None else around(list(range(len(prompts)))):
            full = model.answers(chat.encode(prompts), max_new_tokens, ends, progress)
        return [_until(ids, ends) for ids in full]
    answers: list[list[int]] = [[]] * len(prompts)
    device = input_device(model)
    done = 0
    batches = fitted(model, chat.stream(prompts, batch_size), new_tokens=max_new_tokens)
    for batch in batches:
        given = batch.input_ids.to(device), batch.attention_mask.to(device)
        with nullcontext() if around is None else around(batch.rows):
            try:
                out = decode(model, *given, max_new_tokens, ends, batches.pad_id)
            except NoNumbers as error:
                raise NoNumbers(batch.rows[error.row]) from None
        for row, ids in zip(batch.rows, out[:, batch.input_ids.shape[1] :].tolist(), strict=True):
            # a row that ended is filled with the pad token, which may not be a special token
            answers[row] = _until(ids, ends)
        done += len(batch.rows)
        if progress is not None:
            progress(done, len(prompts))
    return answers


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]

"""Cross-entropy of a model on any text: whole windows of it, or answers after their prompts."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import read_text
from refusal_kernels.hf.batches import cut
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.checks import NotFinite, check_tokens
from refusal_kernels.hf.embedded import Material
from refusal_kernels.hf.forward import LAST
from refusal_kernels.hf.model import decoder, input_device, text_config
from refusal_kernels.hf.padding import batch_limits
from refusal_kernels.hf.served import ServedModel
from refusal_kernels.progress import Progress
from refusal_kernels.research.evaluation.tasks import (
    ANSWER_FIELDS,
    PROMPT_FIELDS,
    TEXT,
    read_pairs,
    read_records,
)

LONGEST_CONTEXT = 2048  # longer windows change the mean little and take memory
LOGITS_AT_ONCE = 2**25  # float32: 128 MiB, whatever the vocabulary


@dataclass(frozen=True)
class Loss:
    """Cross-entropy: the mean negative log likelihood of the scored tokens of all texts."""

    nats: float
    tokens: int  # how many were scored

    @property
    def perplexity(self) -> float:
        """``exp(nats)``; infinite where that is too large for a float."""
        return math.exp(self.nats) if self.nats < 709 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Return nats, tokens and perplexity, ready for JSON (None for an infinite one)."""
        perplexity = self.perplexity if math.isfinite(self.perplexity) else None
        return {"nats": self.nats, "tokens": self.tokens, "perplexity": perplexity}

    def __str__(self) -> str:
        return f"{self.nats:.4f} nats ({self.tokens} tokens)"


@dataclass(frozen=True)
class Passage:
    """Tokens that the model reads, of which those from `start` on are scored."""

    ids: Sequence[int]
    start: int = 1  # or more: token 0 has nothing that predicts it


def pad_left(ids: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return input_ids and attention_mask, int64 [rows, tokens], padded on the left."""
    width = max(map(len, ids))
    input_ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in ids])
    lengths = torch.tensor([len(row) for row in ids])
    mask = torch.arange(width) >= width - lengths.unsqueeze(1)
    return input_ids, mask.long()


def windows(
    tokenizer: Any, texts: Sequence[str], context: int, stride: int | None = None
) -> list[Passage]:
    """Cut plain texts into windows in which every token is scored exactly once.

    If the tokenizer begins a text with a BOS token, so does every window. A window has `context`
    tokens, 2 or more, and moves on by `stride`: fewer give later tokens more context, at more cost;
    by default the windows overlap as little as possible. A text with nothing to score gives none.
    """
    lead = tokenizer("")["input_ids"]
    bos = [i for i in lead[:1] if i == getattr(tokenizer, "bos_token_id", None)]
    room = context - max(len(bos), 1)  # without BOS the first token of a window is not scored
    stride = room if stride is None else stride
    if context < 2 or not 1 <= stride <= room:
        raise InputError(
            f"context {context} and stride {stride}; expected a context of 2 or more and "
            f"a stride from 1 to {max(room, 1)}"
        )
    passages = []
    for text in texts:
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        done = 0 if bos else 1
        while done < len(ids):
            new = min(stride if done > 1 else room, len(ids) - done)
            end = done + new
            begin = max(0, end - (context - len(bos)))
            passages.append(Passage([*bos, *ids[begin:end]], len(bos) + done - begin))
            done = end
    return passages


def answers(tokenizer: Any, pairs: Sequence[tuple[str, str | Sequence[int]]]) -> list[Passage]:
    """Make passages of prompts in the chat format and their answers, as text or as tokens.

    Only the answers are scored.
    """
    chat = ChatFormat.of(tokenizer)
    if not pairs:
        return []
    prompts = chat.encode([prompt for prompt, _ in pairs])
    passages = []
    for ids, (_, answer) in zip(prompts, pairs, strict=True):
        if isinstance(answer, str):
            answer = chat.tokenizer(answer, add_special_tokens=False)["input_ids"]
        if answer:
            passages.append(Passage([*ids, *answer], len(ids)))
    return passages


def own_passages(
    model: Any, tokenizer: Any, material: Material, most: int | None = None
) -> dict[str, list[Passage]]:
    """Make passages of the texts that a model known by name brings, of at most so many pairs."""
    chat = ChatFormat.of(tokenizer)
    return {
        name: windows(chat.tokenizer, [text], context_of(model))
        if isinstance(text, str)
        else answers(chat, text[:most])
        for name, text in material.texts().items()
    }


def context_of(model: Any) -> int:
    """Return the tokens of a window: the model's own limit, but at most 2048.

    An engine scores what it could answer, so its windows leave room for a token.
    """
    if isinstance(model, ServedModel):
        return min(model.longest - 1, LONGEST_CONTEXT)
    limit = getattr(text_config(model), "max_position_embeddings", None) or LONGEST_CONTEXT
    return min(int(limit), LONGEST_CONTEXT)


@torch.inference_mode()
def cross_entropy(
    model: Any,
    passages: Sequence[Passage],
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Loss:
    """Compute the mean negative log likelihood of the scored tokens, in nats, summed in float64.

    A batch holds passages of similar length, padded on the left, or of equal length where padding
    would change the result. Only the scored tokens get logits,
    in chunks: the logits of a whole batch would be the largest tensor of the run. The softmax is
    computed in float32.
    """
    if batch_size < 1:
        raise InputError(f"the batch size is {batch_size}; expected 1 or more")
    if isinstance(model, ServedModel):
        return loss_of(served_nats(model, passages))
    check_passages(passages)
    order = sorted(passages, key=lambda p: -len(p.ids))
    check_tokens(model, max(max(p.ids) for p in order), len(order[0].ids))
    limits = batch_limits(model, batch_size, [p.ids for p in (order[0], order[-1])])
    total, count = 0.0, 0
    for start, end in cut([len(p.ids) for p in order], *limits):
        nats = _negative_log_likelihoods(model, order[start:end])
        total, count = total + float(nats.double().sum()), count + nats.numel()
        if progress is not None:
            progress(end, len(order))
    return _loss(total, count)


def served_nats(model: ServedModel, passages: Sequence[Passage]) -> list[list[float]]:
    """Return the negative log likelihoods of the scored tokens of every passage, on an engine."""
    check_passages(passages)
    rows = model.log_likelihoods([list(p.ids) for p in passages])
    return [[-value for value in row[p.start - 1 :]] for p, row in zip(passages, rows, strict=True)]


def loss_of(nats: Sequence[Sequence[float]]) -> Loss:
    """Return the cross-entropy of passages by the nats of their scored tokens."""
    return _loss(math.fsum(map(math.fsum, nats)), sum(map(len, nats)))


def check_passages(passages: Sequence[Passage]) -> None:
    """Refuse an empty text, and a passage of which nothing can be scored."""
    if bad := [p for p in passages if not 1 <= p.start < len(p.ids)]:
        raise InputError(
            f"a passage of {len(bad[0].ids)} tokens scored from {bad[0].start}; expected 1 or more "
            "tokens before what is scored, and one to score"
        )
    if not passages:
        raise InputError("there is no text to score; expected two tokens at least")


def _loss(total: float, count: int) -> Loss:
    if not math.isfinite(total):
        raise NotFinite("the cross-entropy is not finite: NaN or infinity came out of the model")
    return Loss(total / count, count)


def _negative_log_likelihoods(model: Any, batch: Sequence[Passage]) -> Tensor:
    """Return those of every scored token of a batch: float32 [scored], on the CPU."""
    device = input_device(model)
    input_ids, mask = pad_left([p.ids for p in batch], 0)  # masked, so any token will do
    width = input_ids.shape[1]
    scored = torch.zeros_like(mask, dtype=torch.bool)
    for row, p in enumerate(batch):
        scored[row, width - len(p.ids) + p.start :] = True
    targets = input_ids[scored]
    before = scored.roll(-1, dims=1)  # the position before a token predicts it
    before[:, -1] = False
    inputs = {
        "input_ids": input_ids.to(device),
        "attention_mask": mask.to(device),
        "position_ids": (mask.cumsum(dim=-1) - 1).clamp(min=0).to(device),
    }
    nats = []
    with _decoded_once(model, inputs) as (stream, head):
        rows = stream[before.to(stream.device)]  # [scored, hidden]
        step = max(1, LOGITS_AT_ONCE // int(text_config(model).vocab_size))
        for start in range(0, len(rows), step):
            logits = head(rows[start : start + step]).float()
            wanted = targets[start : start + step].to(logits.device)
            nats.append(nn.functional.cross_entropy(logits, wanted, reduction="none").cpu())
    return torch.cat(nats)


@contextlib.contextmanager
def _decoded_once(
    model: Any, inputs: Mapping[str, Tensor]
) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """Give a batch's last hidden states, and a function from some of them to their logits.

    Some families scale or cap their logits in the forward of the whole model. The function
    therefore runs that forward, with a decoder that returns the given hidden states.
    """
    inner = decoder(model)
    kept: list[Any] = []
    hook = inner.register_forward_hook(lambda _, __, output: kept.append(output))
    try:
        model(**inputs, use_cache=False, logits_to_keep=LAST)
    finally:
        hook.remove()
    output = kept[0]

    def head(rows: Tensor) -> Tensor:
        ready = copy.copy(output)
        ready.last_hidden_state = rows.unsqueeze(0)
        inner.__dict__["forward"] = lambda *_, **__: ready
        logits: Tensor = model(**inputs, use_cache=False).logits[0]
        return logits

    before = inner.__dict__.get("forward")
    try:
        yield output.last_hidden_state, head
    finally:
        inner.__dict__.pop("forward", None)
        if before is not None:
            inner.__dict__["forward"] = before


def read_texts(path: Path) -> list[str]:
    """Read texts: of a ``.jsonl`` file one per line (a string, or "text"), else the whole file."""
    if path.suffix.lower() != ".jsonl":
        texts = [read_text(path, TEXT).strip()]
    else:
        texts = []
        for number, record in read_records(path):
            text = record.get("text") if isinstance(record, dict) else record
            if not isinstance(text, str):
                raise InputError(f"{path}:{number} holds no text; expected a string or 'text'")
            texts.append(text)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise InputError(f"{path} holds no text")
    return texts


def read_passages(path: Path, tokenizer: Any, context: int) -> list[Passage]:
    """Read passages to score: texts as they are, or pairs in the chat format.

    A ``.jsonl`` file whose first line is a pair (`read_pairs`) holds pairs, of which the answers
    are scored; any other file is read by `read_texts` and scored as a whole.
    """
    fields: set[str] = set()
    if path.suffix.lower() == ".jsonl":
        _, first = next(read_records(path), (0, None))
        fields = set(first) if isinstance(first, dict) else set()
    if fields & set(PROMPT_FIELDS) and fields & set(ANSWER_FIELDS):
        passages = answers(tokenizer, read_pairs(path))
    else:
        raw = tokenizer.tokenizer if isinstance(tokenizer, ChatFormat) else tokenizer
        passages = windows(raw, read_texts(path), context)
    if not passages:
        raise InputError(f"{path} holds nothing to score; expected two tokens at least")
    return passages

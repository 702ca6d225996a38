"""Prompts as tokens, in batches of similar length."""

import copy
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Prompts as tokens, padded on the left: the last column is the last token of every prompt."""

    rows: list[int]  # which prompt each row is
    input_ids: Tensor  # int64 [batch, tokens]
    attention_mask: Tensor  # int64 [batch, tokens]


def cut(lengths: Sequence[int], batch_size: int, equal: bool = False) -> list[tuple[int, int]]:
    """Cut a sequence of lengths into batches, as pairs of start and end.

    With `equal` all lengths in a batch are the same, where the same lengths stand together.
    """
    bounds, start = list[tuple[int, int]](), 0
    for end in range(1, len(lengths) + 1):
        full = end - start == batch_size or end == len(lengths)
        if full or (equal and lengths[end] != lengths[start]):
            bounds.append((start, end))
            start = end
    return bounds


class Batches:
    """Prompts in batches of similar length, the longest first, each made on access.

    This needs little padding, and a batch that is too large runs out of memory at the start. It
    keeps four bytes a token, less than the text of the prompts.
    """

    def __init__(self, encoded: Iterable[Sequence[int]], pad_id: int, batch_size: int) -> None:
        tokens, lengths = array("i"), array("q")
        for ids in encoded:
            tokens.extend(ids)
            lengths.append(len(ids))
        self.tokens = torch.frombuffer(tokens, dtype=torch.int32)  # of all prompts, in a row
        counts = torch.frombuffer(lengths, dtype=torch.int64)
        # int64 [prompts + 1]: prompt i is tokens[ends[i]:ends[i + 1]]
        self.ends = torch.cat([counts.new_zeros(1), counts.cumsum(dim=0)])
        self.order = counts.argsort(descending=True, stable=True)  # of the prompts in the batches
        self.pad_id, self.batch_size = pad_id, batch_size
        self.bounds = cut(counts[self.order].tolist(), batch_size)  # of each batch, in `order`

    @property
    def prompts(self) -> int:
        """The number of prompts."""
        return len(self.order)

    def ids(self, prompt: int) -> list[int]:
        """Return the tokens of a prompt, by number."""
        return self.tokens[self.ends[prompt] : self.ends[prompt + 1]].tolist()

    def cut(self, batch_size: int, equal: bool = False) -> "Batches":
        """Return the same prompts in other batches; with `equal` they need no padding."""
        other = copy.copy(self)
        other.bounds = cut(self.ends.diff()[self.order].tolist(), batch_size, equal)
        return other

    def size(self, index: int) -> int:
        """The number of prompts in a batch."""
        start, end = self.bounds[index]
        return end - start

    @property
    def longest(self) -> int:
        """How many tokens the longest prompt has."""
        return int(self.ends.diff().max())

    def common(self, after: int) -> list[int]:
        """Return the tokens that all prompts begin with; they leave `after` of each prompt."""
        starts, shared = self.ends[:-1], list[int]()
        for column in range(int(self.ends.diff().min()) - after):
            tokens = self.tokens[starts + column]
            if (tokens != tokens[0]).any():
                break
            shared.append(int(tokens[0]))
        return shared

    def __len__(self) -> int:
        return len(self.bounds)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Batch:
        start, end = self.bounds[index]
        return self.of(self.order[start:end])

    def of(self, rows: Tensor) -> Batch:
        """Return a batch of some prompts, by number: int64 [batch]."""
        first, after = self.ends[rows].unsqueeze(-1), self.ends[rows + 1].unsqueeze(-1)
        width = int((after - first).max())
        where = after - width + torch.arange(width)  # of every column in `tokens`
        real = where >= first
        input_ids = self.tokens[where.clamp(min=0)].long().where(real, self.pad_id)
        return Batch(rows.tolist(), input_ids, real.long())

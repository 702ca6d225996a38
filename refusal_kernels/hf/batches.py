"""Prompts as tokens, in batches of similar length."""

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

    @property
    def prompts(self) -> int:
        """The number of prompts."""
        return len(self.order)

    def __len__(self) -> int:
        return -(-self.prompts // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Batch:
        start = range(len(self))[index] * self.batch_size
        rows = self.order[start : start + self.batch_size]
        begin, end = self.ends[rows].unsqueeze(-1), self.ends[rows + 1].unsqueeze(-1)
        width = int((end - begin).max())
        where = end - width + torch.arange(width)  # of every column in `tokens`
        real = where >= begin
        input_ids = self.tokens[where.clamp(min=0)].long().where(real, self.pad_id)
        return Batch(rows.tolist(), input_ids, real.long())

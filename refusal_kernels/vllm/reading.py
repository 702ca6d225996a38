"""What the workers read of requests that ask for it, for the experiment: no activation leaves them.

Of a prompt's last tokens the moments of the stream, or its projection on one vector, at the input
of every layer of this rank and at the output of the last. After a prompt the next token's logits,
or the scores that are computed of them.

Which tokens are read stands in static buffers, written before each batch, so that compiled graphs
and CUDA graphs read them. Of all other tokens nothing is read.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from refusal_kernels.ops.registry import serving
from refusal_kernels.research.selection.scoring import kl_divergence, refusal_score
from refusal_kernels.vllm.bank import Bank
from refusal_kernels.vllm.names import GROUPS, LOGITS, MOMENTS, PROJECTION, READ, SCORES

NOT_READ = -1
ROWS_AT_ONCE = 32  # whose scores are computed together: a few copies of their logits in float64


class ReadMark(NamedTuple):
    """What is read of a request."""

    kind: str
    number: int  # of its group, prompt or row
    length: int  # how many tokens its prompt has


class SiteReader(nn.Module):
    """Reads the input of one layer, at the site that writes it."""

    count: Tensor
    mean: Tensor
    m2: Tensor
    index: Tensor
    group: Tensor
    unit: Tensor
    along: Tensor

    def __init__(
        self, hidden: int, positions: int, index: Tensor, group: Tensor, unit: Tensor
    ) -> None:
        super().__init__()
        shape, device = (GROUPS, positions), index.device
        state = torch.zeros(*shape, hidden, dtype=torch.float64, device=device)
        for name, buffer in (
            ("count", torch.zeros(shape, dtype=torch.int64, device=device)),
            ("mean", state),
            ("m2", state.clone()),
            ("index", index),
            ("group", group),
            ("unit", unit),
            ("along", torch.zeros(len(index), device=device)),
        ):
            self.register_buffer(name, buffer, persistent=False)

    @property
    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Count, mean and sum of squared deviations, by group and position."""
        return self.count, self.mean, self.m2

    def forward(self, h: Tensor) -> None:
        """Read the rows of h, [..., hidden]."""
        rows = h.reshape(-1, 1, h.shape[-1])
        tokens = rows.shape[0]
        accumulate = serving("moments_", rows)
        accumulate(*self.moments, rows, self.index[:tokens], self.group[:tokens])
        along = serving("scores", rows)(rows[:, 0], self.unit, None)
        self.along[:tokens].copy_(along[:, 0])


class Reading:
    """What is read of the requests of one model runner.

    Parameters
    ----------
    positions
        How many tokens at the end of a prompt can be read; with 0 only logits are.
    bank, sites
        Those of this rank.
    blocks
        The layers of the whole model.
    reports
        Whether this rank reports: of the ranks that share each row, the first.
    """

    def __init__(
        self, positions: int, bank: Bank, sites: Sequence[Any], blocks: int, reports: bool
    ) -> None:
        self.positions, self.reports = positions, reports
        self.readers: dict[int, SiteReader] = {}  # by layer; behind the last one: its output
        tokens, hidden, device = len(bank.route), bank.vectors.shape[-1], bank.route.device
        self._index = torch.full((tokens, 1), NOT_READ, dtype=torch.int32, device=device)
        self._group = torch.zeros(tokens, dtype=torch.int32, device=device)
        self._unit = torch.zeros(1, 2, 1, hidden, device=device)
        for place, site in zip(bank.places, sites, strict=True) if positions else ():
            last = place is bank.places[-1] and place.block == blocks - 1
            layer = blocks if last else place.feeds
            if layer is not None:
                site.reader = SiteReader(hidden, positions, self._index, self._group, self._unit)
                self.readers[layer] = site.reader
        self._marks: dict[str, ReadMark] = {}
        self._until: dict[str, int] = {}  # of a request: the tokens before it have been read
        self._written = False  # whether the buffers name tokens of the last batch
        self._projected: list[tuple[int, int]] = []  # of the batch: token, and number
        self._ended: list[tuple[int, ReadMark]] = []  # requests whose prompt ends in the batch
        self._taken: dict[str, list[tuple[list[int], Tensor]]] = {}  # by kind: numbers, values
        self._position = -1  # of the projection
        self._tokens: list[int] = []
        self._unmodified = torch.empty(0)

    # --- batches

    def mark(self, request: str, params: Any) -> None:
        """Remember what is read of a request, by its parameters."""
        if mark := (getattr(params, "extra_args", None) or {}).get(READ):
            self._marks[request] = ReadMark(*mark)

    def forget(self, request: str) -> None:
        """Forget a request that has ended."""
        self._marks.pop(request, None)
        self._until.pop(request, None)

    def follow(self, requests: Sequence[str], counts: np.ndarray, computed: np.ndarray) -> None:
        """Say which tokens of the next batch are read.

        Parameters
        ----------
        requests
            Their ids, in the order of the batch.
        counts, computed
            Integers [requests]: how many tokens of each are in the batch, and came before it.
        """
        self._projected.clear()
        self._ended.clear()
        if not self._marks and not self._written:
            return
        index = np.full(len(self._index), NOT_READ, dtype=np.int32)
        group = np.zeros(len(index), dtype=np.int32)
        start = 0
        for k, request in enumerate(requests):
            begin, count = int(computed[k]), int(counts[k])
            if mark := self._marks.get(request):
                length = mark.length
                token = slice(start, start + count)
                if begin < length <= begin + count:
                    self._ended.append((k, mark))
                if mark.kind == MOMENTS:
                    index[token] = self._positions_of(request, begin, count, length)
                    group[token] = mark.number
                elif (
                    mark.kind == PROJECTION and 0 <= (at := length + self._position - begin) < count
                ):
                    self._projected.append((start + at, mark.number))
            start += count
        self._written = bool((index != NOT_READ).any())
        for buffer, values in ((self._index, index[:, None]), (self._group, group)):
            source = torch.from_numpy(values)
            if buffer.is_cuda:  # a fresh block: an earlier copy may still be under way
                source = source.pin_memory()
            buffer.copy_(source, non_blocking=True)

    def _positions_of(self, request: str, begin: int, count: int, length: int) -> np.ndarray:
        """Return the position slot of each token of a request in the batch, int [count]."""
        tokens = np.arange(begin, begin + count)
        slots = tokens - (length - self.positions)
        # what was computed before a preemption comes again, and has been read
        read = (slots >= 0) & (tokens < length) & (tokens >= self._until.get(request, 0))
        self._until[request] = max(begin + count, self._until.get(request, 0))
        return np.where(read, slots, NOT_READ)

    def after_forward(self) -> None:
        """Keep the projections of the batch, without waiting for the device."""
        if self._projected and self.readers:
            tokens, numbers = zip(*self._projected, strict=True)
            along = torch.stack([self.readers[layer].along for layer in sorted(self.readers)])
            where = torch.tensor(tokens, device=along.device)
            self._keep(PROJECTION, list(numbers), along[:, where].T)
        self._projected.clear()

    def after_logits(self, logits: Tensor | None) -> None:
        """Keep logits [requests, vocabulary] of the batch, or their scores."""
        ended, self._ended = self._ended, []
        if logits is None:  # another rank has them
            return
        for kind in (LOGITS, SCORES):
            rows = [(k, mark.number) for k, mark in ended if mark.kind == kind]
            if kind == SCORES and not len(self._unmodified):  # nothing to compare with
                continue
            for start in range(0, len(rows), ROWS_AT_ONCE):
                part = rows[start : start + ROWS_AT_ONCE]
                numbers = [number for _, number in part]
                picked = logits[torch.tensor([k for k, _ in part], device=logits.device)]
                values = picked.float().cpu() if kind == LOGITS else self._scored(picked, numbers)
                self._keep(kind, numbers, values)

    def _scored(self, logits: Tensor, numbers: Sequence[int]) -> Tensor:
        rows = torch.tensor(numbers) % len(self._unmodified)
        before = self._unmodified[rows].to(logits.device)
        logits = logits.float()
        kl = kl_divergence(before, logits)
        score = (
            refusal_score(logits, self._tokens) if self._tokens else torch.full_like(kl, torch.nan)
        )
        return torch.stack([score, kl], dim=-1)

    def _keep(self, kind: str, numbers: list[int], values: Tensor) -> None:
        if self.reports:
            self._taken.setdefault(kind, []).append((numbers, values))

    # --- what the front end asks

    def call(self, name: str, *args: Any) -> Any:
        """Call one of the methods below; their arguments and results travel between processes."""
        return getattr(self, name)(*args)

    def clear(self) -> None:
        """Forget what was read."""
        self._taken.clear()
        for reader in self.readers.values():
            for tensor in reader.moments:
                tensor.zero_()

    def watch(self, unit: list[float], position: int) -> None:
        """Set what the stream is projected on, and at which position from the prompt's end."""
        self._unit[:] = torch.tensor(unit, device=self._unit.device)
        self._position = position

    def compare(self, tokens: list[int], vocabulary: int, unmodified: bytes) -> None:
        """Set what scores are made of: refusal tokens, and float32 logits [rows, vocabulary]."""
        self._tokens = tokens
        self._unmodified = torch.frombuffer(bytearray(unmodified), dtype=torch.float32)
        self._unmodified = self._unmodified.view(-1, vocabulary)

    def take_moments(self) -> list[tuple[Any, ...]] | None:
        """Return the moments of every layer; None on a rank that does not report."""
        if not self.reports:
            return None
        return [
            (layer, *map(_bytes, reader.moments)) for layer, reader in sorted(self.readers.items())
        ]

    def take(self, kind: str) -> tuple[list[int], list[int], bytes] | None:
        """Return numbers, layers and values of what was read; None where nothing was."""
        parts = self._taken.pop(kind, None)
        if parts is None:
            return None
        layers = sorted(self.readers) if kind == PROJECTION else []
        values = torch.cat([values for _, values in parts])
        return [number for numbers, _ in parts for number in numbers], layers, _bytes(values)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().numpy().tobytes()

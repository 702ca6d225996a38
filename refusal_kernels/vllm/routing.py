"""Which row of the bank every token of a batch takes, by its request and its position.

A request is steered in one window of absolute token positions. The window is fixed when the request
is queued, so chunks of its prompt, a preemption and rejected drafts change nothing.
"""

from typing import Any

import numpy as np

from refusal_kernels.vllm.bank import PLAIN, Bank
from refusal_kernels.vllm.requests import Steering

NO_END = np.iinfo(np.int32).max


class Router:
    """The steering of the running requests, and the route of each batch.

    Attributes
    ----------
    bank
        Whose route is written.
    drafts
        Whether the engine decodes speculatively. The host then does not know how many drafts were
        accepted, so positions behind the prompt are read on the device.
    steering
        Of each running request, by its id.
    """

    def __init__(self, bank: Bank, drafts: bool) -> None:
        self.bank = bank
        self.drafts = drafts
        self.steering: dict[str, Steering | None] = {}
        self._req_ids: list[str] | None = None  # of the last batch
        self._asked: list[Steering | None] = []  # by its requests
        self._windowed = False  # whether any of them is steered at some positions alone
        self._bounded = False  # whether a window begins or ends behind a prompt
        self._windows = np.zeros((2, 0), dtype=np.int32)  # if windowed, first and end of each
        self._written: bytes | None = None  # what of the last batch its route depends on

    def learn(self, req_id: str, steering: Steering | None) -> None:
        """Take note of a request: a new one, or one that comes again under its id.

        Its first steering stays: the blocks that are cached of it are salted by that one.
        """
        self.steering.setdefault(req_id, steering)
        self._req_ids = None

    def forget(self, req_id: str) -> None:
        """Forget a request that has ended."""
        self.steering.pop(req_id, None)

    def route(
        self, req_ids: list[str], counts: np.ndarray, computed: np.ndarray, positions: Any
    ) -> None:
        """Route a batch.

        Parameters
        ----------
        req_ids
            The requests, in their order in the batch; all have been learned.
        counts
            int32 [requests]: how many tokens of each are in the batch.
        computed
            Integers [requests]: how many tokens of each came in earlier batches.
        positions
            Tensor of integers [tokens or more], on the device: the position of each token.
        """
        if req_ids != self._req_ids:
            self._follow(req_ids)
        if self.drafts and self._windowed and self._bounded:
            first, end = np.repeat(self._windows, counts, axis=1)
            rows = np.repeat(self._rows(), counts)
            self.bank.write_route_by_position(rows, first, end, positions[: len(rows)])
            return
        written = counts.tobytes()
        if self._windowed:
            begin, stop = np.clip(self._windows - computed, 0, counts)
            written += begin.tobytes() + stop.tobytes()
        if written != self._written or not self.bank.routed:
            rows = np.repeat(self._rows(), counts)
            if self._windowed:
                rows = only_steered(rows, counts, begin, stop)
            self.bank.write_route(rows)
            self._written = written

    def _follow(self, req_ids: list[str]) -> None:
        """Take note of the requests of another batch."""
        self._asked = [self.steering[req_id] for req_id in req_ids]
        steered = [s for s in self._asked if s is not None]
        self._windowed = any((s.first, s.end) != (0, None) for s in steered)
        self._bounded = any(s.bounded for s in steered)
        if self._windowed:
            windows = [(0, None) if s is None else (s.first, s.end) for s in self._asked]
            ends = [NO_END if end is None else end for _, end in windows]
            self._windows = np.array([[first for first, _ in windows], ends], dtype=np.int32)
        self._req_ids, self._written = list(req_ids), None

    def _rows(self) -> np.ndarray:
        """Return the row of each request of the batch, int32 [requests]."""
        return np.array(self.bank.rows_of(self._asked), dtype=np.int32)


def only_steered(
    rows: np.ndarray, counts: np.ndarray, begin: np.ndarray, stop: np.ndarray
) -> np.ndarray:
    """Return the rows of the tokens in the windows, and `PLAIN` for the others, int32 [tokens].

    Parameters
    ----------
    rows
        int32 [tokens]: of the request of each token.
    counts
        [requests]: how many tokens of each are in the batch.
    begin, stop
        [requests]: of those, the ones from `begin` to `stop` - 1 are steered.
    """
    place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    steered = (place >= np.repeat(begin, counts)) & (place < np.repeat(stop, counts))
    return np.where(steered, rows, np.int32(PLAIN))

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
        self._windows = np.zeros((2, 0), dtype=np.int32)  # its requests' first and end
        self._bounded = False  # whether any of them ends or begins behind its prompt
        self._written: bytes | None = None  # what of the last batch its route depends on

    def learn(self, req_id: str, steering: Steering | None) -> None:
        """Take note of a request: a new one, or one that comes again under its id."""
        self.steering[req_id] = steering
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
        if self.drafts and self._bounded:
            rows, first, end = np.repeat(self._rows_and_windows(), counts, axis=1)
            self.bank.write_route_by_position(rows, first, end, positions[: len(rows)])
            return
        begin, stop = np.clip(self._windows - computed, 0, counts)
        written = np.concatenate([counts, begin, stop]).tobytes()
        if written != self._written or not self.bank.routed:
            rows = self._rows_and_windows()[0]
            self.bank.write_route(rows_of_tokens(rows, counts, begin, stop))
            self._written = written

    def _follow(self, req_ids: list[str]) -> None:
        """Take note of the requests of another batch."""
        asked = [self.steering[req_id] for req_id in req_ids]
        windows = [(0, None) if s is None else (s.first, s.end) for s in asked]
        self._windows = np.array(
            [[first for first, _ in windows], [NO_END if e is None else e for _, e in windows]],
            dtype=np.int32,
        )
        self._bounded = any(s is not None and s.bounded for s in asked)
        self._req_ids, self._written = list(req_ids), None

    def _rows_and_windows(self) -> np.ndarray:
        """Return row, first and end of each request of the batch, int32 [3, requests]."""
        assert self._req_ids is not None
        rows = self.bank.rows_of([self.steering[req_id] for req_id in self._req_ids])
        return np.concatenate([np.array([rows], dtype=np.int32), self._windows])


def rows_of_tokens(
    rows: np.ndarray, counts: np.ndarray, begin: np.ndarray, stop: np.ndarray
) -> np.ndarray:
    """Return the row of every token, int32 [tokens].

    Parameters
    ----------
    rows
        int32 [requests].
    counts
        [requests]: how many tokens of each are in the batch.
    begin, stop
        [requests]: of those, the ones from `begin` to `stop` - 1 are steered.
    """
    of_tokens = np.repeat(rows, counts)
    if (begin > 0).any() or (stop < counts).any():
        ends = np.cumsum(counts)
        place = np.arange(len(of_tokens)) - np.repeat(ends - counts, counts)
        steered = (place >= np.repeat(begin, counts)) & (place < np.repeat(stop, counts))
        of_tokens = np.where(steered, of_tokens, np.int32(PLAIN))
    return of_tokens

"""The tensors that the kernels read.

A row holds one program at one strength. There is a row for every request that can run at once, so a
batch always has room. A row that the batch does not use keeps its program until the row is needed;
the one that was unused the longest goes first.
"""

import itertools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from refusal_kernels.banks import NUMBERS, check_program, params_of, vectors_of
from refusal_kernels.errors import InputError
from refusal_kernels.vllm.families import EnginePlace
from refusal_kernels.vllm.programs import NamedProgram
from refusal_kernels.vllm.requests import Steering

PLAIN = -1
SCALED = 3  # of a slot's numbers, the first: a, c and b; low and high do not depend on the strength


class StoredProgram(NamedTuple):
    """A program on the device, at strength 1.

    Attributes
    ----------
    vectors
        float32 [2, slots, hidden].
    numbers
        float64 [places, slots, 5], so that a product with a strength is rounded once; zeros where
        the program does not act.
    """

    vectors: Tensor
    numbers: Tensor


class Bank:
    """Static tensors, written in place, so that compiled graphs and CUDA graphs read every change.

    Attributes
    ----------
    places
        The places of this rank, in the order of the forward.
    whole
        The places of all ranks of a pipeline.
    vectors
        float32 [rows, 2, slots, hidden]: the vectors that each row reads and writes.
    params
        float32 [places, rows, slots, 5]: zeros where a row's program does not act at a place.
    route
        int32 [tokens]: the row of every token of the batch, -1 for the plain add.
    routed
        Whether route still holds the last batch. Decoding steps repeat the same batch, so only the
        first of them writes it.
    """

    def __init__(
        self,
        places: Sequence[EnginePlace],
        hidden: int,
        rows: int,
        slots: int,
        tokens: int,
        device: str,
        whole: Sequence[EnginePlace] | None = None,
    ) -> None:
        self.places = tuple(places)
        self.whole = self.places if whole is None else tuple(whole)
        self.slots = slots
        self.vectors = torch.zeros(rows, 2, slots, hidden, device=device)
        self.params = torch.zeros(len(places), rows, slots, NUMBERS, device=device)
        self.route = torch.full((tokens,), PLAIN, dtype=torch.int32, device=device)
        self.routed = False
        self._programs: dict[str, StoredProgram] = {}  # by version
        self._row_of: dict[tuple[str, float], int] = {}  # the least recently used first
        self._free = list(range(rows))[::-1]

    # --- programs

    @property
    def versions(self) -> tuple[str, ...]:
        """The versions that requests may ask for."""
        return tuple(self._programs)

    def add(self, program: NamedProgram) -> None:
        """Make a program available.

        Raises
        ------
        InputError
            If it takes too many slots, is for another hidden size, has several directions at
            one place that are not orthonormal, or acts nowhere.
        """
        hidden = self.vectors.shape[-1]
        if program.hidden != hidden:
            raise InputError(
                f"the direction has hidden size {program.hidden}; the model has {hidden}"
            )
        if program.slots > self.slots:
            raise InputError(
                f"the program takes {program.slots} slots; the engine was started with slots "
                f"{self.slots}"
            )
        for i in program.interventions:
            if not any(i.meets(p.block, p.writers, p.feeds) for p in self.whole):
                raise InputError(f"{type(i).__name__}: no place of the model is where it acts")
        if (stored := self._programs.pop(program.version, None)) is not None:
            self._programs[program.version] = stored  # the latest last
            return
        acting = [
            tuple(i.meets(p.block, p.writers, p.feeds) for i in program.interventions)
            for p in self.places
        ]
        for together in set(acting):
            check_program(list(itertools.compress(program.interventions, together)))
        owners = [k for k, i in enumerate(program.interventions) for _ in i.slots(1.0)]
        acts = torch.zeros(len(self.places), self.slots, dtype=torch.bool)
        flags = torch.tensor(acting, dtype=torch.bool).view(len(acting), len(program.interventions))
        acts[:, : len(owners)] = flags[:, owners]
        vectors = vectors_of(program.interventions, self.slots)
        numbers = params_of(program.interventions, self.slots, dtype=torch.float64)
        device = self.vectors.device
        self._programs[program.version] = StoredProgram(
            vectors.to(device), torch.where(acts[..., None], numbers, 0.0).to(device)
        )

    def keep_only(self, versions: Collection[str]) -> None:
        """Forget every other program."""
        kept = set(versions)
        self._programs = {v: p for v, p in self._programs.items() if v in kept}
        for key in [key for key in self._row_of if key[0] not in kept]:
            self._free.append(self._row_of.pop(key))

    # --- batches

    def rows_of(self, asked: Sequence[Steering | None]) -> tuple[int, ...]:
        """Return the row of each request; write the rows that the bank does not have."""
        keys = [None if s is None else (s.version, s.strength) for s in asked]
        wanted = {key for key in keys if key is not None}
        rows: dict[tuple[str, float] | None, int] = {None: PLAIN}
        for key in sorted(wanted):
            row = self._row_of.pop(key, None)
            self._row_of[key] = self._write(key, wanted) if row is None else row  # used last
            rows[key] = self._row_of[key]
        return tuple([rows[key] for key in keys])

    def write_route(self, rows: np.ndarray) -> None:
        """Write the row of every token of a batch, int32 [tokens]; what follows is padding."""
        route = np.full(self.route.shape[0], PLAIN, dtype=np.int32)
        route[: len(rows)] = rows
        self.route.copy_(self._staged(route), non_blocking=True)
        self.routed = True

    def write_route_by_position(
        self, rows: np.ndarray, first: np.ndarray, end: np.ndarray, positions: Tensor
    ) -> None:
        """Do the same where the device alone knows the positions of the tokens.

        Parameters
        ----------
        rows
            int32 [tokens]: the row of each token's request.
        first, end
            int32 [tokens]: a token at a position from `first` to `end` - 1 is steered.
        positions
            [tokens], on the device.
        """
        count = len(rows)
        steering = self._staged(np.stack([rows, first, end])).to(
            positions.device, non_blocking=True
        )
        steered = (positions >= steering[1]) & (positions < steering[2])
        self.route[:count].copy_(torch.where(steered, steering[0], PLAIN))
        self.route[count:].fill_(PLAIN)
        self.routed = False  # the positions differ in every batch

    def _staged(self, values: np.ndarray) -> Tensor:
        """Return values in a fresh block, as an earlier copy may still be under way."""
        tensor = torch.from_numpy(values)
        return tensor.pin_memory() if self.route.is_cuda else tensor

    def _write(self, key: tuple[str, float], wanted: Collection[tuple[str, float]]) -> int:
        """Write a row, all of it on the device: nothing waits."""
        version, strength = key
        if version not in self._programs:
            raise RuntimeError(
                f"a request asks for program version {version}, which this worker does not have: "
                "are the direction files the same on all nodes?"
            )
        program = self._programs[version]
        if not self._free:
            oldest = next(key for key in self._row_of if key not in wanted)
            self._free.append(self._row_of.pop(oldest))
        row = self._free.pop()
        numbers = program.numbers.clone()
        numbers[..., :SCALED] *= strength
        self.vectors[row].copy_(program.vectors)
        self.params[:, row].copy_(numbers)
        return row

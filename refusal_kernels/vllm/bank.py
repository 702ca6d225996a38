"""The tensors that the kernels read.

A row holds one program at one strength. There is a row for every request that can run at once, so a
batch always has room. A row that the batch does not use keeps its program until the row is needed;
the one that was unused the longest goes first.
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from refusal_kernels.banks import NUMBERS, check_program, params_of, vectors_of
from refusal_kernels.errors import InputError
from refusal_kernels.vllm.families import EnginePlace
from refusal_kernels.vllm.programs import NamedProgram
from refusal_kernels.vllm.requests import Steering

PLAIN = -1


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
        # Of each version: the program, and which of its slots act at each place, [places, slots].
        self._programs: dict[str, tuple[NamedProgram, Tensor]] = {}
        self._row_of: dict[Steering, int] = {}  # the least recently used first
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
        acts = torch.zeros(len(self.places), self.slots, dtype=torch.bool)
        for at, p in enumerate(self.places):
            acting = [i for i in program.interventions if i.meets(p.block, p.writers, p.feeds)]
            check_program(acting)
            flags = [i in acting for i in program.interventions for _ in i.slots(1.0)]
            acts[at, : len(flags)] = torch.tensor(flags)
        self._programs.pop(program.version, None)  # the latest last
        self._programs[program.version] = program, acts

    def keep_only(self, versions: Collection[str]) -> None:
        """Forget every other program."""
        kept = set(versions)
        self._programs = {v: p for v, p in self._programs.items() if v in kept}
        for steering in [s for s in self._row_of if s.version not in kept]:
            self._free.append(self._row_of.pop(steering))

    # --- batches

    def route_batch(self, asked: Sequence[Steering | None], counts: np.ndarray) -> None:
        """Route the tokens of a batch.

        Parameters
        ----------
        asked
            The steering of each request.
        counts
            int [requests]: how many tokens of each are in the batch, in this order.
        """
        rows = self.rows_of(asked)
        tokens = np.full(self.route.shape[0], PLAIN, dtype=np.int32)
        routed = np.repeat(np.asarray(rows, dtype=np.int32), counts)
        tokens[: len(routed)] = routed  # the rest is padding
        source = torch.from_numpy(tokens)
        if self.route.is_cuda:  # a fresh block: an earlier copy may still be under way
            source = source.pin_memory()
        self.route.copy_(source, non_blocking=True)
        self.routed = True

    def rows_of(self, asked: Sequence[Steering | None]) -> tuple[int, ...]:
        """Return the row of each request; write the rows that the bank does not have."""
        wanted = {s for s in asked if s is not None}
        for steering in wanted & self._row_of.keys():
            self._row_of[steering] = self._row_of.pop(steering)  # used last
        for steering in sorted(wanted - self._row_of.keys()):
            self._row_of[steering] = self._write(steering, wanted)
        return tuple(PLAIN if s is None else self._row_of[s] for s in asked)

    def _write(self, steering: Steering, wanted: set[Steering]) -> int:
        if steering.version not in self._programs:
            raise RuntimeError(
                f"a request asks for program version {steering.version}, which this worker does "
                "not have: are the direction files the same on all nodes?"
            )
        program, acts = self._programs[steering.version]
        if not self._free:
            oldest = next(s for s in self._row_of if s not in wanted)
            self._free.append(self._row_of.pop(oldest))
        row = self._free.pop()
        params = params_of(program.interventions, self.slots, steering.strength)
        self.vectors[row].copy_(vectors_of(program.interventions, self.slots))
        self.params[:, row].copy_(torch.where(acts[..., None], params, 0.0))
        return row

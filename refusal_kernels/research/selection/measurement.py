"""Measure the three selection scores of many candidates, in few and full batches, resumably.

The protocol needs three passes over a set of prompts per candidate. To save passes:

- One patch holds the ablation of every candidate; each row of a batch is routed to one of them.
- Bypass and KL need the same ablation and share batches.
- A batch holds prompts of one length, so it needs no padding and no mask.
- An addition at layer l does not change the layers before l. They run once per prompt, and all
  candidates start from the kept input of layer l. A few families run the whole model instead.
- Logits are computed at the last token only.

The batches depend only on prompts, candidates and batch size, and run in a fixed order: a resumed
run gives the same bits. Another batch size can change a score by about 1e-6.
"""

import contextlib
import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import sweep
from refusal_kernels.files.tensors import read_tensors, write_tensors
from refusal_kernels.hf.batches import Batch
from refusal_kernels.hf.forward import LAST, model_inputs, read_inputs
from refusal_kernels.hf.model import decoder_layers, input_device
from refusal_kernels.interventions import Ablate, Add
from refusal_kernels.patching.families import family_of
from refusal_kernels.patching.patch import patch
from refusal_kernels.patching.places import base_class
from refusal_kernels.progress import Progress
from refusal_kernels.research.extraction.resume import check_identity
from refusal_kernels.research.selection.replay import Replay
from refusal_kernels.research.selection.scoring import kl_divergence, refusal_score

CHECKPOINT = "refusal_kernels.selection_checkpoint"
DONE = "batches"  # how far the run has come
Row = TypeVar("Row")


@dataclass(frozen=True)
class Question:
    """What every candidate is measured on."""

    harmful: list[list[int]]  # prompts, as tokens
    harmless: list[list[int]]
    # float32 [prompts, vocabulary], harmful first: the unmodified model's logits at the last token
    unmodified: Tensor
    tokens: Sequence[int]  # the refusal tokens
    batch_size: int  # rows at once: each is one prompt under one candidate


class SelectionScores(NamedTuple):
    """Of every candidate on every prompt: float64 [candidates, prompts]."""

    bypass: Tensor
    induce: Tensor
    kl: Tensor


class _Unit(NamedTuple):
    """The rows of one forward pass: candidates, and prompts (by number) of one length."""

    candidates: list[int]
    prompts: list[int]


def same_length(ids: Sequence[Sequence[int]], batch_size: int) -> list[Batch]:
    """Batch prompts of one length each, the longest first: nothing is padded."""
    return [_batch(ids, part) for rows in _by_length(ids) for part in _even_parts(rows, batch_size)]


def _even_parts(rows: Sequence[Row], most: int) -> list[list[Row]]:
    """Cut into the fewest parts of at most `most` rows; their sizes differ by one at most."""
    count = -(-len(rows) // most)
    ends = [len(rows) * k // count for k in range(count + 1)]
    return [list(rows[a:b]) for a, b in itertools.pairwise(ends)]


def _by_length(ids: Sequence[Sequence[int]]) -> list[list[int]]:
    groups: dict[int, list[int]] = defaultdict(list)
    for row, tokens in enumerate(ids):
        groups[len(tokens)].append(row)
    return [groups[length] for length in sorted(groups, reverse=True)]


def _batch(ids: Sequence[Sequence[int]], rows: list[int]) -> Batch:
    tokens = torch.tensor([ids[row] for row in rows], dtype=torch.int64)
    return Batch(rows, tokens, torch.ones_like(tokens))


class Measurement:
    """The forward passes that measure some candidates in an unpatched model, in a fixed order."""

    def __init__(self, model: Any, question: Question, directions: Sequence[Direction]) -> None:
        self.model, self.question, self.directions = model, question, directions
        self._prompts = [*question.harmful, *question.harmless]  # harmful first
        self._harmful = len(question.harmful)
        # for every candidate and prompt: the refusal score of a harmful one, the KL of a harmless
        # one; and with the addition, the refusal score of a harmless one
        shape = len(directions), len(self._prompts)
        self._ablated = torch.full(shape, torch.nan, dtype=torch.float64)
        self._added = torch.full((shape[0], len(question.harmless)), torch.nan, dtype=torch.float64)
        everyone = list(range(len(directions)))
        self._ablations = [
            unit for rows in _by_length(self._prompts) for unit in self._units(everyone, rows)
        ]
        self._additions = [
            (batch, layer, self._units(candidates, list(range(len(batch.rows)))))
            for batch in same_length(question.harmless, question.batch_size)
            for layer, candidates in self._by_layer().items()
        ]
        units = [*self._ablations, *(u for *_, units in self._additions for u in units)]
        self._sizes = [len(unit.prompts) for unit in units]
        self.total = sum(self._sizes)  # rows: each is a prompt under a candidate's edit

    def _units(self, candidates: list[int], prompts: list[int]) -> list[_Unit]:
        pairs = [(c, p) for c in candidates for p in prompts]
        parts = _even_parts(pairs, self.question.batch_size)
        return [_Unit([c for c, _ in part], [p for _, p in part]) for part in parts]

    def _by_layer(self) -> dict[int, list[int]]:
        groups: dict[int, list[int]] = defaultdict(list)
        for number, direction in enumerate(self.directions):
            assert direction.layer is not None
            groups[direction.layer].append(number)
        return groups

    def run(
        self, checkpoint: Path | None = None, progress: Progress | None = None
    ) -> SelectionScores:
        """Run the passes that are not done, and return all scores.

        The checkpoint is read first, replaced in one step after every pass, and stays. `progress`
        is told the numbers of rows.
        """
        identity = {} if checkpoint is None else self._identity()
        done = 0 if checkpoint is None else self._load(checkpoint, identity)
        rows = sum(self._sizes[:done])
        if progress is not None and rows:
            progress(rows, self.total)
        with contextlib.closing(self._steps(done)) as steps:  # an error leaves no patch behind
            for _ in steps:
                rows += self._sizes[done]
                done += 1
                if checkpoint is not None:
                    self._save(checkpoint, identity, done)
                if progress is not None:
                    progress(rows, self.total)
        bypass, kl = self._ablated.split([self._harmful, len(self.question.harmless)], dim=1)
        return SelectionScores(bypass, self._added, kl)

    def _steps(self, done: int) -> Generator[None]:
        """Run the units after the first `done` ones."""
        if done < len(self._ablations):
            with patch(self.model, *([Ablate(d)] for d in self.directions)) as handle:
                for unit in self._ablations[done:]:
                    with handle.route(unit.candidates):
                        ids = [self._prompts[prompt] for prompt in unit.prompts]
                        self._score_ablated(unit, self._logits(ids))
                    yield
        skip = max(0, done - len(self._ablations))
        replay: Replay | None = None
        kept: tuple[Batch, dict[int, Tensor]] | None = None
        for batch, layer, units in self._additions:
            left, skip = units[skip:], max(0, skip - len(units))
            if not left:
                continue
            replay = replay or self._replay()
            if kept is None or kept[0] is not batch:  # only the streams of one batch are kept
                kept = batch, self._inputs(batch.rows, replay.layers)
            for unit in left:
                self._score_added(unit, layer, batch, kept[1], replay)
                yield

    def _replay(self) -> Replay:
        """Find, on the longest prompt, from which layers the model can be run."""
        longest = self._additions[0][0].rows[0]
        layers = {layer for layer in self._by_layer() if layer > 0}
        if family_of(base_class(decoder_layers(self.model)[0])).start:
            layers = set()  # an edit of the stream is no edit of a block's input
        try:
            inputs = self._inputs([longest], layers)
        except InputError:  # it does not call its layers in order
            inputs = {}
        if any(stream.shape[2:] != self.directions[0].vector.shape for stream in inputs.values()):
            inputs = {}  # it has several streams
        ids = self.question.harmless[longest]
        return Replay(self.model, lambda ids: self._logits([ids]), ids, inputs)

    def _inputs(self, harmless: list[int], layers: set[int]) -> dict[int, Tensor]:
        """Return the inputs of some layers on harmless prompts: [prompts, tokens, hidden] each."""
        kept: dict[int, Tensor] = {}

        def keep(layer: int, stream: Tensor) -> None:
            if layer in layers:
                kept[layer] = stream

        if layers:
            batch = _batch(self.question.harmless, harmless)
            read_inputs(self.model, batch, max(layers), keep)
        return kept

    @torch.inference_mode()
    def _logits(self, ids: Sequence[list[int]]) -> Tensor:
        """Last-token logits of prompts of one length: [prompts, vocabulary]."""
        inputs = model_inputs(_batch(ids, list(range(len(ids)))), input_device(self.model))
        logits = self.model(**inputs, use_cache=False, logits_to_keep=LAST).logits[:, -1]
        return logits.cpu() if logits.device.type == "mps" else logits  # which has no float64

    def _score_ablated(self, unit: _Unit, logits: Tensor) -> None:
        candidates, prompts = torch.tensor(unit.candidates), torch.tensor(unit.prompts)
        harmless = prompts >= self._harmful
        scores = torch.empty(len(prompts), dtype=torch.float64)
        if not harmless.all():
            scores[~harmless] = refusal_score(
                logits[~harmless.to(logits.device)], self.question.tokens
            ).cpu()
        if harmless.any():
            before = self.question.unmodified[prompts[harmless]].to(logits.device)
            scores[harmless] = kl_divergence(before, logits[harmless.to(logits.device)]).cpu()
        self._ablated[candidates, prompts] = scores

    @torch.inference_mode()
    def _score_added(
        self, unit: _Unit, layer: int, batch: Batch, streams: dict[int, Tensor], replay: Replay
    ) -> None:
        prompts = [batch.rows[place] for place in unit.prompts]
        directions = [self.directions[candidate] for candidate in unit.candidates]
        with contextlib.ExitStack() as stack:
            if layer in replay.layers:
                stream = streams[layer][unit.prompts]
                vectors = torch.stack([d.vector for d in directions])[:, None].to(stream.device)
                # in float32 and rounded once, as `Add` does
                added = (stream.float() + vectors).to(stream.dtype)
                stack.enter_context(replay.starting_at(layer, added))
            else:
                programs = sorted(set(unit.candidates))
                edits = ([Add(self.directions[c], block_input=layer)] for c in programs)
                handle = stack.enter_context(patch(self.model, *edits))
                stack.enter_context(handle.route([programs.index(c) for c in unit.candidates]))
            logits = self._logits([self.question.harmless[prompt] for prompt in prompts])
        scores = refusal_score(logits, self.question.tokens).cpu()
        self._added[torch.tensor(unit.candidates), torch.tensor(prompts)] = scores

    # --- checkpoints

    def _identity(self) -> dict[str, str]:
        """Return what the scores depend on, by the names that messages use."""
        question = self.question
        vectors = torch.stack([d.vector for d in self.directions])
        places = [(d.position, d.layer) for d in self.directions]
        prompts = json.dumps([question.harmful, question.harmless])
        return {
            "set of prompts or chat format": _digest(prompts.encode()),
            # the logits stand for the weights and everything around them
            "model, patch, machine or number of threads": _digest(question.unmodified.numpy()),
            "set of candidates": _digest(str(places).encode() + vectors.numpy().tobytes()),
            "set of refusal tokens": str(list(question.tokens)),
            "batch size": str(question.batch_size),
        }

    def _load(self, path: Path, identity: Mapping[str, str]) -> int:
        """Read a checkpoint; return how many units are done."""
        sweep(path)
        if not path.exists():
            return 0
        tensors, metadata = read_tensors(path, CHECKPOINT, ("ablated", "added"))
        done = metadata.pop(DONE, "")
        check_identity(path, identity, metadata)
        mine = self._ablated, self._added
        theirs = tensors["ablated"], tensors["added"]
        fits = all(
            a.shape == b.shape and a.dtype == b.dtype for a, b in zip(mine, theirs, strict=True)
        )
        if not fits or not done.isdecimal() or int(done) > len(self._sizes):
            raise InputError(f"{path} is no checkpoint of this run; remove it to begin anew")
        self._ablated.copy_(theirs[0])
        self._added.copy_(theirs[1])
        return int(done)

    def _save(self, path: Path, identity: Mapping[str, str], done: int) -> None:
        tensors = {"ablated": self._ablated, "added": self._added}
        write_tensors(path, CHECKPOINT, tensors, {**identity, DONE: str(done)})


def _digest(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()

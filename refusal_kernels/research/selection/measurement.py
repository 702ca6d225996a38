"""Measure the three selection scores of many candidates, in few and full batches, resumably.

The protocol needs three passes over a set of prompts per candidate. To save passes:

- One patch holds the ablation of every candidate; each row of a batch is routed to one of them.
- Bypass and KL need the same ablation and share batches.
- A batch holds prompts of one length, so it needs no padding.
- What all prompts begin with (most of the chat template) runs once per candidate, and every pass
  takes its keys and values. A model that keeps anything else of it runs whole prompts.
- An addition at layer l does not change the layers before l. They run once per prompt, and all
  candidates start from the kept input of layer l. A few families run the whole model instead.
- Logits are computed at the last token only.

The batches depend only on prompts, candidates and batch size, and run in a fixed order: a resumed
run gives the same bits. Another batch size can change a score by about 1e-6.
"""

import contextlib
import hashlib
import json
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import sweep
from refusal_kernels.files.tensors import read_tensors, write_tensors
from refusal_kernels.hf.forward import next_token_logits, read_inputs
from refusal_kernels.hf.model import decoder_layers
from refusal_kernels.hf.prefix import Prefix, run_prefix
from refusal_kernels.interventions import Ablate, Add
from refusal_kernels.patching.families import family_of
from refusal_kernels.patching.patch import patch
from refusal_kernels.patching.places import base_class
from refusal_kernels.progress import Progress
from refusal_kernels.research.extraction.resume import check_identity
from refusal_kernels.research.selection.plan import (
    Group,
    Unit,
    batch,
    by_length,
    even_parts,
    unfinished,
)
from refusal_kernels.research.selection.replay import Replay
from refusal_kernels.research.selection.scoring import kl_divergence, refusal_score

CHECKPOINT = "refusal_kernels.selection_checkpoint"
DONE = "batches"  # how far the run has come
CANDIDATES = "set of candidates"


@dataclass(frozen=True)
class Question:
    """What every candidate is measured on."""

    harmful: list[list[int]]  # prompts, as tokens
    harmless: list[list[int]]
    # float32 [prompts, vocabulary], harmful first: the unmodified model's logits at the last token
    unmodified: Tensor
    tokens: Sequence[int]  # the refusal tokens
    batch_size: int  # rows at once: each is one prompt under one candidate
    prefix: Prefix | None = None  # what all prompts begin with, in the unmodified model


class SelectionScores(NamedTuple):
    """Of every candidate on every prompt: float64 [candidates, prompts]."""

    bypass: Tensor
    induce: Tensor
    kl: Tensor


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
        self._induce = torch.full(
            (shape[0], len(question.harmless)), torch.nan, dtype=torch.float64
        )
        size, every = question.batch_size, list(range(len(self._prompts)))
        self._ablations = [
            Group.of(candidates, every, self._prompts, size)
            for candidates in even_parts(range(len(directions)), size)
        ]
        longest_first = [row for rows in by_length(question.harmless) for row in rows]
        self._additions = [
            Group.of(part, prompts, question.harmless, size, layer)
            for prompts in even_parts(longest_first, size)
            for layer, candidates in self._by_layer().items()
            for part in even_parts(candidates, size)
        ]
        units = [unit for group in (*self._ablations, *self._additions) for unit in group.units]
        self._sizes = [len(unit.prompts) for unit in units]
        self.total = sum(self._sizes)  # rows: each is a prompt under a candidate's edit

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
        return SelectionScores(bypass, self._induce, kl)

    def _steps(self, done: int) -> Generator[None]:
        """Run the units after the first `done` ones."""
        yield from self._ablate(done)
        yield from self._add(max(0, done - sum(len(group.units) for group in self._ablations)))

    def _ablate(self, done: int) -> Generator[None]:
        groups, prefix = list(unfinished(self._ablations, done)), self.question.prefix
        if not groups:
            return
        with patch(self.model, *([Ablate(d)] for d in self.directions)) as handle:
            for group in groups:
                with handle.route(group.candidates):
                    edited = prefix and run_prefix(self.model, prefix.ids, len(group.candidates))
                for unit in group.units:
                    ids = [self._prompts[prompt] for prompt in unit.prompts]
                    with handle.route(unit.candidates):
                        logits = self._logits(ids, edited, group.versions(unit))
                    self._score_ablated(unit, logits)
                    yield

    def _add(self, done: int) -> Generator[None]:
        groups, prefix = list(unfinished(self._additions, done)), self.question.prefix
        if not groups:
            return
        replay = self._replay()
        starts = self._inputs([prefix.ids], replay.layers) if prefix else {}
        prompts, streams = None, {}
        for group in groups:
            if prompts is not group.prompts:  # only the streams of these prompts are kept
                prompts = group.prompts
                ids = [self.question.harmless[prompt] for prompt in prompts]
                streams = self._inputs(ids, replay.layers, prefix)
            layer, edited = group.layer or 0, None
            if prefix:
                kept = starts[layer] * len(group.candidates) if layer in starts else None
                with self._added(replay, layer, group.candidates, kept):
                    edited = run_prefix(self.model, prefix.ids, len(group.candidates))
                edited = edited.after(layer, prefix) if kept else edited
            for unit in group.units:
                ids = [self.question.harmless[prompt] for prompt in unit.prompts]
                places = [prompts.index(prompt) for prompt in unit.prompts]
                kept = [streams[layer][place] for place in places] if layer in streams else None
                with self._added(replay, layer, unit.candidates, kept):
                    logits = self._logits(ids, edited, group.versions(unit))
                scores = refusal_score(logits, self.question.tokens).cpu()
                self._induce[torch.tensor(unit.candidates), torch.tensor(unit.prompts)] = scores
                yield

    @contextlib.contextmanager
    def _added(
        self, replay: Replay, layer: int, candidates: list[int], streams: list[Tensor] | None
    ) -> Iterator[None]:
        """Add a candidate to the input of a layer, in every row.

        From `streams`, the unmodified inputs of that layer, if it is one that can be started at.
        """
        if streams is not None:
            stream = torch.stack(streams)
            vectors = torch.stack([self.directions[c].vector for c in candidates])
            # in float32 and rounded once, as `Add` does
            added = (stream.float() + vectors[:, None].to(stream.device)).to(stream.dtype)
            with replay.starting_at(layer, added):
                yield
        else:
            programs = sorted(set(candidates))
            edits = ([Add(self.directions[c], block_input=layer)] for c in programs)
            rows = [programs.index(c) for c in candidates]
            with patch(self.model, *edits) as handle, handle.route(rows):
                yield

    def _replay(self) -> Replay:
        """Find, on the longest prompt, from which layers the model can be run."""
        longest, prefix = max(self.question.harmless, key=len), self.question.prefix
        layers = {layer for layer in self._by_layer() if layer > 0}
        if family_of(base_class(decoder_layers(self.model)[0])).start:
            layers = set()  # an edit of the stream is no edit of a block's input
        try:
            streams = self._inputs([longest], layers, prefix)
        except (InputError, ValueError):  # not called in order, or not with the batch first
            streams = {}
        if any(s.shape[1:] != self.directions[0].vector.shape for (s,) in streams.values()):
            streams = {}  # it has several streams
        inputs = {layer: stream[None] for layer, (stream,) in streams.items()}
        return Replay(self.model, lambda ids: self._logits([ids], prefix, [0]), longest, inputs)

    def _inputs(
        self, ids: Sequence[list[int]], layers: set[int], prefix: Prefix | None = None
    ) -> dict[int, list[Tensor]]:
        """Return the unmodified inputs of some layers, [tokens, hidden] for every prompt.

        After a prefix, those of the tokens that follow it.
        """
        kept: dict[int, list[Tensor]] = {layer: [torch.empty(0)] * len(ids) for layer in layers}

        def keep(layer: int, stream: Tensor) -> None:
            if layer in layers:
                for row, of_row in zip(rows, stream, strict=True):
                    kept[layer][row] = of_row

        for rows in by_length(ids) if layers else ():
            read_inputs(self.model, batch(ids, rows), max(layers), keep, prefix)
        return kept

    def _logits(
        self, ids: Sequence[list[int]], prefix: Prefix | None, versions: list[int]
    ) -> Tensor:
        """Last-token logits of prompts of one length: [prompts, vocabulary].

        After a prefix, of which each prompt takes a version.
        """
        rows = batch(ids, list(range(len(ids))))
        logits = next_token_logits(self.model, rows, prefix, versions)
        return logits.cpu() if logits.device.type == "mps" else logits  # which has no float64

    def _score_ablated(self, unit: Unit, logits: Tensor) -> None:
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
            CANDIDATES: _digest(str(places).encode() + vectors.numpy().tobytes()),
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
        differ = {name for name in identity if identity[name] != metadata.get(name)}
        if differ == {CANDIDATES} and not any(t.isnan().any() for t in tensors.values()):
            return 0  # that selection ended and told its scores: nothing is lost
        check_identity(path, identity, metadata)
        mine = self._ablated, self._induce
        theirs = tensors["ablated"], tensors["added"]
        fits = all(
            a.shape == b.shape and a.dtype == b.dtype for a, b in zip(mine, theirs, strict=True)
        )
        if not fits or not done.isdecimal() or int(done) > len(self._sizes):
            raise InputError(f"{path} is no checkpoint of this run; remove it to begin anew")
        self._ablated.copy_(theirs[0])
        self._induce.copy_(theirs[1])
        return int(done)

    def _save(self, path: Path, identity: Mapping[str, str], done: int) -> None:
        tensors = {"ablated": self._ablated, "added": self._induce}
        write_tensors(path, CHECKPOINT, tensors, {**identity, DONE: str(done)})


def _digest(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()

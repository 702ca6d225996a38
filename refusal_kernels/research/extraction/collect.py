"""Run a model over prompts and accumulate moments at the input of every decoder layer."""

import os
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from refusal_kernels.direction import Candidates, Means
from refusal_kernels.errors import InputError
from refusal_kernels.hf.batches import Batch, Batches
from refusal_kernels.hf.chat import INSTRUCTION, ChatFormat
from refusal_kernels.hf.checks import check_tokens
from refusal_kernels.hf.forward import read_inputs
from refusal_kernels.hf.model import hidden_size, input_device, layer_count
from refusal_kernels.hf.padding import fitted
from refusal_kernels.hf.prefix import Prefix, agree, common_prefix, run_prefix
from refusal_kernels.hf.served import ServedModel
from refusal_kernels.progress import Progress
from refusal_kernels.research.extraction.distributed import Team, team
from refusal_kernels.research.extraction.moments import Moments
from refusal_kernels.research.extraction.resume import Checkpoint, identity_of
from refusal_kernels.research.extraction.served import stream_served


def collect(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    positions: int | None = None,
    last_layer: int | None = None,
    batch_size: int = 64,
    group: int = 0,
    moments: Moments | None = None,
    groups: Sequence[str] = ("harmful", "harmless"),
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Moments:
    """Stream the moments of the residual stream at the last tokens of the prompts.

    It reads the input of every decoder layer (``resid_pre``), which is the embedding at layer 0.
    No activation is kept. The pass ends at the last layer's input.

    Parameters
    ----------
    model
        A transformers causal language model, or an `Engine` that reads as many positions. If it
        calls a layer repeatedly, the first call is read.
    tokenizer
        Its tokenizer, or a `ChatFormat`.
    prompts
        The instructions, without the chat format.
    positions
        How many tokens at the end of the prompt; by default all end-of-instruction tokens.
    last_layer
        The last layer to read; by default the last there is.
    batch_size
        Prompts at once. Batches are sorted by length.
    group
        Which of the groups the prompts belong to.
    moments
        A state to add to; by default a new one is made.
    groups
        The names of the groups of a new state.
    checkpoint
        The state is written to this file after every batch. If the file exists, the run resumes
        from it and gives the same bits. The file stays when the run is done.
    progress
        Called with the number of prompts done and the number of all prompts.

    Returns
    -------
    Moments
        The state; a new one is on the device of the model's embedding.

    Raises
    ------
    InputError
        If the model has no list of decoder layers, a prompt is longer than the model's limit, the
        state does not fit model and positions, or the checkpoint is damaged or of another run.
    PeerError
        If another process has stopped, or not answered in time.

    Notes
    -----
    If torch.distributed is initialized, all processes call this with the same input. Each runs its
    share of the batches, and all return the same state, bit-identical to that of one process with
    the same number of threads (`refusal_kernels.research.extraction.distributed`). Only the first
    process reads and writes the checkpoint; any number of processes can resume from it.
    """
    chat = ChatFormat.of(tokenizer)
    batches = chat.stream(prompts, batch_size)
    fresh = _new_moments(model, chat, positions, groups, last_layer)
    if moments is None:
        moments = fresh
    elif checkpoint is not None:
        raise InputError("a checkpoint holds its state; expected no moments beside it")
    elif moments.shape != fresh.shape:
        raise InputError(
            f"the moments have (layers, positions, hidden) {moments.shape}; "
            f"model and positions need {fresh.shape}"
        )
    if not 0 <= group < len(moments.groups):
        raise InputError(f"there is no group {group}; expected 0 to {len(moments.groups) - 1}")
    check_tokens(model, 0, batches.longest)
    _stream(model, [(group, batches)], moments, progress, checkpoint)
    return moments


def mean_difference(
    model: Any,
    tokenizer: Any,
    harmful: Sequence[str],
    harmless: Sequence[str],
    *,
    positions: int | None = None,
    last_layer: int | None = None,
    batch_size: int = 64,
    model_name: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Candidates:
    """Compute the candidate directions: the mean activation on harmful minus on harmless prompts.

    Parameters
    ----------
    model, tokenizer, positions, last_layer, batch_size, checkpoint
        As for `collect`.
    harmful, harmless
        The two sets of instructions.
    model_name
        Kept in the candidates.
    progress
        Called with the number of prompts done and the number of prompts in both sets.

    Returns
    -------
    Candidates
        Differences computed in float64 and rounded to float32 once, with the means of both sets.

    Raises
    ------
    InputError, PeerError
        As `collect`; also if the model gave NaN or infinity.

    Notes
    -----
    Arditi et al. 2024, section 2.3 (difference-in-means).
    """
    chat = ChatFormat.of(tokenizer)
    parts = [(i, chat.stream(p, batch_size)) for i, p in enumerate((harmful, harmless))]
    moments = _new_moments(model, chat, positions, ("harmful", "harmless"), last_layer)
    for _, batches in parts:
        check_tokens(model, 0, batches.longest)
    _stream(model, parts, moments, progress, checkpoint)
    difference = moments.compute().mean_difference
    means = Means(*(moments.mean(group).transpose(0, 1) for group in moments.groups))
    return Candidates(difference, model_name, template=chat.render(INSTRUCTION), means=means)


def layers_to_read(model: Any, last_layer: int | None) -> int:
    """Return how many layers to read, from the first to `last_layer`; None means all."""
    layers = layer_count(model)
    last = layers - 1 if last_layer is None else last_layer
    if not 0 <= last < layers:
        raise InputError(f"the last layer is {last}; expected 0 to {layers - 1}")
    return last + 1


def last_tokens(model: Any, stream: Tensor, positions: int) -> Tensor:
    """Return a layer's input at the last tokens, a view [batch, positions, hidden].

    Raises InputError if a token has several streams.
    """
    if stream.ndim != 3 or stream.shape[-1] != hidden_size(model):
        raise InputError(
            f"the blocks of {type(model).__name__} keep several streams of each token, "
            f"{list(stream.shape)}; expected one residual stream, [batch, tokens, hidden]"
        )
    return stream[:, -positions:]


def stream_prefix(
    model: Any, parts: Sequence[Batches], positions: int, layers: int
) -> Prefix | None:
    """Run once what all prompts begin with, before the positions that are read.

    None if that saves fewer tokens than it takes to try it, or if the inputs of the layers differ
    by more than rounding from those of whole passes: for the longest and the shortest prompt, in
    one batch.
    """
    most = max(parts, key=lambda batches: batches.longest)
    common = common_prefix([batches.common(positions) for batches in parts], most.longest)
    # to try it takes the prefix, and two prompts with and without it
    if len(common) * sum(batches.prompts for batches in parts) <= 4 * most.longest:
        return None
    batch = most.of(most.order[[0, -1]])

    def read(prefix: Prefix | None) -> list[Tensor]:
        inputs: list[Tensor] = []
        read_inputs(
            model, batch, layers - 1, lambda _, x: inputs.append(x[:, -positions:].clone()), prefix
        )
        return inputs

    whole = read(None)
    try:
        prefix = run_prefix(model, common)
        same = all(agree(model, a, b) for a, b in zip(whole, read(prefix), strict=True))
    except Exception:  # a family may raise anything when it is given a cache of another kind
        return None
    return prefix if same else None


def _new_moments(
    model: Any,
    chat: ChatFormat,
    positions: int | None,
    groups: Sequence[str],
    last_layer: int | None,
) -> Moments:
    positions = chat.positions if positions is None else positions
    layers = layers_to_read(model, last_layer)
    return Moments(layers, positions, hidden_size(model), groups, input_device(model))


def _stream(
    model: Any,
    parts: Sequence[tuple[int, Batches]],
    moments: Moments,
    progress: Progress | None,
    checkpoint: str | os.PathLike[str] | None,
) -> None:
    """Add the prompts of every group to the moments, from where the checkpoint ends.

    Every batch's moments are computed alone and then merged in order, so one process and several
    give the same bits.
    """
    if isinstance(model, ServedModel):
        stream_served(model, parts, moments, progress, checkpoint)
        return
    parts = [(group, fitted(model, batches)) for group, batches in parts]
    jobs = [(group, batches, i) for group, batches in parts for i in range(len(batches))]
    ends = list(accumulate(batches.size(i) for _, batches, i in jobs))
    fresh = Moments(*moments.shape, ("batch",), moments.device)
    every = [batches for _, batches in parts]
    with team(model) as processes:
        saved, done = None, 0
        prefix = stream_prefix(model, every, moments.positions, moments.layers)
        if checkpoint is not None or processes.size > 1:
            rows, ids, mask = jobs[-1][1][-1]
            _read(model, Batch(rows[:1], ids[:1], mask[:1]), fresh, prefix)
            identity = identity_of(model, parts, moments, fresh)
            saved, done = _meet(processes, identity, checkpoint, moments, len(jobs))
        if done and progress is not None:
            progress(ends[done - 1], ends[-1])
        while done < len(jobs):
            fresh.clear()
            mine = done + processes.rank
            if mine < len(jobs):
                _, batches, i = jobs[mine]
                _read(model, batches[i], fresh, prefix)
            for job, tensors in zip(jobs[done:], processes.gather(fresh.tensors), strict=False):
                moments.fold(job[0], tensors)
            done = min(done + processes.size, len(jobs))
            if saved is not None:
                saved.save(moments, done)
            if progress is not None:
                progress(ends[done - 1], ends[-1])
        processes.share(moments.tensors)


def _meet(
    processes: Team,
    identity: dict[str, str],
    checkpoint: str | os.PathLike[str] | None,
    moments: Moments,
    total: int,
) -> tuple[Checkpoint | None, int]:
    """Agree on the run; return the checkpoint (first process only) and the batches done."""
    saved, done, error = None, 0, None
    if checkpoint is not None and processes.rank == 0:
        saved = Checkpoint(checkpoint, identity)
        try:
            done = saved.load(moments, total)
            saved.save(moments, done)  # fail before the work if the file cannot be written
        except InputError as refused:
            error = str(refused)
    everyone = processes.everyone((identity, done, error))
    theirs, done, error = everyone[0]
    if error is not None:
        raise InputError(error)
    for rank, (other, _, _) in enumerate(everyone):
        if differ := sorted(name for name in theirs if theirs[name] != other[name]):
            raise InputError(f"the processes 0 and {rank} have another {', '.join(differ)}")
    return saved, done


def _read(model: Any, batch: Batch, moments: Moments, prefix: Prefix | None) -> None:
    """Add the last tokens of every layer's input to a state with one group."""
    mask = batch.attention_mask[:, -moments.positions :]
    slots = torch.arange(mask.shape[1]) + moments.positions - mask.shape[1]
    index = slots.where(mask.bool(), -1).to(moments.device, torch.int32)
    group = torch.zeros(len(mask), dtype=torch.int32, device=moments.device)

    def read(layer: int, stream: Tensor) -> None:
        last = last_tokens(model, stream, moments.positions)
        last = last.to(moments.device)  # a view on one device
        moments.update(layer, last, index, group)

    read_inputs(model, batch, moments.layers - 1, read, prefix)

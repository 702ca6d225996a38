"""Moments from an engine: its workers accumulate them, and their state comes back."""

import os
from collections.abc import Sequence

from refusal_kernels.errors import InputError
from refusal_kernels.hf.batches import Batches
from refusal_kernels.hf.served import ServedModel
from refusal_kernels.progress import Progress
from refusal_kernels.research.extraction.moments import Moments
from refusal_kernels.research.extraction.resume import Checkpoint, identity_of

PROMPTS = 4096  # between two checkpoints, each of which waits for the last of them


def stream_served(
    model: ServedModel,
    parts: Sequence[tuple[int, Batches]],
    moments: Moments,
    progress: Progress | None,
    checkpoint: str | os.PathLike[str] | None,
) -> None:
    """Add the prompts of every group to the moments, from where the checkpoint ends.

    All prompts are sent at once; with a checkpoint the state comes back after some thousands.

    Raises
    ------
    InputError
        If the engine reads fewer positions, or has not read all of them once, or the checkpoint is
        damaged or of another run.
    """
    if moments.positions > model.positions:
        raise InputError(
            f"the engine reads {model.positions} positions, and {moments.positions} are asked for; "
            "start it with as many"
        )
    asked = [(group, batches.ids(i)) for group, batches in parts for i in range(batches.prompts)]
    fresh = Moments(*moments.shape, moments.groups, moments.device)
    done, saved = 0, None
    if checkpoint is not None:
        _read(model, asked[:1], fresh, None)
        saved = Checkpoint(checkpoint, identity_of(model, parts, moments, fresh))
        done = saved.load(moments, len(asked))
        saved.save(moments, done)  # fail before the work if the file cannot be written
    step = len(asked) if saved is None else PROMPTS
    while done < len(asked):
        part, before = asked[done : done + step], done

        def told(now: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + now, len(asked))

        _read(model, part, fresh, told)
        moments.merge(fresh)
        done += len(part)
        if saved is not None:
            saved.save(moments, done)


def _read(
    model: ServedModel,
    asked: Sequence[tuple[int, list[int]]],
    into: Moments,
    progress: Progress | None,
) -> None:
    """Overwrite a state with the moments of some prompts, each with its group."""
    groups = [group for group, _ in asked]
    places = sorted(set(groups))
    state = model.moments([ids for _, ids in asked], [places.index(g) for g in groups], progress)
    into.clear()
    for mine, theirs in zip(into.tensors, state, strict=True):
        for place, group in enumerate(places):
            mine[:, group] = theirs[: into.layers, place, -into.positions :]
    for group in places:
        for position in range(into.positions):
            wanted = sum(len(ids) >= into.positions - position for g, ids in asked if g == group)
            seen = into.tensors[0][:, group, position]
            if not (seen == wanted).all():
                raise InputError(
                    f"the engine read position {position - into.positions} of {seen.tolist()} "
                    f"prompts at its layers; expected {wanted}"
                )

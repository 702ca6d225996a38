"""Orthogonalize a checkpoint tensor by tensor, without loading the model.

The result is built in a hidden folder beside the target and renamed when it is complete. An
interrupted run leaves that folder, and the next run reuses the files whose digest matches.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import check_new, check_space, read_json, write_json
from refusal_kernels.progress import Progress
from refusal_kernels.weights.checkpoint_plan import (
    CheckpointPlan,
    build_on_meta,
    make_plan,
    read_config,
    untied_config,
)
from refusal_kernels.weights.projection import unit
from refusal_kernels.weights.shard_writer import CHUNK, ShardWriter
from refusal_kernels.weights.shards import INDEX, Shard, other_files, read_shards

try:
    import fcntl
except ImportError:  # not a POSIX system: two runs at once are not kept apart
    fcntl = None  # type: ignore[assignment]

VERSION = 1  # of the computation: files of an interrupted run of another version are not reused
STATE = ".state.json"


@dataclass(frozen=True)
class OrthogonalizedCheckpoint:
    """What was written."""

    target: Path
    edited: list[str]  # tensors; the bytes of all others are unchanged
    untied: bool  # whether the output matrix was the embedding and is now a separate tensor
    unread: list[str]  # unedited tensors that transformers does not read
    unproved: list[str]  # as in `Orthogonalized`
    left_out: list[str]  # files of weights, other or not in the index: neither edited nor copied
    resumed: int  # files reused from an interrupted run


@torch.no_grad()
def orthogonalize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    direction: Direction,
    *,
    text_only: bool = False,
    progress: Progress | None = None,
) -> OrthogonalizedCheckpoint:
    """Write a copy of a checkpoint that cannot write along a direction.

    The tensors are bit-identical to those of `orthogonalize` and ``save_pretrained``. At most one
    tensor is in memory at a time, and only some rows of an embedding. The source is only read.

    Parameters
    ----------
    source
        A folder with a transformers checkpoint in safetensors, in one file or many.
    target
        The folder to make; it must not exist. Tokenizer, chat template, configurations and code
        are copied.
    direction
        The direction; its norm does not matter.
    text_only
        As for `orthogonalize`.
    progress
        Called with the number of bytes done and the number of all bytes.

    Returns
    -------
    OrthogonalizedCheckpoint

    Raises
    ------
    InputError
        If the target exists or cannot be written, the disk is too small, the checkpoint is damaged,
        quantized or does not match its configuration, its family needs remote code, or the edit
        would not be ablation (as `orthogonalize`). Nothing is written then.

    Notes
    -----
    An interrupted run leaves ``.NAME.partial`` beside the target. A run with the same source and
    direction reuses its finished files after comparing their SHA-256; any other run starts over.
    The result is byte-identical.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise InputError(f"{source} is not there; expected a folder with a checkpoint")
    check_new(target)
    if target.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{target} lies in {source}, which is only read; expected another place")
    shards = read_shards(source)
    plan = make_plan(source, shards, direction, text_only)
    if plan.head is not None:
        _check_untied(source, len(plan.axes))
    along, left_out = other_files(source)
    named = {shard.name for shard in shards} | {INDEX}
    partial = target.with_name(f".{target.name}.partial")
    key = _key(source, shards, direction, plan)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_space(target.parent, partial, shards)
        partial.mkdir(exist_ok=True)
        with _locked(partial):
            resumed = _write_all(partial, source, shards, plan, direction, key, along, progress)
            (partial / STATE).unlink()
            _sync(partial)
            partial.rename(target)
            _sync(target.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(f"{target} cannot be written: {error.strerror or error}") from error
    return OrthogonalizedCheckpoint(
        target,
        list(plan.axes),
        plan.head is not None,
        plan.unread,
        plan.unproved,
        [name for name in left_out if name not in named],
        resumed,
    )


def _check_untied(source: Path, tensors: int) -> None:
    """Check that the new configuration does not tie the two matrices when it is loaded."""
    config = read_config(source, tensors)
    for part in {id(c): c for c in (config, config.get_text_config(decoder=True))}.values():
        part.tie_word_embeddings = False
    model = build_on_meta(config)
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        raise InputError(f"{type(model).__name__} ties its embeddings whatever its config says")


def _check_space(where: Path, partial: Path, shards: list[Shard]) -> None:
    there = sum(path.stat().st_size for path in partial.glob("*") if path.is_file())
    largest = max(entry.size for shard in shards for entry in shard.entries)
    needed = sum(shard.size for shard in shards) + largest - there
    check_space(where, needed)


def _key(source: Path, shards: list[Shard], direction: Direction, plan: CheckpointPlan) -> str:
    """Return a digest of what the files depend on: a run with another key cannot reuse them."""
    said = [VERSION, str(source.resolve()), [shard.key() for shard in shards]]
    said += [sorted(plan.axes.items()), plan.head]
    digest = hashlib.sha256(json.dumps(said).encode())
    digest.update(unit(direction).numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the lock ends with the process."""
    number = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"another run is writing {folder}; wait for it, or choose another folder"
                ) from None
        yield
    finally:
        os.close(number)


def _write_all(
    partial: Path,
    source: Path,
    shards: list[Shard],
    plan: CheckpointPlan,
    direction: Direction,
    key: str,
    along: list[str],
    progress: Progress | None,
) -> int:
    """Write all files; return the number of reused shards."""
    done = _taken_over(partial, key)
    resumed = len(done)
    home = next(
        (s.name for s in shards if plan.head and any(e.name == plan.head[1] for e in s.entries)), ""
    )
    total, sofar = sum(shard.size for shard in shards), 0
    for shard in shards:
        if shard.name not in done:
            added = plan.head if shard.name == home else None
            with _whole(partial / shard.name) as file:
                writer = ShardWriter(file, shards, plan, unit(direction))
                for size in writer.write(shard, added):
                    sofar += size
                    if progress is not None:
                        progress(min(sofar, total), total)
            done[shard.name] = writer.digest.hexdigest()
            write_json(partial / STATE, {"key": key, "done": done})
        else:
            sofar += shard.size
    for name in along:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        with open(source / name, "rb") as read, _whole(partial / name) as file:
            shutil.copyfileobj(read, file, CHUNK)
    if (source / INDEX).exists():
        document = read_json(source / INDEX)
        _copy_json(source / INDEX, partial / INDEX, _with_head(document, plan, shards, home))
    if plan.head is not None:
        config = read_json(source / "config.json")
        _copy_json(source / "config.json", partial / "config.json", untied_config(config))
    return resumed


def _taken_over(partial: Path, key: str) -> dict[str, str]:
    """Return an interrupted run's finished files with their digests; remove all others."""
    state: Any = None
    with contextlib.suppress(InputError):  # none, or half a one
        state = read_json(partial / STATE)
    state = state if isinstance(state, dict) and state.get("key") == key else {}
    said = state.get("done") if isinstance(state.get("done"), dict) else {}
    done = {
        name: digest
        for name, digest in (said or {}).items()
        if Path(name).name == name and _digest(partial / name) == digest
    }
    for path in partial.iterdir():
        if path.name in done or (done and path.name == STATE):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return done


def _digest(path: Path) -> str | None:
    if path.is_symlink() or not path.is_file():
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that gets its name when it is complete on disk."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _with_head(document: Any, plan: CheckpointPlan, shards: list[Shard], home: str) -> Any:
    """Return the index, with the output matrix if that is a new tensor."""
    if plan.head is None or plan.head[0] in document["weight_map"]:
        return document
    (size,) = (e.size for s in shards for e in s.entries if e.name == plan.head[1])
    metadata = document.get("metadata")
    if isinstance(metadata, dict) and isinstance(metadata.get("total_size"), int):
        document = {**document, "metadata": {**metadata}}
        document["metadata"]["total_size"] += size
    return {**document, "weight_map": {**document["weight_map"], plan.head[0]: home}}


def _copy_json(source: Path, target: Path, document: Any) -> None:
    """Write a document; copy the source's bytes if it is the same document."""
    if document == read_json(source):
        text = source.read_bytes()
    else:
        text = (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
    with _whole(target) as file:
        file.write(text)

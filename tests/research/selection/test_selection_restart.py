"""A selection that is killed goes on where it was, and ends with the bits of an undisturbed one."""

import copy
import random
import signal
import time
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from tiny import full, tiny_model, tiny_tokenizer

from refusal_kernels import toy
from refusal_kernels.direction import Candidates
from refusal_kernels.errors import InputError
from refusal_kernels.files.tensors import read_tensors, write_tensors
from refusal_kernels.hf.load import load
from refusal_kernels.research.extraction.collect import mean_difference
from refusal_kernels.research.selection import measurement
from refusal_kernels.research.selection.algorithm import Selection, select
from refusal_kernels.research.selection.measurement import CHECKPOINT

HARMFUL = ["curse the lamp", "tell me how to hex a boat now please", "storm", "hex tea one two"]
HARMLESS = ["make tea", "please be kind and fix the box", "what is one plus two", "paint a cake"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: Any) -> Path:
    """Candidates of the toy model, and some of its prompts: a tenth of them is for validation."""
    path: Path = tmp_path_factory.mktemp("inputs")
    model, tokenizer = load("toy", "cpu", "auto")
    prompts = {name: list(toy.prompts(name, "train")[:80]) for name in ("harmful", "harmless")}
    candidates = mean_difference(model, tokenizer, **prompts)
    candidates.save(path / "candidates.safetensors")
    for name, some in prompts.items():
        (path / f"{name}.txt").write_text("\n".join(some))
    return path


def command(inputs: Path, folder: Path) -> list[str]:
    options = {
        "candidates": inputs / "candidates.safetensors",
        "harmful": inputs / "harmful.txt",
        "harmless": inputs / "harmless.txt",
        "batch-size": 8,
        "out": folder / "direction.safetensors",
        "json": folder / "selection.json",
    }
    return ["select", *(str(x) for key, value in options.items() for x in (f"--{key}", value))]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def start(inputs: Path, folder: Path) -> Any:
    return forks.start("command_line", command(inputs, folder), None)[0]


def finish(inputs: Path, folder: Path) -> dict[str, bytes]:
    """Run the command to its end; return what is in the folder then."""
    process = start(inputs, folder)
    process.join()
    assert process.exitcode == 0
    return contents(folder)


@pytest.mark.parametrize("kills", [2, full(10)])
def test_killed_at_random(inputs: Path, tmp_path: Path, kills: int) -> None:
    begin = time.monotonic()
    whole = finish(inputs, tmp_path / "reference")
    seconds = time.monotonic() - begin
    assert set(whole) == {"direction.safetensors", "direction.png", "selection.json"}

    chance, middle = random.Random(0), 0
    for number in range(kills):
        folder = tmp_path / str(number)
        part = folder / "direction.part.safetensors"
        process = start(inputs, folder)
        if number % 2:  # at any moment at all; else at one after the first scores are there
            time.sleep(chance.uniform(0.0, seconds))
        else:
            while not part.exists() and not (folder / "selection.json").exists():
                time.sleep(0.001)
            time.sleep(chance.uniform(0.0, seconds / 4))
        process.kill()  # SIGKILL, unless it has ended already
        process.join()
        killed = process.exitcode == -signal.SIGKILL
        left = contents(folder) if folder.exists() else {}
        for name in set(left) & set(whole):
            assert left[name] == whole[name]  # whole, if it is there at all
        if killed and part.exists():
            done = read_tensors(part, CHECKPOINT, ("ablated", "added"))[1]["batches"]
            middle += int(done) > 0 and "direction.safetensors" not in left

        assert finish(inputs, folder) == whole  # and nothing beside it
    assert middle >= kills // 3


# --- what a checkpoint holds, and whose it is


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen3", num_hidden_layers=5)


@pytest.fixture(scope="module")
def candidates(model: Any) -> torch.Tensor:
    return 3 * mean_difference(model, tiny_tokenizer(), HARMFUL, HARMLESS).vectors


def run(model: Any, candidates: torch.Tensor, *prompts: list[str], **options: Any) -> Selection:
    options = {
        "refusal_tokens": [7, 9], "kl_threshold": 1e9, "induce_threshold": -1e9, "batch_size": 3,
        **options,
    }  # fmt: skip
    prompts = prompts or (HARMFUL, HARMLESS)
    return select(model, tiny_tokenizer(), Candidates(candidates), *prompts, **options)


class Stopped(Exception):
    pass


def stop_after(rows: int) -> Any:
    def progress(done: int, total: int) -> None:
        if done >= rows:
            raise Stopped

    return progress


@pytest.mark.parametrize("rows", [3, 50, 96, 97, 120, 143])
def test_nothing_is_measured_twice(
    model: Any, candidates: torch.Tensor, tmp_path: Path, rows: int
) -> None:
    expected = run(model, candidates).to_dict()
    file = tmp_path / "scores.safetensors"
    with pytest.raises(Stopped):
        run(model, candidates, checkpoint=file, progress=stop_after(rows))
    counts = []
    for checkpoint in (file, str(file)):
        counts.append(calls := list[int]())
        progress = lambda done, _, calls=calls: calls.append(done)  # noqa: E731
        selection = run(model, candidates, checkpoint=checkpoint, progress=progress)
        assert selection.to_dict() == expected  # to the last bit
        assert file.exists()  # it is the caller's
    calls, again = counts
    assert rows <= calls[0] < rows + 3 and calls[-1] == 144 and len(calls) == len(set(calls))
    assert again == [144]


def test_an_error_leaves_no_patch_behind(model: Any, candidates: torch.Tensor) -> None:
    for rows in (3, 120):
        with pytest.raises(Stopped):
            run(model, candidates, progress=stop_after(rows))
        run(model, candidates)  # a patched model would be refused


def test_thresholds_are_no_part_of_the_scores(
    model: Any, candidates: torch.Tensor, tmp_path: Path, monkeypatch: Any
) -> None:
    file = tmp_path / "scores.safetensors"
    run(model, candidates, checkpoint=file)
    monkeypatch.setattr(measurement.Measurement, "_logits", None)  # nothing is run again
    run(model, candidates, checkpoint=file, kl_threshold=1e8)


def test_a_checkpoint_of_another_run_is_refused(
    model: Any, candidates: torch.Tensor, tmp_path: Path
) -> None:
    file = tmp_path / "scores.safetensors"
    run(model, candidates, checkpoint=file)
    before = file.read_bytes()
    other = copy.deepcopy(model)
    other.model.layers[2].mlp.down_proj.weight.data[0, 0] += 0.1
    cases: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("model, patch, machine or number of threads", (other, candidates), {}),
        ("set of prompts or chat format", (model, candidates, HARMFUL, HARMLESS[::-1]), {}),
        ("set of refusal tokens", (model, candidates), {"refusal_tokens": [7]}),
        ("batch size", (model, candidates), {"batch_size": 4}),
    ]
    for what, arguments, options in cases:
        with pytest.raises(InputError, match=rf"another .*{what}.*; remove it to begin anew"):
            run(*arguments, checkpoint=file, **options)
        assert file.read_bytes() == before


def test_other_candidates_begin_anew_where_the_selection_had_ended(
    model: Any, candidates: torch.Tensor, tmp_path: Path
) -> None:
    file = tmp_path / "scores.safetensors"
    with pytest.raises(Stopped):
        run(model, candidates, checkpoint=file, progress=stop_after(20))
    with pytest.raises(InputError, match="another set of candidates; remove it"):
        run(model, candidates, checkpoint=file, prune_last=0.6)
    run(model, candidates, checkpoint=file)
    assert run(model, candidates, checkpoint=file, prune_last=0.6).to_dict() == (
        run(model, candidates, prune_last=0.6).to_dict()
    )


def test_what_is_no_checkpoint_is_refused(
    model: Any, candidates: torch.Tensor, tmp_path: Path
) -> None:
    file = tmp_path / "scores.safetensors"
    run(model, candidates, checkpoint=file)
    tensors, metadata = read_tensors(file, CHECKPOINT, ("ablated", "added"))
    whole = file.read_bytes()
    for wrong in ({"batches": "many"}, {"batches": "100000"}, {"batches": "-1"}):
        write_tensors(file, CHECKPOINT, tensors, {**metadata, **wrong})
        with pytest.raises(InputError, match="is no checkpoint of this run"):
            run(model, candidates, checkpoint=file)
    write_tensors(file, CHECKPOINT, {**tensors, "added": tensors["added"][:1].clone()}, metadata)
    with pytest.raises(InputError, match="is no checkpoint of this run"):
        run(model, candidates, checkpoint=file)
    write_tensors(file, "refusal_kernels.direction", tensors, metadata)
    with pytest.raises(InputError, match=f"expected {CHECKPOINT}"):
        run(model, candidates, checkpoint=file)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged"):
        run(model, candidates, checkpoint=file)

"""Several processes that share the batches: the bits of one, and no end in silence."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forks
import pytest
import torch

from refusal_kernels import toy
from refusal_kernels.research.extraction.distributed import team
from refusal_kernels.research.extraction.moments import Moments

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")
PROMPTS = list(toy.prompts("harmful", "train")[:50])  # 4 at once: 13 batches


def together(size: int, folder: Path, **task: Any) -> list[Any]:
    """What each of several processes comes to; None for one that says nothing."""
    store = str(folder / f"store{len(os.listdir(folder))}")
    children = [
        forks.start("member", rank, size, store, {"prompts": PROMPTS, **task})
        for rank in range(size)
    ]
    found = []
    for process, listen in children:
        if task.get("stop") == "hang" and process is children[-1][0]:
            process.kill()
        process.join(100)
        assert process.exitcode is not None, "it hangs"
        found.append(next(iter(forks.everything(listen)), None))
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: Any) -> Any:
    return together(1, tmp_path_factory.mktemp("alone"))[0]


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_have_the_bits_of_one(alone: Any, tmp_path: Path, size: int) -> None:
    assert isinstance(alone, list)
    for state in together(size, tmp_path):
        assert state == alone


def test_a_checkpoint_goes_on_with_any_number_of_processes(alone: Any, tmp_path: Path) -> None:
    checkpoint = str(tmp_path / "state.safetensors")
    done = []
    for size, stop_at in ((2, 2), (1, 3), (3, 1)):
        together(size, tmp_path, checkpoint=checkpoint, stop="end", stop_at=stop_at)
        done.append(int(Moments.load(checkpoint).metadata["batches"]))
    # the batches of whole rounds, and those of one more by the time that the last process ends
    assert done == [2, 4, 4]
    assert together(2, tmp_path, checkpoint=checkpoint) == [alone, alone]


@pytest.mark.parametrize("stop", ["end", "hang"])
def test_a_process_that_stops_ends_the_others(tmp_path: Path, stop: str) -> None:
    checkpoint = str(tmp_path / "state.safetensors")
    first, last = together(2, tmp_path, stop=stop, stop_at=4, timeout_s=4, checkpoint=checkpoint)
    assert last is None
    assert first[0] == "PeerError" and "process 0 of 2: another has stopped" in first[1]
    assert Moments.load(checkpoint).metadata["batches"] == "6"  # whole, and what was agreed on


def test_processes_that_differ_are_refused(tmp_path: Path) -> None:
    for kind, text in together(2, tmp_path, others=PROMPTS[1:]):
        assert kind == "InputError"
        assert "processes 0 and 1 have another" in text and "set of prompts" in text


def test_what_the_first_refuses_all_refuse(tmp_path: Path) -> None:
    checkpoint = tmp_path / "state.safetensors"
    checkpoint.write_bytes(b"not a state")
    for kind, text in together(2, tmp_path, checkpoint=str(checkpoint)):
        assert kind == "InputError" and "damaged" in text


def test_a_model_that_is_spread_over_the_processes_is_not_split(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with team(SimpleNamespace(parameters=list, tp_size=2)) as found:
        assert (found.rank, found.size) == (0, 1)


@pytest.mark.full
def test_torchrun(tmp_path: Path) -> None:
    """The command line, as it is typed, against one process of it."""
    command = ["-m", "refusal_kernels", "extract", "--batch-size", "16", "--last-layer", "2"]
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *run, *command, "--out", str(tmp_path / "two.safetensors")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written: ") == 1  # by the first process alone
    process, _ = forks.start(
        "command_line", [*command[2:], "--out", str(tmp_path / "one.safetensors")], None
    )
    process.join()
    assert sorted(os.listdir(tmp_path)) == ["one.safetensors", "two.safetensors"]
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_peak_memory_does_not_grow_with_the_prompts() -> None:
    peaks = []
    for count in (200, 2000):
        process, listen = forks.start("peak_of_collecting", count)
        process.join()
        peaks += forks.everything(listen)
    # the last tokens of 1800 more prompts, at 7 layers, in float32: 19 MB. What is kept of them,
    # 4 bytes a token: 0.1 MB; the rest is what an allocator may do.
    assert abs(peaks[1] - peaks[0]) < 6e6

"""`extract`, killed at any moment: the next run goes on, and ends in the same bytes."""

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import forks
import pytest
from tiny import full

from refusal_kernels.research.extraction.moments import Moments

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills and forks")
TOTAL = 2 * 29  # batches: 456 harmful and 456 harmless prompts, 16 at once


class Run:
    """A child that extracts, and what it says of its batches."""

    def __init__(
        self, folder: Path, die_at: tuple[str, int] | None = None, last_layer: int = 2
    ) -> None:
        out = ["--out", str(folder / "candidates.safetensors")]
        arguments = ["extract", *out, "--batch-size", "16", "--last-layer", str(last_layer)]
        self.process, self.listen = forks.start("command_line", arguments, die_at)

    def begun(self) -> int:
        """Wait for the end; return the number of batches that were begun (the probe is none)."""
        self.process.join()
        return sum(prompts > 1 for prompts in forks.everything(self.listen))


def done(folder: Path) -> int:
    """How many batches a checkpoint holds; it must be whole."""
    path = folder / "candidates.part.safetensors"
    return int(Moments.load(path).metadata["batches"]) if path.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: Any) -> tuple[bytes, float]:
    """The bytes of a run that nobody disturbs, and how long its batches take."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Run(folder)
    assert run.listen.poll(60)
    start = time.perf_counter()
    assert run.begun() == TOTAL and run.process.exitcode == 0
    seconds = time.perf_counter() - start
    assert os.listdir(folder) == ["candidates.safetensors"]
    return (folder / "candidates.safetensors").read_bytes(), seconds


def check_and_finish(folder: Path, begun: int, expected: bytes) -> int:
    """What a killed run left is whole, and the next one ends as if nothing had been."""
    out = folder / "candidates.safetensors"
    assert not out.exists() or out.read_bytes() == expected
    before = done(folder)
    if not out.exists():
        assert begun - 1 <= before <= begun  # at most one batch is lost
    again = Run(folder)
    assert again.begun() == TOTAL - before and again.process.exitcode == 0
    assert out.read_bytes() == expected
    assert os.listdir(folder) == ["candidates.safetensors"]  # nothing is left lying about
    return before


@pytest.mark.parametrize("kills", [2, full(10)])
def test_killed_at_random(undisturbed: tuple[bytes, float], tmp_path: Path, kills: int) -> None:
    expected, seconds = undisturbed
    moments = random.Random(0)
    amid = 0
    for number in range(kills):
        folder = tmp_path / str(number)
        folder.mkdir()
        run = Run(folder)
        assert run.listen.poll(60)
        time.sleep(moments.uniform(0, 0.9) * seconds)
        run.process.kill()  # SIGKILL
        before = check_and_finish(folder, run.begun(), expected)
        amid += 0 < before < TOTAL
    assert amid >= kills // 3  # else the moments were no test


@pytest.mark.parametrize(
    "die_at",
    [
        ("half-way through the file", 1),
        ("half-way through the file", 20),
        full(("half-way through the file", TOTAL + 2)),  # the candidates
        full(("before the rename", 1)),
        ("before the rename", 20),
        full(("after the rename", 20)),
        full(("before the rename", TOTAL + 2)),
        ("after the rename", TOTAL + 2),
        ("before the checkpoint is removed", 1),
    ],
)
def test_killed_at_the_worst_moments(
    undisturbed: tuple[bytes, float], tmp_path: Path, die_at: tuple[str, int]
) -> None:
    run = Run(tmp_path, die_at)
    begun = run.begun()
    assert run.process.exitcode == -signal.SIGKILL
    check_and_finish(tmp_path, begun, undisturbed[0])


def test_killed_again_and_again(undisturbed: tuple[bytes, float], tmp_path: Path) -> None:
    for number in (12, 9, 3, 30):
        run = Run(tmp_path, ("before the rename", number))
        begun = run.begun()
        assert run.process.exitcode == -signal.SIGKILL
    check_and_finish(tmp_path, done(tmp_path) + (begun > 0), undisturbed[0])


@pytest.mark.parametrize("last_layer", [1, full(8)])
def test_another_run_is_refused_and_nothing_is_lost(
    undisturbed: tuple[bytes, float], tmp_path: Path, last_layer: int
) -> None:
    begun = Run(tmp_path, ("after the rename", 20)).begun()
    state = tmp_path / "candidates.part.safetensors"
    before = state.read_bytes()
    other = Run(tmp_path, last_layer=last_layer)
    assert other.begun() == 0 and other.process.exitcode == 2
    assert os.listdir(tmp_path) == [state.name] and state.read_bytes() == before
    check_and_finish(tmp_path, begun, undisturbed[0])

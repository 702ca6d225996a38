"""Files from anyone: refused in one line, nothing run, little memory taken."""

import io
import json
import os
import random
import resource
import struct
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import MARK, Runs, hostile_files, mutated, rebuilt, torch_zip
from readers import read
from safetensors.torch import save_file

from refusal_kernels.direction import Candidates, Direction
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import read_json
from refusal_kernels.files.control_vector import ControlVector
from refusal_kernels.research import plots
from refusal_kernels.research.extraction.moments import Moments
from refusal_kernels.research.reproduction.rows import RecordedRow, compare, recorded

HIDDEN = 16


def make_moments(path: Path) -> None:
    moments = Moments(2, 3, HIDDEN)
    moments.update(
        0, torch.randn(2, 3, HIDDEN), torch.tensor([[0, 1, 2]] * 2), torch.tensor([0, 1])
    )
    moments.metadata = {"done": "2"}
    moments.save(path)


def make_text(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content, encoding="utf-8") and None


VECTOR = torch.linspace(-1.0, 1.0, HIDDEN)
DIRECTION = Direction(VECTOR, "org/model", 3, -1)
CANDIDATES = VECTOR.expand(2, 3, HIDDEN).contiguous()
SELECTION = json.dumps({
    "scores": [
        {"position": -1, "layer": 1, "bypass": 0.5, "induce": None, "kl": 0.1, "discarded": None}
    ],
    "refusal_tokens": [3], "position": -1, "layer": 1, "bypass": 0.5,
})  # fmt: skip


# name of the file: how to write a good one
READABLE: dict[str, Callable[[Path], None]] = {
    "direction.safetensors": DIRECTION.save,
    "candidates.safetensors": Candidates(CANDIDATES, "m").save,
    "moments.safetensors": make_moments,
    "plain.gguf": ControlVector.of(DIRECTION, "add", (2, 3)).save,
    "glp.glp": lambda path: ControlVector.of(DIRECTION, "ablate", (2, 3)).save(path, glp=True),
    "direction.pt": lambda path: torch.save(VECTOR, path),
    "mean_diffs.pt": lambda path: torch.save(CANDIDATES, path),
    "a.json": make_text('["one", {"prompt": "two", "n": [1.5e3, null]}]'),
    "a.jsonl": make_text('"one"\n{"instruction": "t\\u00e9a", "x": {}}\n'),
    "a.csv": make_text('goal,target\n"one, two",x\nthree,"y\nz"\n'),
    "a.txt": make_text("one\ntwo\n\nthr\u00e9e\n"),
    "pairs.jsonl": make_text('{"prompt": "a", "answer": "b"}\n'),
    "texts.jsonl": make_text('"one"\n{"text": "two"}\n'),
    "selection.json": make_text(SELECTION),
    "row.json": recorded({"bypass_score": -4.0, "substring_asr_ablation": 1.0}, "a", "b").save,
    "document.json": make_text('{"weight_map": {"a": "b.safetensors"}, "n": -1}'),
}


def is_valid(content: Any) -> bool:
    if isinstance(content, Direction):
        return bool(content.vector.isfinite().all())
    if isinstance(content, Candidates):
        return content.vectors.ndim == 3 and content.vectors.dtype == torch.float32
    if isinstance(content, ControlVector):
        return all(is_valid(direction) for direction in content.directions)
    if isinstance(content, list):
        texts = [text for row in content for text in (row if isinstance(row, tuple) else (row,))]
        return bool(content) and all(isinstance(text, str) and text.strip() for text in texts)
    if isinstance(content, RecordedRow):
        return all(c.to_dict() for c in compare({"bypass_score": -4.0}, [content]))
    if isinstance(content, dict) and "refusal_tokens" in content:
        plots.plot_candidates(
            io.BytesIO(), content["candidates"], (content["position"], content["layer"])
        )
    return isinstance(content, Moments | dict | int | float | str | None)


def check(path: Path) -> bool:
    """Read; return whether it was refused."""
    try:
        assert is_valid(read(path))
    except InputError as error:
        message = str(error)
        assert message.isprintable() and len(message) < 2100 and path.name in message
        return True
    return False


@pytest.mark.parametrize("name", READABLE)
def test_damaged_files_read_to_something_valid_or_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    READABLE[name](path)
    assert not check(path)
    good, refused = path.read_bytes(), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(400):
        path.write_bytes(mutated(good, random.Random(f"{name} {seed}")))
        refused += check(path)
    assert refused > 10
    for size in range(0, len(good), max(1, len(good) // 50)):  # and cut off
        path.write_bytes(good[:size])
        check(path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000  # KiB


# Each is read in a process of its own that cannot take more than 1.5 GiB beyond what the imports
# have taken, and that says how much it took.
READ_THEM = textwrap.dedent(
    """
    import resource, sys
    from pathlib import Path
    import torch, gguf
    from readers import read
    from refusal_kernels.errors import InputError

    torch.set_num_threads(1)

    def status(name):  # KiB; getrusage would begin with the parent's peak
        text = Path("/proc/self/status").read_text()
        return int(text.split(name + ":")[1].split()[0])

    resource.setrlimit(resource.RLIMIT_AS, (1024 * status("VmSize") + (3 << 29),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
    for name in sys.argv[1:]:
        path = Path(name)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = status("VmRSS")
        except OSError:  # some sandboxes have no such file: what is beyond the last peak
            before = status("VmHWM")
        try:
            print(path.name, "READ", repr(read(path))[:100], flush=True)
        except InputError as error:
            assert str(error).isprintable(), name
            grown = max(0, status("VmHWM") - before)
            print(path.name, "refused", grown, str(error)[:300], flush=True)
    """
)


@pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc are Linux's")
def test_files_built_to_harm_are_refused(tmp_path: Path) -> None:
    hostile = hostile_files()
    for name, content in hostile.items():
        path = tmp_path / name
        if callable(content):
            content(path)
        else:
            path.write_bytes(content)
    (tmp_path / f"{MARK}.txt").unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", READ_THEM, *hostile],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    lines = {line.split()[0]: line.split(maxsplit=3)[1:] for line in done.stdout.splitlines()}
    assert done.returncode == 0, (done.stdout[-500:], done.stderr[-2000:])
    assert list(lines) == list(hostile)
    assert [name for name, (verdict, *_) in lines.items() if verdict != "refused"] == []
    grown = {name: int(peak) for name, (_, peak, _) in lines.items()}  # KiB
    assert grown["many.json"] > 50_000  # the gauge is not blind: this file has 60 MB
    assert {name: peak for name, peak in grown.items() if peak > 400_000} == {}
    assert not (tmp_path / f"{MARK}.txt").exists()


def test_a_zip_file_with_many_entries_is_refused_before_they_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(torch_zip(rebuilt(16, (16,), (1,)), struct.pack("<16f", *range(16))))
    assert is_valid(read(path))  # what the hostile ones are made of is sound
    with zipfile.ZipFile(path, "a") as archive:
        for i in range(100):
            archive.writestr(f"b/{i}", b"")
    with pytest.raises(InputError, match="no zip file of a tensor"):
        read(path)


def test_the_hostile_pickles_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above refuses is no blank cartridge."""
    monkeypatch.chdir(tmp_path)
    torch.save(Runs(), "a.pt")
    torch.load("a.pt", weights_only=False).close()
    assert (tmp_path / f"{MARK}.txt").exists()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    for path in ("/dev/zero", tmp_path / "folder.json", tmp_path / "none.json", "a\0b.json",
                 "x" * 5000 + ".json"):  # fmt: skip
        with pytest.raises(InputError) as caught:
            read_json(path)
        assert str(caught.value).isprintable()
    with pytest.raises(InputError, match=r"^[^ ]*none\.json is not there; expected a JSON file$"):
        read_json(tmp_path / "none.json")


def test_json_within_the_limits_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    document = {"a": [1, -2.5, None, True, "é\n"], "b": {"c": 10**39}}
    path.write_text(json.dumps(document), encoding="utf-8")
    assert read_json(path) == document
    path.write_text("[" * 60 + "]" * 60)
    assert read_json(path)
    path.write_text("[1, 2, 3]")
    with pytest.raises(InputError, match="at most 5"):
        read_json(path, limit_bytes=5)


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    metadata = {"format": "\x1b[31mred\nline", "format_version": "1"}
    save_file({"direction": torch.ones(3)}, path, metadata=metadata)
    with pytest.raises(InputError, match="red line") as caught:
        Direction.load(path)
    assert str(caught.value).isprintable()

"""Files from anyone: refused in one line, nothing run, little memory taken."""

import io
import json
import pickle
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
from safetensors.torch import save_file

from refusal_kernels.cli.evaluate import read_selection
from refusal_kernels.direction import CANDIDATES, Candidates, Direction
from refusal_kernels.errors import InputError
from refusal_kernels.files import convert
from refusal_kernels.files.atomic import read_json
from refusal_kernels.files.control_vector import ControlVector
from refusal_kernels.files.tensors import write_tensors
from refusal_kernels.research import plots
from refusal_kernels.research.evaluation.likelihood import read_texts
from refusal_kernels.research.evaluation.tasks import read_pairs
from refusal_kernels.research.extraction.moments import Moments
from refusal_kernels.research.reproduction.rows import RecordedRow, compare, read_row, recorded
from refusal_kernels.research.sources import read_prompts

HIDDEN = 16


def make_moments(path: Path) -> None:
    moments = Moments(2, 3, HIDDEN)
    moments.update(
        0, torch.randn(2, 3, HIDDEN), torch.tensor([[0, 1, 2]] * 2), torch.tensor([0, 1])
    )
    moments.metadata = {"done": "2"}
    moments.save(path)


def make_control_vector(path: Path, glp: bool) -> None:
    direction = Direction(torch.randn(HIDDEN), "org/model", 3)
    ControlVector.of(direction, "ablate" if glp else "add", (2, 3)).save(path, glp=glp)


def make_candidates(path: Path) -> None:
    write_tensors(path, CANDIDATES, {"candidates": torch.randn(2, 3, HIDDEN)}, {"model": "m"})


def make_text(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content, encoding="utf-8") and None


def make_row(path: Path) -> None:
    recorded({"bypass_score": -4.0, "substring_asr_ablation": 1.0}, "a", "b").save(path)


def make_direction(path: Path) -> None:
    Direction(torch.randn(HIDDEN), "org/model", 3, -1).save(path)


SELECTION = json.dumps({
    "scores": [
        {"position": -1, "layer": 1, "bypass": 0.5, "induce": None, "kl": 0.1, "discarded": None}
    ],
    "refusal_tokens": [3], "position": -1, "layer": 1, "bypass": 0.5,
})  # fmt: skip


# name of the file: how to write a good one, how it is read, and what comes out
READERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "direction.safetensors": (make_direction, Direction.load),
    "candidates.safetensors": (make_candidates, convert.read),
    "moments.safetensors": (make_moments, Moments.load),
    "plain.gguf": (lambda path: make_control_vector(path, False), convert.read),
    "glp.glp": (lambda path: make_control_vector(path, True), convert.read),
    "direction.pt": (lambda path: torch.save(torch.randn(HIDDEN), path), convert.read),
    "mean_diffs.pt": (lambda path: torch.save(torch.randn(2, 3, HIDDEN), path), convert.read),
    "a.json": (make_text('["one", {"prompt": "two", "n": [1.5e3, null]}]'), read_prompts),
    "a.jsonl": (make_text('"one"\n{"instruction": "t\\u00e9a", "x": {}}\n'), read_prompts),
    "a.csv": (make_text('goal,target\n"one, two",x\nthree,"y\nz"\n'), read_prompts),
    "a.txt": (make_text("one\ntwo\n\nthr\u00e9e\n"), read_prompts),
    "pairs.jsonl": (make_text('{"prompt": "a", "answer": "b"}\n'), read_pairs),
    "texts.jsonl": (make_text('"one"\n{"text": "two"}\n'), read_texts),
    "selection.json": (make_text(SELECTION), read_selection),
    "row.json": (make_row, read_row),
    "b.json": (make_text('{"weight_map": {"a": "b.safetensors"}, "n": -1}'), read_json),
}


def is_valid(found: Any) -> bool:
    if isinstance(found, Direction):
        return bool(found.vector.isfinite().all())
    if isinstance(found, Candidates):
        return found.vectors.ndim == 3 and found.vectors.dtype == torch.float32
    if isinstance(found, ControlVector):
        return all(is_valid(direction) for direction in found.directions)
    if isinstance(found, list):
        texts = [text for row in found for text in (row if isinstance(row, tuple) else (row,))]
        return bool(found) and all(isinstance(text, str) and text.strip() for text in texts)
    if isinstance(found, RecordedRow):
        return all(c.to_dict() for c in compare({"bypass_score": -4.0}, [found]))
    if isinstance(found, dict) and "refusal_tokens" in found:
        plots.plot_candidates(
            io.BytesIO(), found["candidates"], (found["position"], found["layer"])
        )
    return isinstance(found, Moments | dict | int | float | str | None)


def check(reader: Callable[[Path], Any], path: Path) -> bool:
    """Read; return whether it was refused."""
    try:
        assert is_valid(reader(path))
    except InputError as error:
        message = str(error)
        assert message.isprintable() and len(message) < 2100 and path.name in message
        return True
    return False


def mutated(data: bytes, choice: random.Random) -> bytes:
    """A few bytes changed, cut out, doubled, or set to what breaks counts and lengths."""
    out = bytearray(data)
    for _ in range(choice.choice((1, 1, 1, 2, 4))):
        at, size = choice.randrange(len(out) + 1), choice.choice((1, 2, 4, 8, 30))
        kind = choice.randrange(6)
        if kind == 0:
            out[at : at + size] = choice.randbytes(size)
        elif kind == 1:
            out[at : at + size] = choice.choice((b"\xff", b"\x00", b"\x7f", b"9")) * size
        elif kind == 2:
            del out[at : at + size]
        elif kind == 3:
            out[at:at] = out[at : at + size]
        elif kind == 4 and out:
            out[at % len(out)] ^= 1 << choice.randrange(8)
        else:
            out[at : at + size] = choice.choice((b"[", b'"', b"{", b",", b"\n", b"1e999"))
    return bytes(out[: choice.randrange(len(out) + 1)]) if choice.random() < 0.1 else bytes(out)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_read_to_something_valid_or_are_refused(tmp_path: Path, name: str) -> None:
    make, reader = READERS[name]
    path = tmp_path / name
    make(path)
    assert not check(reader, path)
    good, refused = path.read_bytes(), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(400):
        path.write_bytes(mutated(good, random.Random(f"{name} {seed}")))
        refused += check(reader, path)
    assert refused > 10
    for size in range(0, len(good), max(1, len(good) // 50)):  # and cut off
        path.write_bytes(good[:size])
        check(reader, path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000  # KiB


# Built to harm. Each is read in a process of its own that can not take more than 1.5 GiB beyond
# what the imports have taken, and that says how much it took.

MARK = "executed"


class Runs:
    """What a hostile pickle has: a call."""

    def __reduce__(self) -> Any:
        return (open, (f"{MARK}.txt", "w"))


class Fills:
    def __reduce__(self) -> Any:
        return (bytearray, (1 << 29,))  # within the limit of the process, and seen


def torch_zip(path: Path, program: bytes, storage: bytes = bytes(64), kind: int = 0) -> None:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in (("data.pkl", program), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(f"a/{name}", content)
        archive.writestr("a/data/0", storage)


def rebuilt(numel: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """The program that torch.save writes for a tensor, with any numbers."""

    def integer(n: int) -> bytes:
        return b"\x8a\x09" + n.to_bytes(9, "little", signed=True)

    def integers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(integer, values)) + b"t"

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + integer(numel) + b"tQ"
        + integer(offset) + integers(size) + integers(stride)
        + b"\x89ccollections\nOrderedDict\n)RtR."
    )  # fmt: skip


def gguf_bytes(*parts: Any) -> bytes:
    """A GGUF header: strings as text, numbers as (letter, number)."""
    out = b"GGUF" + struct.pack("<I", 3)
    for part in parts:
        if isinstance(part, str):
            out += struct.pack("<Q", len(part)) + part.encode()
        else:
            out += struct.pack("<" + part[0], part[1])
    return out


def tensor_info(name: str, hidden: int, kind: int = 0, offset: int = 0, rank: int = 1) -> list[Any]:
    return [name, ("I", rank), *[("Q", hidden)] * rank, ("I", kind), ("Q", offset)]


HUGE = 1 << 60
NONE = [("Q", 0)]


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def named(kind: str, **tensors: Any) -> dict[str, Any]:
    known = {"format": f"refusal_kernels.{kind}", "format_version": "1"}
    return {"__metadata__": known, **tensors}


def f32(shape: list[int], end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}


def groups_of(count: int) -> dict[str, Any]:
    header = named("moments")
    header["__metadata__"]["groups"] = json.dumps([str(i) for i in range(count)])
    header["__metadata__"]["metadata"] = "{}"
    shape = [200, 1, 8, 1]
    for name, dtype, end in (("count", "I64", 0), ("mean", "F64", 0), ("m2", "F64", 0)):
        header[name] = {"dtype": dtype, "shape": [0], "data_offsets": [0, end]}
    header["mean"] = {"dtype": "F64", "shape": shape, "data_offsets": [0, 12800]}
    return header


def deep(groups: bool) -> dict[str, Any]:
    header = groups_of(1)
    header["__metadata__"]["groups" if groups else "metadata"] = "[" * 100_000
    return header


HOSTILE: dict[str, bytes | Callable[[Path], Any]] = {
    # pickles
    "runs.pt": lambda path: torch.save(Runs(), path),
    "runs_bare.pt": pickle.dumps(Runs()),
    "runs_zip.pt": lambda path: torch_zip(path, pickle.dumps(Runs(), 2)),
    "runs_new.pt": lambda path: torch_zip(path, pickle.dumps(Runs(), 5)),
    "fills.pt": lambda path: torch_zip(path, pickle.dumps(Fills(), 2)),
    "numel.pt": lambda path: torch_zip(path, rebuilt(1 << 34, (1 << 34,), (1,))),
    "numel_small.pt": lambda path: torch_zip(path, rebuilt(1 << 34, (4,), (1,))),
    "size.pt": lambda path: torch_zip(path, rebuilt(16, (1 << 34,), (1,))),
    "size_overflow.pt": lambda path: torch_zip(path, rebuilt(16, (1 << 40, 1 << 40), (1, 1))),
    "expand.pt": lambda path: torch_zip(path, rebuilt(16, (1 << 34,), (0,))),
    "offset.pt": lambda path: torch_zip(path, rebuilt(16, (4,), (1,), 1 << 34)),
    "negative.pt": lambda path: torch_zip(path, rebuilt(16, (4,), (1,), -4)),
    "memo.pt": lambda path: torch_zip(path, b"\x80\x02)r\xff\xff\xff\x7f."),
    "bomb.pt": lambda path: torch_zip(
        path, rebuilt(1 << 28, (1 << 28,), (1,)), bytes(1 << 30), zipfile.ZIP_DEFLATED
    ),
    "entries.pt": b"PK\x03\x04" + b"PK\x01\x02" * 100_000,
    # safetensors
    "length.safetensors": safetensors_bytes({}, length=HUGE),
    "length_99mb.safetensors": safetensors_bytes({}, length=99_000_000),
    "header.safetensors": safetensors_bytes(
        b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(3_000_000)) + b"}}"
    ),
    "nested.safetensors": safetensors_bytes(b"[" * 1_000_000),
    "shape.safetensors": safetensors_bytes(named("direction", direction=f32([1 << 40], 1 << 42))),
    "shape_lies.safetensors": safetensors_bytes(
        named("direction", direction=f32([1 << 40], 64)), bytes(64)
    ),
    "overflow.safetensors": safetensors_bytes(
        named("direction", direction=f32([1 << 40, 1 << 40], 64)), bytes(64)
    ),
    "sparse.safetensors": lambda path: sparse(
        path, named("direction", direction=f32([1 << 34], 1 << 36)), 1 << 36
    ),
    "sparse_candidates.safetensors": lambda path: sparse(
        path, named("candidates", candidates=f32([1, 1, 1 << 34], 1 << 36)), 1 << 36
    ),
    "lines.safetensors": safetensors_bytes(
        {"__metadata__": {"format": "a\nb\x1b[2J" * 9000, "format_version": "1"}}
    ),
    "groups.safetensors": safetensors_bytes(groups_of(60_000), bytes(12800)),
    "deep_groups.safetensors": safetensors_bytes(deep(True), bytes(12800)),
    "deep_metadata.safetensors": safetensors_bytes(deep(False), bytes(12800)),
    # GGUF: counts, lengths, dimensions, types
    "tensors.gguf": gguf_bytes(("Q", HUGE), ("Q", 0)),
    "keys.gguf": gguf_bytes(("Q", 0), ("Q", HUGE)),
    "key.gguf": gguf_bytes(("Q", 0), ("Q", 1), ("Q", HUGE)),
    "value.gguf": gguf_bytes(("Q", 0), ("Q", 1), "a", ("I", 8), ("Q", HUGE)),
    "array.gguf": gguf_bytes(("Q", 0), ("Q", 1), "a", ("I", 9), ("I", 4), ("Q", HUGE)),
    "arrays.gguf": gguf_bytes(("Q", 0), ("Q", 1), "a", *[("I", 9), ("Q", 1)] * 5000),
    "bytes.gguf": gguf_bytes(("Q", 1), ("Q", 1), "a", ("I", 9), ("I", 0), ("Q", 3_000_000))
    + bytes(3_000_000) + gguf_bytes(*tensor_info("direction.1", 4))[8:] + bytes(64),
    "many.gguf": gguf_bytes(("Q", 300_000), ("Q", 0))
    + b"".join(gguf_bytes(*tensor_info(f"a.{i}", 4))[8:] for i in range(300_000)) + bytes(64),
    "type.gguf": gguf_bytes(("Q", 0), ("Q", 1), "a", ("I", 99)),
    "alignment.gguf": gguf_bytes(
        ("Q", 1), ("Q", 1), "general.alignment", ("I", 4), ("I", 1 << 31),
        *tensor_info("direction.1", 4),
    ) + bytes(64),
    "hidden.gguf": gguf_bytes(("Q", 1), ("Q", 0), *tensor_info("direction.1", 1 << 50)) + bytes(64),
    "dimensions.gguf": gguf_bytes(("Q", 1), ("Q", 0), *tensor_info("direction.1", 1 << 21, rank=3)),
    "rank.gguf": gguf_bytes(("Q", 1), ("Q", 0), "direction.1", ("I", 0xFFFFFFFF)),
    "kind.gguf": gguf_bytes(("Q", 1), ("Q", 0), *tensor_info("direction.1", 32, 12)) + bytes(64),
    "offset.gguf": gguf_bytes(("Q", 1), ("Q", 0), *tensor_info("direction.1", 4, 0, HUGE))
    + bytes(64),
    "version.gguf": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "sparse.gguf": lambda path: sparse(path, {}, 1 << 36),
    # JSON and its kin
    "nested.json": b"[" * 1_000_000,
    "nested_less.json": b"[" * 500 + b"1" + b"]" * 500,
    "objects.json": b'{"a":' * 200_000,
    "many.json": b"[" + b"[]," * 20_000_000 + b"[]]",
    "dicts.json": b"[" + b'{"a":1},' * 900_000 + b"1]",
    "integer.json": b"[" + b"9" * 1_000_000 + b"]",
    "infinite.json": b'[{"prompt": "a", "x": 1e999}]',
    "nan.json": b'[{"prompt": "a", "x": NaN}]',
    "surrogate.json": b'["\\ud800"]',
    "long.json": b'["' + b"a" * 1_000_000 + b'"]',
    "nested.jsonl": b'"one"\n' + b"[" * 1_000_000,
    "nested_pairs.jsonl": b"[" * 1_000_000,
    "nested_texts.jsonl": b'"one"\n' + b"[" * 1_000_000,
    "sparse_texts.txt": lambda path: sparse(path, {}, 1 << 36),
    "sparse_pairs.jsonl": lambda path: sparse(path, {}, 1 << 36),
    "nested_selection.json": b"[" * 1_000_000,
    "nested_row.json": b"[" * 1_000_000,
    "integer_row.json": b'{"numbers": {"a": ' + b"9" * 1_000_000 + b"}}",
    "lines.jsonl": b"\n" * 60_000_000,
    "field.csv": b'prompt\n"' + b"a" * 1_000_000 + b'"\n',
    "open.csv": b'prompt\n"' + b"a\n" * 100_000,
    "columns.csv": b"," * 60_000_000,
    "lines.txt": b"a\n" * 30_000_000,
    "line.txt": b"a" * 1_000_000,
    "sparse.txt": lambda path: sparse(path, {}, 1 << 36),
}  # fmt: skip


def sparse(path: Path, header: dict[str, Any], size: int) -> None:
    """A file that says it is large, and takes no room on the disk."""
    text = safetensors_bytes(header)
    with path.open("wb") as file:
        file.write(text)
        file.truncate(len(text) + size)


READ_THEM = textwrap.dedent(
    """
    import resource, sys
    from pathlib import Path
    import torch, gguf
    from refusal_kernels.files import convert
    from refusal_kernels.research.evaluation.likelihood import read_texts
    from refusal_kernels.research.evaluation.tasks import read_pairs
    from refusal_kernels.cli.evaluate import read_selection
    from refusal_kernels.errors import InputError
    from refusal_kernels.research.extraction.moments import Moments
    from refusal_kernels.research.sources import read_prompts
    from refusal_kernels.research.reproduction.rows import read_row

    torch.set_num_threads(1)

    def status(name):  # KiB; getrusage would begin with the parent's peak
        text = Path("/proc/self/status").read_text()
        return int(text.split(name + ":")[1].split()[0])

    resource.setrlimit(resource.RLIMIT_AS, (1024 * status("VmSize") + (3 << 29),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
    for name in sys.argv[1:]:
        path = Path(name)
        reader = convert.read
        if path.suffix in (".json", ".jsonl", ".csv", ".txt"):
            reader = read_prompts
        if "groups" in name or "deep" in name:
            reader = Moments.load
        own = {
            "pairs": read_pairs, "texts": read_texts, "selection": read_selection, "row": read_row
        }
        reader = next((own[word] for word in own if word in name), reader)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = status("VmRSS")
        except OSError:  # some sandboxes have no such file: what is beyond the last peak
            before = status("VmHWM")
        try:
            print(path.name, "READ", repr(reader(path))[:100], flush=True)
        except InputError as error:
            assert str(error).isprintable(), name
            grown = max(0, status("VmHWM") - before)
            print(path.name, "refused", grown, str(error)[:300], flush=True)
    """
)


@pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc are Linux's")
def test_files_built_to_harm_are_refused(tmp_path: Path) -> None:
    for name, content in HOSTILE.items():
        path = tmp_path / name
        if callable(content):
            content(path)
        else:
            path.write_bytes(content)
    (tmp_path / f"{MARK}.txt").unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", READ_THEM, *HOSTILE],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    lines = {line.split()[0]: line.split(maxsplit=3)[1:] for line in done.stdout.splitlines()}
    assert done.returncode == 0, (done.stdout[-500:], done.stderr[-2000:])
    assert list(lines) == list(HOSTILE)
    assert [name for name, (verdict, *_) in lines.items() if verdict != "refused"] == []
    grown = {name: int(peak) for name, (_, peak, _) in lines.items()}  # KiB
    assert grown["many.json"] > 50_000  # the gauge is not blind: this file has 60 MB
    assert {name: peak for name, peak in grown.items() if peak > 400_000} == {}
    assert not (tmp_path / f"{MARK}.txt").exists()


def test_a_zip_file_with_many_entries_is_refused_before_they_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch_zip(path, rebuilt(16, (16,), (1,)), struct.pack("<16f", *range(16)))
    assert is_valid(convert.read(path))  # what the hostile ones are made of is sound
    with zipfile.ZipFile(path, "a") as archive:
        for i in range(100):
            archive.writestr(f"b/{i}", b"")
    with pytest.raises(InputError, match="no zip file of a tensor"):
        convert.read(path)


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

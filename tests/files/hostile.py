"""Files built to harm, and damage to sound ones."""

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MARK = "executed"


class Runs:
    """What a hostile pickle has: a call."""

    def __reduce__(self) -> Any:
        return (open, (f"{MARK}.txt", "w"))


class Fills:
    def __reduce__(self) -> Any:
        return (bytearray, (1 << 29,))  # within the limit of the process, and seen


def torch_zip(program: bytes, storage: bytes = bytes(64), kind: int = 0) -> bytes:
    """What torch.save writes for a tensor, with any program."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind, compresslevel=1) as archive:
        for name, content in (("data.pkl", program), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(f"a/{name}", content)
        archive.writestr("a/data/0", storage)
    return file.getvalue()


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
ONE_TENSOR = ("Q", 1), ("Q", 0)  # of a GGUF file: as many tensors, as many keys


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
    for name, dtype in (("count", "I64"), ("m2", "F64")):
        header[name] = {"dtype": dtype, "shape": [0], "data_offsets": [0, 0]}
    header["mean"] = {"dtype": "F64", "shape": shape, "data_offsets": [0, 12800]}
    return header


def deep(groups: bool) -> dict[str, Any]:
    header = groups_of(1)
    header["__metadata__"]["groups" if groups else "metadata"] = "[" * 100_000
    return header


def sparse(path: Path, start: bytes, size: int) -> None:
    """A file that says it is large, and takes no room on the disk."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)


def vast(path: Path) -> None:
    sparse(path, safetensors_bytes({}), 1 << 36)


def sparse_tensors(kind: str, shape: list[int]) -> Callable[[Path], None]:
    """A safetensors file of 64 GiB."""
    header = safetensors_bytes(named(kind, **{kind: f32(shape, 1 << 36)}))
    return lambda path: sparse(path, header, len(header) + (1 << 36))


def hostile_files() -> dict[str, bytes | Callable[[Path], Any]]:
    """By name, the bytes of each file, or what writes them."""
    return {
        # pickles
        "runs.pt": lambda path: torch.save(Runs(), path),
        "runs_bare.pt": pickle.dumps(Runs()),
        "runs_zip.pt": torch_zip(pickle.dumps(Runs(), 2)),
        "runs_new.pt": torch_zip(pickle.dumps(Runs(), 5)),
        "fills.pt": torch_zip(pickle.dumps(Fills(), 2)),
        "numel.pt": torch_zip(rebuilt(1 << 34, (1 << 34,), (1,))),
        "numel_small.pt": torch_zip(rebuilt(1 << 34, (4,), (1,))),
        "size.pt": torch_zip(rebuilt(16, (1 << 34,), (1,))),
        "size_overflow.pt": torch_zip(rebuilt(16, (1 << 40, 1 << 40), (1, 1))),
        "expand.pt": torch_zip(rebuilt(16, (1 << 34,), (0,))),
        "offset.pt": torch_zip(rebuilt(16, (4,), (1,), 1 << 34)),
        "negative.pt": torch_zip(rebuilt(16, (4,), (1,), -4)),
        "memo.pt": torch_zip(b"\x80\x02)r\xff\xff\xff\x7f."),
        "bomb.pt": lambda path: path.write_bytes(
            torch_zip(rebuilt(1 << 28, (1 << 28,), (1,)), bytes(1 << 30), zipfile.ZIP_DEFLATED)
        ),
        "entries.pt": b"PK\x03\x04" + b"PK\x01\x02" * 100_000,
        # safetensors
        "length.safetensors": safetensors_bytes({}, length=HUGE),
        "length_99mb.safetensors": safetensors_bytes({}, length=99_000_000),
        "header.safetensors": safetensors_bytes(
            b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(3_000_000)) + b"}}"
        ),
        "nested.safetensors": safetensors_bytes(b"[" * 1_000_000),
        "shape.safetensors": safetensors_bytes(
            named("direction", direction=f32([1 << 40], 1 << 42))
        ),
        "shape_lies.safetensors": safetensors_bytes(
            named("direction", direction=f32([1 << 40], 64)), bytes(64)
        ),
        "overflow.safetensors": safetensors_bytes(
            named("direction", direction=f32([1 << 40, 1 << 40], 64)), bytes(64)
        ),
        "sparse.safetensors": sparse_tensors("direction", [1 << 34]),
        "sparse_candidates.safetensors": sparse_tensors("candidates", [1, 1, 1 << 34]),
        "lines.safetensors": safetensors_bytes(
            {"__metadata__": {"format": "a\nb\x1b[2J" * 9000, "format_version": "1"}}
        ),
        "moments.safetensors": safetensors_bytes(groups_of(60_000), bytes(12800)),
        "deep_moments.safetensors": safetensors_bytes(deep(True), bytes(12800)),
        "deep_moments_metadata.safetensors": safetensors_bytes(deep(False), bytes(12800)),
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
        "hidden.gguf": gguf_bytes(*ONE_TENSOR, *tensor_info("direction.1", 1 << 50)) + bytes(64),
        "dimensions.gguf": gguf_bytes(*ONE_TENSOR, *tensor_info("direction.1", 1 << 21, rank=3)),
        "rank.gguf": gguf_bytes(("Q", 1), ("Q", 0), "direction.1", ("I", 0xFFFFFFFF)),
        "kind.gguf": gguf_bytes(*ONE_TENSOR, *tensor_info("direction.1", 32, 12)) + bytes(64),
        "offset.gguf": gguf_bytes(*ONE_TENSOR, *tensor_info("direction.1", 4, 0, HUGE))
        + bytes(64),
        "version.gguf": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        "sparse.gguf": vast,
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
        "sparse_texts.txt": vast,
        "sparse_pairs.jsonl": vast,
        "nested_selection.json": b"[" * 1_000_000,
        "nested_row.json": b"[" * 1_000_000,
        "integer_row.json": b'{"numbers": {"a": ' + b"9" * 1_000_000 + b"}}",
        "lines.jsonl": b"\n" * 60_000_000,
        "field.csv": b'prompt\n"' + b"a" * 1_000_000 + b'"\n',
        "open.csv": b'prompt\n"' + b"a\n" * 100_000,
        "columns.csv": b"," * 60_000_000,
        "lines.txt": b"a\n" * 30_000_000,
        "line.txt": b"a" * 1_000_000,
        "sparse.txt": vast,
    }  # fmt: skip


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

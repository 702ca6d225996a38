"""Write files and folders under a temporary name, then rename; read files within limits.

So a file is never half-written, and a hostile file cannot exhaust the memory.
"""

import glob
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from refusal_kernels.errors import InputError, first_line

LIMIT_BYTES = 64 << 20  # no prompt file, index or direction comes near
DEPTH = 64
NODES = 2_000_000


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; rename it to ``path`` on success."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None
    except SafetensorError as error:  # its own name for an OSError
        raise InputError(f"{path} cannot be written: {' '.join(str(error).split())}") from None
    finally:
        with suppress(OSError):  # a folder that cannot be written to says so above
            temporary.unlink()


def check_space(folder: Path, size_bytes: int) -> None:
    """Refuse a folder, there or not yet, whose disk has less room than something will take."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if size_bytes > free:
        raise InputError(
            f"{folder} has {free >> 20} MiB free; expected {(size_bytes >> 20) + 1} MiB"
        )


def check_writable(folder: Path) -> None:
    """Refuse a folder in which no file can be made."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder} cannot be written to; expected a folder that can")


def check_new(folder: Path) -> None:
    """Refuse a path that exists."""
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} is there already; expected a folder that can be made")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder; rename it to ``folder`` on success, remove it on failure."""
    check_new(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}") from error
    except SafetensorError as error:
        raise InputError(f"{folder} cannot be written: {' '.join(str(error).split())}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(path: Path) -> None:
    """Remove the temporary files that killed processes left beside a file (see `replacing`)."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = temporary.name.removeprefix(f".{path.name}.").removesuffix(".tmp")
        with suppress(OSError, OverflowError):  # someone else's, or gone already
            try:
                if pid.isdigit():
                    os.kill(int(pid), 0)
            except ProcessLookupError:
                temporary.unlink()


def write_json(path: Path, document: Any) -> None:
    """Write a document as indented JSON; NaN and infinities are refused."""
    try:
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise InputError(f"{path} cannot be written: {first_line(error)}") from None
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_bytes(path: str | os.PathLike[str], what: str, limit_bytes: int = LIMIT_BYTES) -> bytes:
    """Read a whole file within a limit; `what` says in a message what was expected."""
    check_size(path, what, limit_bytes)
    try:
        with open(path, "rb") as file:
            return file.read(limit_bytes)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def check_size(path: str | os.PathLike[str], what: str, limit_bytes: int) -> int:
    """Return the size of a file in bytes; refuse what is too large, or no plain file."""
    try:
        there = Path(path).is_file()
        size = Path(path).stat().st_size if there else 0
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte in it
        raise InputError(f"{path} cannot be read: {error}") from None
    if not there:
        raise InputError(f"{path} is not there; expected {what}")
    if size > limit_bytes:
        raise InputError(f"{path} has {size} bytes; expected {what} of at most {limit_bytes}")
    return size


def read_text(path: str | os.PathLike[str], what: str, limit_bytes: int = LIMIT_BYTES) -> str:
    """`read_bytes`, decoded from UTF-8 with or without a byte-order mark."""
    try:
        return read_bytes(path, what, limit_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from None


def read_json(path: str | os.PathLike[str], limit_bytes: int = LIMIT_BYTES) -> Any:
    """Read a JSON file that someone else may have written, as `parse_json` does."""
    return parse_json(read_text(path, "a JSON file", limit_bytes), str(path))


def parse_json(text: str, where: str) -> Any:
    """Parse JSON, strictly and within limits; `where` begins the messages.

    It refuses NaN and infinity (also as 1e999), integers of more than 40 digits, more than `DEPTH`
    levels of nesting, and more than `NODES` brackets and commas: small objects take 30 times the
    memory of their text.
    """
    if sum(map(text.count, "[{,")) > NODES:
        raise InputError(f"{where} holds too much: expected at most {NODES} JSON values")
    try:
        document = json.loads(
            text, parse_int=_integer, parse_float=_finite, parse_constant=_no_constant
        )
    except RecursionError:
        raise InputError(_too_deep(where)) from None
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from None
    level = [document]
    for _ in range(DEPTH + 1):
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return document
    raise InputError(_too_deep(where))


def _too_deep(where: str) -> str:
    return f"{where} is nested too deeply; expected JSON of at most {DEPTH} levels"


def _integer(digits: str) -> int:
    if len(digits) > 40:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number that is infinite as a float")
    return number


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")

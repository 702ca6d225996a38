"""What the commands share besides their options: the terminal, the model and the files."""

from __future__ import annotations

import datetime
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import check_writable, write_json

if TYPE_CHECKING:  # torch takes seconds to import
    from refusal_kernels.direction import Direction

# paths and models may hold brackets, which are no markup
console = Console(markup=False)
errors = Console(stderr=True, markup=False)


def choose_device(device: str) -> str:
    """Check a device, and say which one "auto" is; under torchrun each process has its own."""
    from refusal_kernels.environment import describe_device
    from refusal_kernels.hf.load import find_device

    chosen = find_device(device)
    if device == "auto" and not console.quiet:
        errors.print(Text(f"device: {chosen} ({describe_device(chosen)})"), soft_wrap=True)
    return str(chosen)


def title_of(model: str) -> str:
    """Return a model's name for a title: of a folder or a file its last part."""
    return Path(model).resolve().name if Path(model).exists() else model


def engine_of(model: Any) -> dict[str, Any]:
    """Return what runs a model, for the JSON."""
    from importlib.metadata import version

    from refusal_kernels.hf.served import ServedModel

    if isinstance(model, ServedModel):
        return model.about
    return {"name": "transformers", "version": version("transformers")}


def provenance(model: str, language_model: Any) -> dict[str, Any]:
    """Return what a result depends on: model, versions, device, command and time."""
    from refusal_kernels.environment import describe_device, versions
    from refusal_kernels.hf.embedded import EMBEDDED
    from refusal_kernels.hf.model import input_device

    embedded, engine = EMBEDDED.get(model), engine_of(language_model)
    return {
        "model": embedded.title if embedded else model,
        "title": embedded.title if embedded else title_of(model),
        "versions": versions(),
        "engine": engine,
        "device": engine.get("device") or describe_device(input_device(language_model)),
        "command": shlex.join(["refusal-kernels", *sys.argv[1:]]),
        "created": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def read_direction(path: Path) -> Direction:
    """Read a file that holds one direction, in any format."""
    from refusal_kernels.direction import Candidates, Direction
    from refusal_kernels.files.convert import SUFFIXES, read

    if path.suffix.lower() not in SUFFIXES:
        return Direction.load(path)
    content = read(path)
    if not isinstance(content, Direction):
        what = "candidates" if isinstance(content, Candidates) else "a control vector"
        raise InputError(
            f"{path} holds {what}; expected a direction: "
            "'refusal-kernels convert' takes one out with --layer and --position"
        )
    return content


made: list[Path] = []
"""The folders that `prepare` has made, the outer ones first."""


def prepare(*paths: Path | None) -> None:
    """Make the folders of the files that will be written, before the long work."""
    for path in filter(None, paths):
        made.extend(parent for parent in reversed(path.parents) if not parent.exists())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path.parent} cannot be made: {error.strerror}") from None
        check_writable(path.parent)
        if path.is_dir():
            raise InputError(f"{path} is a folder; expected the name of a file")


# the options that name what is written
WRITTEN = ("out", "json_file", "plot", "report", "checkpoint", "record")


def refuse_one_file_twice(values: Mapping[str, Any]) -> None:
    """Refuse to write what another option names: a command would read it, and write over it."""
    paths = {
        name: os.path.realpath(path)
        for name, path in values.items()
        if isinstance(path, Path) and not path.is_char_device()
    }
    for name in WRITTEN:
        if name in paths and list(paths.values()).count(paths[name]) > 1:
            raise InputError(f"{values[name]} is given twice; expected a file for each option")


def clean_up() -> None:
    """Remove the folders that `prepare` has made and nothing was written to."""
    while made:
        with suppress(OSError):
            made.pop().rmdir()


def unfinished(path: Path) -> Path:
    """Return the file that keeps the state of the run that will write ``path``."""
    return path.with_name(f"{path.stem}.part{path.suffix}")


def finish(out: Path | None, json_file: Path | None, document: Any) -> None:
    """Name the files that are written, and write the JSON if it is wanted."""
    if out is not None:
        console.print(f"written: {out}", soft_wrap=True)
    if json_file is not None:
        prepare(json_file)
        write_json(json_file, document)
        console.print(f"written: {json_file}", soft_wrap=True)


def named_sources(given: Sequence[str], option: str, needs_name: bool = False) -> dict[str, str]:
    """Split NAME=FILE into name and file; the stem is the name of a file without one."""
    sources: dict[str, str] = {}
    for item in given:
        name, equals, file = item.partition("=")
        if not equals:
            if needs_name:
                raise InputError(f"{option} is '{item}'; expected NAME=SOURCE")
            name, file = Path(item).stem, item
        if not name or not file or name in sources:
            raise InputError(f"{option} is '{item}'; expected NAME=FILE, each name once")
        sources[name] = file
    return sources

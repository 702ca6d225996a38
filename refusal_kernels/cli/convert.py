"""Between file formats: convert."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from refusal_kernels.cli.common import JsonOption, console, errors, finish, writable
from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.files.control_vector import ControlVector
from refusal_kernels.files.convert import Candidates
from refusal_kernels.files.convert import convert as convert_


def convert(
    source: Annotated[Path, typer.Argument(help=".safetensors, .gguf, .glp or .pt")],
    target: Annotated[
        Path,
        typer.Argument(help=".safetensors, .gguf (llama.cpp: adds) or .glp.gguf (GLP)"),
    ],
    mode: Annotated[
        str | None, typer.Option("--as", help="For a .gguf: add or ablate the direction.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option("--layers", "--layer", help="At the inputs of these blocks: 14, or 2-31,40."),
    ] = None,
    position: Annotated[
        int | None, typer.Option(help="Of candidates: the position, -1 is the last token.")
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="For a .gguf: the coefficient or strength; default 1.")
    ] = None,
    model_hint: Annotated[
        str | None, typer.Option(help="For a .gguf: the model's architecture, such as llama.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Write a direction in another format; refuse what that format can not say."""
    if mode not in (None, "add", "ablate"):
        raise InputError(f"--as is {mode!r}; expected add or ablate")
    numbers = None if layers is None else _numbers(layers)
    writable(target)
    found = convert_(
        source,
        target,
        mode=mode,
        layers=numbers,
        position=position,
        scale=scale,
        model_hint=model_hint,
    )
    said: dict[str, Any]
    if isinstance(found, Candidates):
        said = {"candidates": list(found.tensor.shape), "model": found.model}
    elif isinstance(found, Direction):
        said = {
            "layer": found.layer,
            "position": found.position,
            "norm": found.norm,
            "hidden": found.hidden,
            "model": found.model,
        }
    else:
        said = {"as": found.mode, "layers": found.layers, "strengths": list(found.strengths)}
    source_of = found.directions[0] if isinstance(found, ControlVector) else found
    if isinstance(source_of, Direction) and (derived := source_of.metadata.get("derived_at")):
        said["derived_at"] = derived
        errors.print(Text(f"warning: it was read elsewhere than it acts: at {derived}"))
    console.print(Text(", ".join(f"{key}: {value}" for key, value in said.items())))
    finish(target, json_file, {"source": str(source), "target": str(target), **said})


def _numbers(text: str) -> tuple[int, ...]:
    """Parse "2-31,40"."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,4})\s*(?:-\s*([0-9]{1,4})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise InputError(f"--layers is {text!r}; expected numbers and ranges such as 2-31,40")
        found.update(range(first, last + 1))
    return tuple(sorted(found))

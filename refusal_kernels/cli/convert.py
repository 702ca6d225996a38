"""From one file format to another: convert."""

import re
from pathlib import Path
from typing import Annotated, Any

from rich.text import Text
from typer import Argument, Option

from refusal_kernels.cli import options
from refusal_kernels.cli.common import console, errors, finish, prepare
from refusal_kernels.errors import InputError


def convert(
    source: Annotated[Path, Argument(help=".safetensors, .gguf, .glp or .pt")],
    target: Annotated[
        Path, Argument(help=".safetensors, .gguf (llama.cpp: adds) or .glp.gguf (GLP)")
    ],
    mode: Annotated[
        str | None,
        options.choice("For a .gguf: add or ablate the direction.", ("add", "ablate"), "--as"),
    ] = None,
    layers: Annotated[
        str | None,
        Option("--layers", "--layer", help="Act at the inputs of these blocks: 14 or 2-31,40."),
    ] = None,
    position: Annotated[
        int | None, Option(help="Which of the candidates' positions; -1 is the last token.")
    ] = None,
    scale: Annotated[
        float | None, Option(help="For a .gguf: the coefficient or strength; default 1.")
    ] = None,
    model_hint: Annotated[
        str | None, Option(help="For a .gguf: the model's architecture, such as llama.")
    ] = None,
    json_file: options.Json = None,
) -> None:
    """Write a direction in another format, or refuse if that format cannot hold it."""
    numbers = None if layers is None else _numbers(layers)

    from refusal_kernels.direction import Direction
    from refusal_kernels.files import convert as files
    from refusal_kernels.files.control_vector import ControlVector

    prepare(target)
    content = files.convert(
        source,
        target,
        mode=mode,
        layers=numbers,
        position=position,
        scale=scale,
        model_hint=model_hint,
    )
    facts: dict[str, Any]
    if isinstance(content, ControlVector):
        facts = {"as": content.mode, "layers": content.layers, "strengths": [*content.strengths]}
    elif isinstance(content, Direction):
        names = ("layer", "position", "norm", "hidden", "model")
        facts = {name: getattr(content, name) for name in names}
    else:
        facts = {"candidates": list(content.vectors.shape), "model": content.model}
    direction = content.directions[0] if isinstance(content, ControlVector) else content
    if isinstance(direction, Direction) and (derived := direction.metadata.get("derived_at")):
        facts["derived_at"] = derived
        errors.print(Text(f"warning: it was read at {derived}, and acts elsewhere"))
    console.print(Text(", ".join(f"{key}: {value}" for key, value in facts.items())))
    finish(target, json_file, {"source": str(source), "target": str(target), **facts})


def _numbers(text: str) -> tuple[int, ...]:
    """Parse "2-31,40"."""
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,4})\s*(?:-\s*([0-9]{1,4})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise InputError(f"--layers is {text!r}; expected numbers and ranges such as 2-31,40")
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))

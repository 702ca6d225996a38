"""Into the weights: orthogonalize."""

import os
from pathlib import Path
from typing import Annotated

import typer

from refusal_kernels.commands.common import (
    DeviceOption,
    DirectionOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    console,
    finish,
    writable,
)
from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.loading import load
from refusal_kernels.orthogonalize import orthogonalize as orthogonalize_


def orthogonalize(
    direction: DirectionOption,
    out: Annotated[Path, typer.Option(help="Folder of the edited checkpoint; must be new.")],
    model: ModelOption = "toy",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Project the direction out of the weights and save the model and its tokenizer."""
    if out.exists():
        raise InputError(f"{out} is there already; expected a folder that can be made")
    writable(out)
    loaded = Direction.load(direction)
    language_model, tokenizer = load(model, device, dtype, loaded)
    done = orthogonalize_(language_model, loaded)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    language_model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    os.replace(temporary, out)
    console.print(f"{len(done.edited)} parameters edited" + (", embedding untied" * done.untied))
    finish(out, json_file, {"model": str(out), "edited": done.edited, "untied": done.untied})

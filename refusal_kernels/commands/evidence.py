"""What a direction does: evaluate, generate."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from refusal_kernels import toy
from refusal_kernels.commands.common import (
    BatchOption,
    DeviceOption,
    DirectionOption,
    DtypeOption,
    HarmfulOption,
    HarmlessOption,
    JsonOption,
    ModelOption,
    console,
    finish,
    progress_bars,
)
from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.evaluation import evaluate as evaluate_
from refusal_kernels.evaluation import generate as generate_
from refusal_kernels.interventions import Ablate, Add, Intervention
from refusal_kernels.loading import load, prompts_for
from refusal_kernels.patching import patch


def evaluate(
    direction: DirectionOption,
    model: ModelOption = "toy",
    harmful: HarmfulOption = None,
    harmless: HarmlessOption = None,
    layer: Annotated[int | None, typer.Option(help="Add here; default: the file's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    batch_size: BatchOption = 32,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Count refusals of the unmodified model, with the direction ablated, and with it added."""
    prompts = prompts_for(model, "test", harmful, harmless)
    loaded = Direction.load(direction)
    interventions: dict[str, Intervention | None] = {
        "unmodified": None,
        "ablated": Ablate(loaded),
        "added": Add(loaded, layer=_layer(loaded, layer, direction)),
    }
    language_model, tokenizer = load(model, device, dtype, loaded)
    with progress_bars() as step:
        outcomes = evaluate_(
            language_model,
            tokenizer,
            harmful=prompts["harmful"],
            harmless=prompts["harmless"],
            interventions=interventions,
            skills=toy.skills() if model == "toy" else None,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=step("Evaluate"),
        )
    table = Table("", "harmful refused", "harmless refused", "skills", title=f"Test, {model}")
    for name, outcome in outcomes.items():
        table.add_row(
            name, str(outcome.harmful), str(outcome.harmless), str(outcome.capability or "")
        )
    console.print(table)
    finish(None, json_file, {name: outcome.to_dict() for name, outcome in outcomes.items()})


def generate(
    prompt: Annotated[list[str], typer.Argument(help="One or more instructions.")],
    direction: Annotated[Path | None, typer.Option(help="Steer with this one.")] = None,
    model: ModelOption = "toy",
    add: Annotated[bool, typer.Option("--add", help="Add the direction, not ablate it.")] = False,
    layer: Annotated[int | None, typer.Option(help="Add here; default: the file's.")] = None,
    strength: Annotated[float, typer.Option(help="1 is the edit as defined, 0 none.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Answer prompts greedily, with a direction ablated or added, or without."""
    intervention: Intervention | None = None
    loaded = None
    if direction is not None:
        loaded = Direction.load(direction)
        intervention = (
            Add(loaded, strength=strength, layer=_layer(loaded, layer, direction))
            if add
            else Ablate(loaded, strength, layer=layer)
        )
    language_model, tokenizer = load(model, device, dtype, loaded)
    found = {"unmodified": generate_(language_model, tokenizer, prompt, max_new_tokens)}
    if intervention is not None:
        name = type(intervention).__name__.lower()
        with patch(language_model, intervention):
            found[name] = generate_(language_model, tokenizer, prompt, max_new_tokens)
    for i, text in enumerate(prompt):
        console.print(Text(text, style="bold"))
        for name, answers in found.items():
            console.print(Text(f"  {name}: {answers[i]}"))
    finish(None, json_file, {"prompts": prompt, **found})


def _layer(direction: Direction, layer: int | None, path: Path) -> int:
    chosen = direction.layer if layer is None else layer
    if chosen is None:
        raise InputError(f"{path} does not say at which layer to add; give --layer")
    return chosen

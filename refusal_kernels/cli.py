"""The command line: `refusal-kernels COMMAND`."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from refusal_kernels import demo as experiment
from refusal_kernels import ops, report, toy
from refusal_kernels.direction import Direction, read_tensors, write_tensors
from refusal_kernels.environment import describe_device, versions
from refusal_kernels.errors import InputError
from refusal_kernels.evaluation import evaluate as evaluate_
from refusal_kernels.evaluation import generate as generate_
from refusal_kernels.extraction import mean_difference
from refusal_kernels.interventions import Ablate, Add, Intervention
from refusal_kernels.loading import demo_material, load, prompts_for
from refusal_kernels.models import hidden_size, input_device
from refusal_kernels.orthogonalize import orthogonalize as orthogonalize_
from refusal_kernels.patching import patch
from refusal_kernels.selection import select as select_

CANDIDATES = "refusal_kernels.candidates"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find, remove, add and measure one direction in a chat model's residual stream.",
)
console = Console()
errors = Console(stderr=True)

ModelOption = Annotated[str, typer.Option("--model", help="A hub id, a folder, or 'toy'.")]
DeviceOption = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
HarmfulOption = Annotated[Path | None, typer.Option(help="Prompts: .txt, .jsonl or .json.")]
HarmlessOption = Annotated[Path | None, typer.Option(help="Prompts: .txt, .jsonl or .json.")]
BatchOption = Annotated[int, typer.Option(help="Prompts at once.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write what was found here too.")]
DirectionOption = Annotated[Path, typer.Option("--direction", help="A file made by 'select'.")]


def main() -> None:
    """Run the command line; bad input ends in one line on stderr and exit code 2."""
    try:
        app()
    except InputError as error:
        errors.print(Text(f"error: {error}", style="red"), soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(130)


# --- commands ------------------------------------------------------------------------------------


@app.command()
def demo(
    model: ModelOption = "toy",
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("out/demo"),
    harmful: HarmfulOption = None,
    harmless: HarmlessOption = None,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of the comparison of speed.")] = 15,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Show the paper's finding from beginning to end, on the toy model or on your own."""
    material = demo_material(model, harmful, harmless, device, dtype)
    with _progress() as step:
        finding = experiment.run(material, out, step, rounds=rounds)
    if json_file is not None:
        report.write_json(json_file, finding.report)
    _print_finding(material.name, finding, out)
    if finding.failed:
        errors.print(Text(f"not as expected: {'; '.join(finding.failed)}", style="red"))
        raise typer.Exit(1)


@app.command()
def extract(
    model: ModelOption = "toy",
    harmful: HarmfulOption = None,
    harmless: HarmlessOption = None,
    out: Annotated[Path, typer.Option(help="The candidates' file.")] = Path(
        "out/candidates.safetensors"
    ),
    positions: Annotated[
        int | None, typer.Option(min=1, help="Tokens from the end; default: the template's.")
    ] = None,
    batch_size: BatchOption = 32,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Compute the mean difference at every layer and end-of-instruction position."""
    prompts = prompts_for(model, "train", harmful, harmless)
    _writable(out)
    language_model, tokenizer = load(model, device, dtype)
    with _progress() as step:
        candidates = mean_difference(
            language_model,
            tokenizer,
            prompts["harmful"],
            prompts["harmless"],
            positions=positions,
            batch_size=batch_size,
            progress=step("Extract"),
        )
    write_tensors(out, CANDIDATES, {"candidates": candidates}, {"model": model})
    norms = candidates.norm(dim=-1)  # [position, layer]
    table = Table(title=f"Norm of the mean difference, {model}")
    table.add_column("layer", justify="right")
    for position in range(-len(norms), 0):
        table.add_column(f"position {position}", justify="right")
    for layer in range(norms.shape[1]):
        table.add_row(str(layer), *(f"{float(n):.3f}" for n in norms[:, layer]))
    console.print(table)
    _done(out, json_file, {"candidates": str(out), "norm": norms.tolist(), "model": model})


@app.command()
def select(
    candidates: Annotated[Path, typer.Option(help="A file made by 'extract'.")] = Path(
        "out/candidates.safetensors"
    ),
    model: ModelOption = "toy",
    harmful: HarmfulOption = None,
    harmless: HarmlessOption = None,
    out: Annotated[Path, typer.Option(help="The direction's file.")] = Path(
        "out/direction.safetensors"
    ),
    batch_size: BatchOption = 32,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Choose the direction by the paper's three scores, on validation prompts."""
    prompts = prompts_for(model, "validation", harmful, harmless)
    tensors, _ = read_tensors(candidates, CANDIDATES, ("candidates",))
    _writable(out)
    language_model, tokenizer = load(model, device, dtype)
    with _progress() as step:
        selection = select_(
            language_model,
            tokenizer,
            tensors["candidates"],
            prompts["harmful"],
            prompts["harmless"],
            batch_size=batch_size,
            model_name=model,
            progress=step("Select"),
        )
    selection.direction.save(out)
    table = Table(title=f"Candidates, {model}")
    for name in ("position", "layer", "bypass", "induce", "kl", "discarded"):
        table.add_column(name, justify="left" if name == "discarded" else "right")
    for row in selection.scores:
        won = (row.position, row.layer) == (selection.position, selection.layer)
        scores = ["" if s is None else f"{s:.3f}" for s in (row.bypass, row.induce, row.kl)]
        note = "selected" if won else row.discarded or ""
        table.add_row(
            str(row.position), str(row.layer), *scores, note, style="bold green" if won else None
        )
    console.print(table)
    _done(out, json_file, selection.to_dict())


@app.command()
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
    with _progress() as step:
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
    _done(None, json_file, {name: outcome.to_dict() for name, outcome in outcomes.items()})


@app.command()
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
    _done(None, json_file, {"prompts": prompt, **found})


@app.command()
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
    _writable(out)
    loaded = Direction.load(direction)
    language_model, tokenizer = load(model, device, dtype, loaded)
    done = orthogonalize_(language_model, loaded)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    language_model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    os.replace(temporary, out)
    console.print(f"{len(done.edited)} parameters edited" + (", embedding untied" * done.untied))
    _done(out, json_file, {"model": str(out), "edited": done.edited, "untied": done.untied})


@app.command()
def doctor(
    model: ModelOption = "toy",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Say what is installed, which backend serves what, and whether a model can be patched."""
    table = Table("what", "found", title="refusal-kernels doctor")
    found = {**versions(), "cuda device": str(torch.cuda.is_available())}
    for kind in ("cpu", "cuda"):
        for precision in (torch.float32, torch.bfloat16, torch.float64):
            key = f"{kind} {str(precision).removeprefix('torch.')}"
            found[key] = str(ops.explain(device=kind, dtype=precision))
    language_model, _ = load(model, device, dtype)
    vector = torch.ones(hidden_size(language_model))
    with patch(language_model, Ablate(Direction(vector))) as handle:
        found[f"patch of {model}"] = str(handle.report()).splitlines()[0]
    found["device"] = describe_device(input_device(language_model))
    for name, value in found.items():
        table.add_row(name, value)
    console.print(table)
    _done(None, json_file, found)


# --- parts ---------------------------------------------------------------------------------------


def _layer(direction: Direction, layer: int | None, path: Path) -> int:
    chosen = direction.layer if layer is None else layer
    if chosen is None:
        raise InputError(f"{path} does not say at which layer to add; give --layer")
    return chosen


def _writable(path: Path) -> None:
    """Make the folder of a file that will be written; before the long work, not after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent} cannot be made: {error.strerror}") from None


def _done(out: Path | None, json_file: Path | None, document: Any) -> None:
    if out is not None:
        console.print(f"written: {out}")
    if json_file is not None:
        _writable(json_file)
        report.write_json(json_file, document)
        console.print(f"written: {json_file}")


@contextmanager
def _progress() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Give a function that announces a step and returns what is told of its progress."""
    columns = (TextColumn("{task.description:<52}"), BarColumn(24), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=errors) as bars:

        def step(description: str) -> Callable[[int, int], None]:
            task = bars.add_task(description, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield step


def _print_finding(name: str, finding: experiment.Finding, out: Path) -> None:
    found = finding.report
    table = Table(title=f"What one direction does to {name} (held-out test prompts)")
    table.add_column("")
    methods = ("baseline", "ablated", "added", "orthogonalized")
    for method in methods:
        table.add_column(method, justify="right")
    for category in ("harmful", "harmless"):
        rates = found["refusal_rate"][category]
        table.add_row(f"{category} prompts refused", *(f"{100 * rates[m]:.1f} %" for m in methods))
    if found["capability"]:
        kept = found["capability"]
        table.add_row("skills", *(f"{100 * kept[m]:.1f} %" if m in kept else "" for m in methods))
    speed = {"baseline": "unmodified", "ablated": "fused", "orthogonalized": "orthogonalized"}
    ratios = [f"{found['speed'][speed[m]]['median']:.3f}" if m in speed else "" for m in methods]
    table.add_row("tokens/s over unmodified", *ratios)
    console.print(table)
    hooks, fused = found["speed"]["hooks"], found["speed"]["fused"]
    chosen = found["selection"]
    console.print(
        f"direction: layer {chosen['layer']}, position {chosen['position']}; "
        f"sites steered: {found['sites']['claimed']} of {found['sites']['expected']}; "
        f"largest |r.h| / |h|: {found['residual']['max_abs_score']:.1e}"
    )
    console.print(
        f"ablating with plain Python hooks: {hooks['median']:.3f} of the unmodified speed "
        f"(quartiles {hooks['quartiles'][0]:.3f} to {hooks['quartiles'][1]:.3f}); "
        f"with the fused patch: {fused['median']:.3f} "
        f"({fused['quartiles'][0]:.3f} to {fused['quartiles'][1]:.3f})\n"
    )
    for sample in finding.samples:
        console.print(Text(sample["prompt"], style="bold"))
        console.print(Text(f"  before:  {sample['before']}"))
        console.print(Text(f"  {sample['intervention'] + ':':<8} {sample['after']}", style="cyan"))
    console.print(f"\nwritten: {out}/report.json, samples.json, direction.safetensors, *.png")

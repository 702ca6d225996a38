"""The experiment, step by step or as a whole: demo, extract, select."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from refusal_kernels import demo as experiment
from refusal_kernels.commands.common import (
    BatchOption,
    DeviceOption,
    DtypeOption,
    FilterOption,
    HarmfulOption,
    HarmlessOption,
    JsonOption,
    ModelOption,
    SeedOption,
    SystemOption,
    ThinkingOption,
    console,
    errors,
    finish,
    progress_bars,
    writable,
)
from refusal_kernels.direction import read_tensors, write_tensors
from refusal_kernels.extraction import ChatFormat, mean_difference
from refusal_kernels.extraction.sources import SEED
from refusal_kernels.files import write_json
from refusal_kernels.loading import demo_material, filtered, load, prompts_for
from refusal_kernels.selection import select as select_

CANDIDATES = "refusal_kernels.candidates"


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
    with progress_bars() as step:
        finding = experiment.run(material, out, step, rounds=rounds)
    if json_file is not None:
        write_json(json_file, finding.report)
    _print_finding(material.name, finding, out)
    if finding.failed:
        errors.print(Text(f"not as expected: {'; '.join(finding.failed)}", style="red"))
        raise typer.Exit(1)


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
    seed: SeedOption = SEED,
    filter_prompts: FilterOption = False,
    system: SystemOption = None,
    thinking: ThinkingOption = False,
    batch_size: BatchOption = 32,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Compute the mean difference at every layer and end-of-instruction position."""
    prompts = prompts_for(model, "train", harmful, harmless, seed)
    writable(out)
    language_model, tokenizer = load(model, device, dtype)
    chat = ChatFormat(tokenizer, system, thinking=thinking)
    if filter_prompts:
        prompts = filtered(language_model, chat, prompts, batch_size=batch_size)
    with progress_bars() as step:
        candidates = mean_difference(
            language_model,
            chat,
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
    finish(out, json_file, {"candidates": str(out), "norm": norms.tolist(), "model": model})


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
    seed: SeedOption = SEED,
    filter_prompts: FilterOption = False,
    system: SystemOption = None,
    thinking: ThinkingOption = False,
    batch_size: BatchOption = 32,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Choose the direction by the paper's three scores, on validation prompts."""
    prompts = prompts_for(model, "validation", harmful, harmless, seed)
    tensors, _ = read_tensors(candidates, CANDIDATES, ("candidates",))
    writable(out)
    language_model, tokenizer = load(model, device, dtype)
    chat = ChatFormat(tokenizer, system, thinking=thinking)
    if filter_prompts:
        prompts = filtered(language_model, chat, prompts, batch_size=batch_size)
    with progress_bars() as step:
        selection = select_(
            language_model,
            chat,
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
    finish(out, json_file, selection.to_dict())


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

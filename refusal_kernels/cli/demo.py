"""The experiment as a whole: demo."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from refusal_kernels.cli.common import (
    DeviceOption,
    DtypeOption,
    HarmfulOption,
    HarmlessOption,
    JsonOption,
    ModelOption,
    console,
    errors,
    progress_bars,
)
from refusal_kernels.files.atomic import write_json
from refusal_kernels.research import demo as experiment
from refusal_kernels.research.prompts import demo_material


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


def _print_finding(name: str, finding: experiment.DemoResult, out: Path) -> None:
    found = finding.report
    table = Table(title=f"What one direction does to {name} (held-out test prompts)")
    table.add_column("")
    methods = ("unmodified", "ablated", "added", "orthogonalized")
    for method in methods:
        table.add_column(method, justify="right")
    for category in ("harmful", "harmless"):
        rates = found["refusal_rate"][category]
        table.add_row(f"{category} prompts refused", *(f"{100 * rates[m]:.1f} %" for m in methods))
    if found["capability"]:
        kept = found["capability"]
        table.add_row("skills", *(f"{100 * kept[m]:.1f} %" if m in kept else "" for m in methods))
    speed = {"unmodified": "unmodified", "ablated": "fused", "orthogonalized": "orthogonalized"}
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

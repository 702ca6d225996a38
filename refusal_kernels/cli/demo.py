"""The whole experiment: demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from rich.text import Text
from typer import Exit, Option

from refusal_kernels.cli import options
from refusal_kernels.cli.bars import progress_bars
from refusal_kernels.cli.common import choose_device, console, errors, prepare
from refusal_kernels.cli.groups import (
    LoadingOptions,
    PromptOptions,
    RefusalOptions,
    ThresholdOptions,
)
from refusal_kernels.files.atomic import write_json
from refusal_kernels.progress import single_step

if TYPE_CHECKING:
    from refusal_kernels.research.demo import DemoResult


def demo(
    *,
    loading: LoadingOptions,
    prompts: PromptOptions,
    refusals: RefusalOptions,
    thresholds: ThresholdOptions,
    out: Annotated[Path, Option(help="The folder of the report.")] = Path("out/demo"),
    rounds: Annotated[
        int | None, Option(min=2, help="Rounds of the speed comparison; default: 15, smollm2: 5.")
    ] = None,
    json_file: options.Json = None,
) -> None:
    """Show the paper's finding from beginning to end, on the toy model or on yours."""
    from refusal_kernels.research import demo as experiment

    prepare(json_file)
    choose_device(loading.device)
    with progress_bars() as step:
        with single_step(step("Load the model")):
            inputs = experiment.read_inputs(
                loading.model,
                prompts.harmful,
                prompts.harmless,
                seed=prompts.seed,
                column=prompts.column,
                selection={"refusal_tokens": refusals.tokens, **thresholds.arguments()},
                **vars(loading.how()),
            )
        result = experiment.run(inputs, out, step, rounds=rounds)
    if json_file is not None:
        write_json(json_file, result.report)
    _print(inputs.name, result, prompts.named("of the model"), out)
    if result.failed:
        errors.print(Text(f"not as expected: {'; '.join(result.failed)}", style="red"))
        raise Exit(1)


def _print(name: str, result: DemoResult, sources: str, out: Path) -> None:
    report = result.report
    table = Table(title=f"What one direction does to {name} (held-out test prompts)")
    table.add_column("")
    methods = ("unmodified", "ablated", "added", "orthogonalized")
    for method in methods:
        table.add_column(method, justify="right")
    for category in ("harmful", "harmless"):
        rates = report["refusal_rate"][category]
        table.add_row(f"{category} prompts refused", *(f"{100 * rates[m]:.1f} %" for m in methods))
        intervals = [report["refusal_interval"][category][m] for m in methods]
        cells = [f"{100 * low:.0f} to {100 * high:.0f}" for low, high in intervals]
        table.add_row("  95 % interval", *cells, style="dim")
    if kept := report["capability"]:
        table.add_row("skills", *(f"{100 * kept[m]:.1f} %" if m in kept else "" for m in methods))
    for text, loss in report["cross_entropy"].items():
        cells = [f"{loss[m]:.4f}" if m in loss else "" for m in methods]
        table.add_row(f"cross-entropy on {text}", *cells)
    speeds = report["speed"]
    ratios = [f"{speeds[m]['median']:.3f}" if m in speeds else "" for m in methods]
    table.add_row("tokens/s over unmodified", *ratios)
    console.print(table)
    used = "; ".join(
        f"{split} {part['harmful']} harmful, {part['harmless']} harmless"
        for split, part in report["prompts"].items()
    )
    console.print(f"prompts: {used} ({sources})", soft_wrap=True)
    random = [
        f"{100 * report['refusal_rate'][category][f'random {edit}']:.1f} % of {category} prompts "
        f"refused with it {edit}"
        for category, edit in (("harmful", "ablated"), ("harmless", "added"))
    ]
    console.print(f"control, a random direction: {', '.join(random)}", soft_wrap=True)
    hooks, ablated, chosen = speeds["hooks"], speeds["ablated"], report["selection"]
    tokens = ", ".join(map(repr, chosen["refusal_texts"]))
    console.print(Text(f"refusal tokens: {tokens}"), soft_wrap=True)
    console.print(
        f"direction: {chosen['method'].replace('_', ' ')}, layer {chosen['layer']}, "
        f"position {chosen['position']}; "
        f"sites steered: {report['sites']['claimed']} of {report['sites']['expected']}; "
        f"largest |r.h| / |h|: {report['residual']['max_abs_score']:.1e}"
    )
    console.print(
        f"ablating with plain Python hooks: {hooks['median']:.3f} of the unmodified speed "
        f"(quartiles {hooks['quartiles'][0]:.3f} to {hooks['quartiles'][1]:.3f}); "
        f"with the fused patch: {ablated['median']:.3f} "
        f"({ablated['quartiles'][0]:.3f} to {ablated['quartiles'][1]:.3f})\n"
    )
    for sample in result.samples:
        console.print(Text(sample["prompt"], style="bold"))
        console.print(Text(f"  before:  {sample['before']}"))
        console.print(Text(f"  {sample['intervention'] + ':':<8} {sample['after']}", style="cyan"))
    console.print(f"\nwritten: {out}/report.json, samples.json, direction.safetensors, *.png")

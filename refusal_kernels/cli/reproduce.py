"""The paper's protocol on one model, beside the paper's numbers: reproduce."""

import datetime
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from refusal_kernels import toy
from refusal_kernels.cli.common import (
    BatchOption,
    DeviceOption,
    DtypeOption,
    HarmfulOption,
    HarmlessOption,
    JsonOption,
    ModelOption,
    SystemOption,
    ThinkingOption,
    console,
    errors,
    finish,
    named_sources,
    progress_bars,
    read_direction,
    writable,
)
from refusal_kernels.environment import describe_device, versions
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import replacing, write_json
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.load import load
from refusal_kernels.hf.model import input_device
from refusal_kernels.research.evaluation.html import write_page
from refusal_kernels.research.evaluation.likelihood import context_of, read_passages
from refusal_kernels.research.evaluation.rates import Rate
from refusal_kernels.research.reproduction.paper import (
    BENCHMARKS,
    PASSAGES,
    Benchmarks,
    ProtocolInputs,
    read_paper_texts,
    read_protocol_prompts,
    toy_texts,
)
from refusal_kernels.research.reproduction.rows import (
    TOY_ROW,
    Comparison,
    RecordedRow,
    compare,
    is_rate,
    paper,
    paper_name,
    paper_rows,
    read_row,
    recorded,
)
from refusal_kernels.research.reproduction.run import Reproduction, run
from refusal_kernels.research.selection.scoring import paper_refusal_tokens
from refusal_kernels.research.sources import SEED

COLUMNS = ("", "found", "expected", "verdict", "source")


def reproduce(
    model: ModelOption = "toy",
    out: Annotated[
        Path, typer.Option(help="Folder of the results; what is in it already is used again.")
    ] = Path("out/reproduce"),
    harmful: HarmfulOption = None,
    harmless: HarmlessOption = None,
    harmful_test: Annotated[
        str | None, typer.Option(help="Prompts to test on; default: JailbreakBench, as the paper.")
    ] = None,
    direction: Annotated[
        Path | None,
        typer.Option(help="Measure this one (.safetensors, .pt), in place of the one found."),
    ] = None,
    texts: Annotated[
        int, typer.Option(min=0, help="Passages of the Pile and of Alpaca; 0 for none.")
    ] = PASSAGES,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]FILE", help="Cross-entropy on this in their place; several."),
    ] = None,
    benchmarks: Annotated[
        bool, typer.Option("--benchmarks", help="Also MMLU, ARC, GSM8K, TruthfulQA, by lm-eval.")
    ] = False,
    limit: Annotated[
        float | None, typer.Option(help="So many examples of each of these (below 1: share).")
    ] = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="Also random directions, other layers, and the dose.")
    ] = False,
    row: Annotated[
        str | None, typer.Option(help="Which of the paper's models it is; default: by its name.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Compare with this recorded row, not the paper's.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="Write what was found as a row to compare with.")
    ] = None,
    system: SystemOption = None,
    thinking: ThinkingOption = False,
    seed: Annotated[int, typer.Option(help="Of the splits and the random directions.")] = SEED,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Where an answer is cut; default: 512, toy: 64.")
    ] = None,
    batch_size: BatchOption = 32,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Run the paper's protocol, and set every number beside the paper's row, with tolerances.

    Extract, select, then refusals, cross-entropy and benchmarks under ablation, addition,
    subtraction and with orthogonalized weights. A run that was cut short goes on where it stopped.
    The exit code is 0 if no number is outside its tolerance, 1 if one is. Without a hub the toy
    model is compared with the row that was recorded of it.
    """
    rows = _rows(model, row, against)
    given = None if direction is None else read_direction(direction)
    prompts = read_protocol_prompts(model, harmful, harmless, harmful_test, seed)
    own_texts = named_sources(text or [], "--text")
    manager: Any = None
    if benchmarks:
        from refusal_kernels.research.evaluation.lm_eval import find_tasks

        manager = find_tasks([task for task, _, _ in BENCHMARKS.values()])
    for path in (out / "reproduction.json", record, json_file):
        if path is not None:
            writable(path)

    language_model, tokenizer = load(model, device, dtype, given)
    chat = ChatFormat(tokenizer, system, thinking=thinking)
    context = context_of(language_model)
    passages = {n: read_passages(Path(file), chat, context) for n, file in own_texts.items()}
    if not passages and model == "toy":
        passages = toy_texts(chat)
    elif not passages and texts:
        passages = read_paper_texts(chat, texts)
    material = ProtocolInputs(
        name="the toy model" if model == "toy" else model,
        model=language_model,
        tokenizer=chat,
        prompts=prompts,
        texts=passages,
        skills=toy.skills() if model == "toy" else {},
        # the paper's own where it is compared with; else found from the model's own refusals
        refusal_tokens=paper_refusal_tokens(language_model, chat)
        if paper_name(row or model)
        else None,
        direction=given,
        benchmarks=Benchmarks(manager, limit, min(batch_size, 16), seed) if benchmarks else None,
        max_new_tokens=max_new_tokens or (64 if model == "toy" else 512),
        batch_size=batch_size,
        seed=seed,
        controls=controls,
        identity=_identity(model, language_model),
    )
    with progress_bars() as step:
        found = run(material, out, step)
    comparisons = compare(found.numbers, rows)
    sources = [harmful, harmless, harmful_test, *(text or [])]
    if model != "toy" and any(source is not None for source in sources):
        found.notes.append("the prompts or texts are not the paper's: its numbers may not apply")
    about: dict[str, Any] = {
        "model": material.name,
        "versions": versions(),
        "device": describe_device(input_device(language_model)),
        "command": shlex.join(["refusal-kernels", *sys.argv[1:]]),
        "created": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    document = _write(out, found, comparisons, about)
    if record is not None:
        source = f"{material.name}, recorded"
        recorded(found.numbers, source, material.name).save(record)
    _print(material.name, found, comparisons, rows)
    finish(out / "reproduction.json", json_file, document)
    if any(c.verdict == "outside" for c in comparisons):
        raise typer.Exit(1)


def _rows(model: str, row: str | None, against: Path | None) -> list[RecordedRow]:
    """What there is to compare with."""
    if against is not None:
        return [read_row(against)]
    if row is not None and paper_name(row) is None:
        names = ", ".join(paper()["models"].values())
        raise InputError(f"--row is '{row}'; expected one of {names}")
    if model == "toy" and row is None:
        return [read_row(TOY_ROW)] if TOY_ROW.is_file() else []
    return paper_rows(row or model)


def _identity(name: str, model: Any) -> list[Any]:
    """What tells other weights of the same name: the commit on the hub, or size and time of files.

    Reading the weights to hash them would take longer than some of the steps.
    """
    folder = toy.PATH if name == "toy" else Path(name)
    if not folder.is_dir():
        return [getattr(model.config, "_commit_hash", None)]
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _write(
    out: Path, found: Reproduction, comparisons: Sequence[Comparison], about: dict[str, Any]
) -> dict[str, Any]:
    """Write JSON, table and page; return what the JSON holds."""
    rows = [c.to_dict() for c in comparisons]
    chosen = {key: value for key, value in found.selection.items() if key != "scores"}
    document = {
        **about,
        "selection": chosen,
        "prompts": found.prompts,
        "comparisons": rows,
        "notes": found.notes,
        "benchmarks": found.benchmarks,
    }
    write_json(out / "reproduction.json", document)
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *map(_cells, comparisons)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "".join(f"\n\n{note}" for note in found.notes)
    with replacing(out / "table.md") as temporary:
        temporary.write_text(f"# {about['model']}\n\n{table}{notes}\n", encoding="utf-8")
    harness = {"lm_eval": found.benchmarks} if found.benchmarks else {}
    page = {**found.evidence, **about, "selection": found.selection, "comparisons": rows}
    write_page(out / "evidence.html", page | harness)
    return document


def _cells(comparison: Comparison) -> tuple[str, ...]:
    """One line of the table; rates are shown in percent."""
    found, rate = comparison.measured, is_rate(comparison.quantity)

    def shown(value: float) -> str:
        return f"{100 * value:.1f}" if rate else f"{value:.4g}"

    unit, text, expected = " %" if rate else "", "", ""
    if found is not None:
        text = shown(found.value if isinstance(found, Rate) else found) + unit
    if isinstance(found, Rate):
        text += f" [{', '.join(map(shown, found.interval))}]"
    if comparison.expected is not None and comparison.low is not None:
        low, middle, high = comparison.low, comparison.expected, comparison.high or 0.0
        around = f"{shown(low)} to {shown(high)}"
        if abs((high - middle) - (middle - low)) < 1e-9:
            around = f"\u00b1 {shown(high - middle)}"
        expected = f"{shown(middle)}{unit} ({around})"
    return comparison.quantity, text, expected, comparison.verdict, comparison.source


def _print(
    name: str, found: Reproduction, comparisons: Sequence[Comparison], rows: Sequence[RecordedRow]
) -> None:
    used = "; ".join(
        f"{split} {part['harmful']} harmful, {part['harmless']} harmless"
        for split, part in found.prompts.items()
    )
    place = f"layer {found.selection['layer']}, position {found.selection['position']}"
    console.print(Text(f"{name}: direction of {place} (prompts: {used})"))
    sources = {c.source for c in comparisons if c.source}
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column in COLUMNS[: 4 + (len(sources) > 1)]:
        table.add_column(column, no_wrap=column in ("found", "verdict"), overflow="fold")
    styles = {"within": "green", "outside": "bold red"}
    for comparison in comparisons:
        cells = _cells(comparison)[: len(table.columns)]
        table.add_row(*map(Text, cells), style=styles.get(comparison.verdict))
    console.print(table)
    if found.reused:
        console.print(Text(f"used again: {', '.join(found.reused)}"))
    for note in found.notes:
        console.print(Text(f"note: {note}"))
    if not rows:
        names = ", ".join(paper()["models"])
        console.print(Text(f"there is no row of '{name}' to compare with; the paper has {names}"))
        return
    outside = [c.quantity for c in comparisons if c.verdict == "outside"]
    within = sum(c.verdict == "within" for c in comparisons)
    console.print(Text(f"{within} of {within + len(outside)} within tolerance, beside: ") + Text(
        "; ".join(row.source for row in rows)
    ))  # fmt: skip
    if outside:
        errors.print(Text(f"outside: {', '.join(outside)}", style="red"))

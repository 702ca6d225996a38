"""The paper's protocol on one model, beside the paper's numbers: reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text
from typer import Exit, Option

from refusal_kernels.cli import common, options
from refusal_kernels.cli.bars import progress_bars
from refusal_kernels.cli.groups import (
    ChatOptions,
    EngineOptions,
    PromptOptions,
    RefusalOptions,
    ThresholdOptions,
)
from refusal_kernels.cli.select import fail_without_winner
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import replacing, write_json

if TYPE_CHECKING:
    from refusal_kernels.research.reproduction.rows import Comparison, RecordedRow
    from refusal_kernels.research.reproduction.run import Reproduction

COLUMNS = ("", "measured", "expected", "verdict", "source")


def reproduce(
    *,
    loading: EngineOptions,
    prompts: PromptOptions,
    chat: ChatOptions,
    refusals: RefusalOptions,
    thresholds: ThresholdOptions,
    out: Annotated[
        Path, Option(help="The folder of the results; a run resumes from what is in it.")
    ] = Path("out/reproduce"),
    harmful_test: Annotated[
        str | None, Option(help="Prompts to test on; default: the paper's, JailbreakBench.")
    ] = None,
    direction: Annotated[
        Path | None,
        Option(help="Measure this direction (.safetensors, .pt) instead of finding one."),
    ] = None,
    texts: Annotated[
        int | None,
        Option(min=0, help="Passages of the Pile and of Alpaca; default: 4096, 0: none."),
    ] = None,
    text: Annotated[
        list[str] | None,
        Option(metavar="[NAME=]FILE", help="Texts instead of these; repeat for several."),
    ] = None,
    filter_prompts: Annotated[
        bool,
        Option(
            "--filter/--no-filter",
            help="Keep only harmful prompts that are refused, harmless ones answered.",
        ),
    ] = True,
    benchmarks: Annotated[
        bool, Option("--benchmarks", help="Also run MMLU, ARC, GSM8K and TruthfulQA.")
    ] = False,
    limit: Annotated[
        float | None, Option(help="The most examples of each benchmark (below 1: this share).")
    ] = None,
    controls: Annotated[
        bool, Option("--controls", help="Also random directions, other layers, the dose.")
    ] = False,
    row: Annotated[
        str | None, Option(help="The paper's model to compare with; default: by its name.")
    ] = None,
    against: Annotated[Path | None, Option(help="Compare with this recorded row instead.")] = None,
    record: Annotated[
        Path | None, Option(help="Write the results as a row to compare with.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, Option(min=1, help="The longest answer; default: 512, less for models by name.")
    ] = None,
    samples: options.Samples = options.SAMPLES,
    json_file: options.Json = None,
) -> None:
    """Run the paper's protocol, and compare every number with the paper's.

    Extract, select, then refusals, cross-entropy and benchmarks under ablation, addition,
    subtraction and with orthogonalized weights. An interrupted run resumes. The exit code is 0 if
    every number is within its tolerance, 1 if one is not or no candidate passes the thresholds. The
    toy model is compared with a recorded row of its own.
    """
    from refusal_kernels.hf.embedded import EMBEDDED
    from refusal_kernels.research import plots
    from refusal_kernels.research.evaluation.likelihood import (
        context_of,
        own_passages,
        read_passages,
    )
    from refusal_kernels.research.evaluation.tasks import MATCHES
    from refusal_kernels.research.reproduction import paper
    from refusal_kernels.research.reproduction.rows import compare, paper_name, recorded
    from refusal_kernels.research.reproduction.run import run
    from refusal_kernels.research.selection.scoring import AUTO, PAPER
    from refusal_kernels.research.sources import SIZES

    embedded = EMBEDDED.get(loading.model)
    rows = _rows(loading.model, row, against)
    given = None if direction is None else common.read_direction(direction)
    sources = prompts.harmful, prompts.harmless, harmful_test
    sets = paper.read_protocol_prompts(loading.model, *sources, prompts.seed, prompts.column)
    files = common.named_sources(text or [], "--text")
    suite = None
    if benchmarks and loading.engine == options.VLLM:
        raise InputError(f"--benchmarks needs --engine {options.TRANSFORMERS}")
    if benchmarks:
        from refusal_kernels.research.evaluation.lm_eval import find_tasks

        manager = find_tasks([task for task, _, _ in paper.BENCHMARKS.values()])
        suite = paper.Benchmarks(manager, limit, min(chat.batch_size, 16), prompts.seed)
    common.prepare(out / "reproduction.json", record, json_file)

    model, template = chat.load(loading, sets["train"], given, positions=None)
    context = context_of(model)
    passages = {name: read_passages(Path(file), template, context) for name, file in files.items()}
    if not passages and embedded is not None:
        passages = own_passages(model, template, embedded.material, SIZES["test"])
    elif not passages and texts != 0:
        passages = paper.read_paper_texts(template, texts or paper.PASSAGES)
    about, tokens = common.provenance(loading.model, model), refusals.tokens
    if tokens == AUTO and paper_name(row or loading.model):
        tokens = PAPER
    inputs = paper.ProtocolInputs(
        name=about["model"],
        model=model,
        tokenizer=template,
        prompts=sets,
        texts=passages,
        skills=embedded.material.skills() if embedded else {},
        match=MATCHES[embedded.match] if embedded else None,
        refusal_tokens=tokens,
        filter=filter_prompts,
        thresholds=thresholds.arguments(),
        direction=given,
        benchmarks=suite,
        max_new_tokens=max_new_tokens or (embedded.answer_tokens if embedded else 512),
        batch_size=chat.batch_size,
        seed=prompts.seed,
        controls=controls,
        identity=[
            *(identity_of(source, model) for source in _sources(loading)),
            [loading.load_in, loading.attn, loading.arguments()],
        ],
    )
    with progress_bars() as step:
        result = run(inputs, out, step)
    comparisons = compare(result.numbers, rows)
    others = [*sources, *(text or [])]
    if embedded is None and any(source is not None for source in others):
        result.notes.append("the prompts or texts are not the paper's: its numbers may not apply")
    document = _write(out, result, comparisons, about, samples)
    if not result.evidence:
        plots.plot_candidates(
            out / "candidates.png", result.selection["candidates"], None,
            thresholds=result.selection["thresholds"],
        )  # fmt: skip
        common.finish(out / "candidates.png", None, None)
    if record is not None and result.evidence:
        recorded(result.numbers, f"{inputs.name}, recorded", inputs.name).save(record)
    default = "of the paper" if embedded is None else "of the model"
    _print(inputs.name, result, prompts.named(default), comparisons, rows)
    common.finish(out / "reproduction.json", json_file, document)
    if not result.evidence:
        fail_without_winner(result.selection["problem"], out / "direction.safetensors")
    if any(c.verdict == "outside" for c in comparisons):
        raise Exit(1)


def _rows(model: str, row: str | None, against: Path | None) -> list[RecordedRow]:
    """Return the rows to compare with."""
    from refusal_kernels.hf.embedded import EMBEDDED
    from refusal_kernels.research.reproduction import rows

    if against is not None:
        return [rows.read_row(against)]
    if row is not None and rows.paper_name(row) is None:
        names = ", ".join(rows.paper_tables()["models"].values())
        raise InputError(f"--row is '{row}'; expected one of {names}")
    if model in EMBEDDED and row is None and (own := rows.own_row(model)).is_file():
        return [rows.read_row(own)]
    return rows.paper_rows(row or model)


def _sources(loading: EngineOptions) -> list[Path]:
    """Return what the weights are read from: the model, and the adapters that are merged."""
    from refusal_kernels.hf.embedded import EMBEDDED

    embedded = EMBEDDED.get(loading.model)
    model = embedded.folder() if embedded else Path(loading.model)
    return [model, *(Path(a) for a in (embedded and embedded.adapter, loading.adapter) if a)]


def identity_of(source: Path, model: Any) -> list[Any]:
    """Identify the weights: their commit on the hub, or the sizes and times of the files.

    Hashing the weights would take longer than some of the steps.
    """
    if not source.exists():  # the hub's; its files lie in a folder that is named by the commit
        from huggingface_hub import try_to_load_from_cache

        adapter = try_to_load_from_cache(str(source), "adapter_config.json")
        commit = getattr(model.config, "_commit_hash", None)
        return [str(source), Path(adapter).parent.name if isinstance(adapter, str) else commit]
    files = (
        sorted(file for file in source.iterdir() if file.is_file()) if source.is_dir() else [source]
    )
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _write(
    out: Path,
    result: Reproduction,
    comparisons: Sequence[Comparison],
    about: dict[str, Any],
    samples: int,
) -> dict[str, Any]:
    """Write JSON, table and page; return what the JSON holds."""
    from refusal_kernels.research.evaluation.html import write_page

    rows = [c.to_dict() for c in comparisons]
    chosen = {key: value for key, value in result.selection.items() if key != "candidates"}
    document = {
        **about,
        "selection": chosen,
        "prompts": result.prompts,
        "removed": result.removed,
        "comparisons": rows,
        "notes": result.notes,
        "benchmarks": result.benchmarks,
    }
    write_json(out / "reproduction.json", document)
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *map(_cells, comparisons)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "".join(f"\n\n{note}" for note in result.notes)
    with replacing(out / "table.md") as temporary:
        temporary.write_text(f"# {about['model']}\n\n{table}{notes}\n", encoding="utf-8")
    if not result.evidence:
        return document
    harness = {"lm_eval": result.benchmarks} if result.benchmarks else {}
    page = {**result.evidence, **about, "selection": result.selection, "comparisons": rows}
    write_page(out / "evidence.html", page | harness, samples=samples)
    return document


def _cells(comparison: Comparison) -> tuple[str, ...]:
    """One line of the table; rates are shown in percent."""
    from refusal_kernels.research.evaluation.rates import Rate
    from refusal_kernels.research.reproduction.rows import is_rate

    measured, rate = comparison.measured, is_rate(comparison.quantity)

    def shown(value: float) -> str:
        return f"{100 * value:.1f}" if rate else f"{value:.4g}"

    unit, text, expected = " %" if rate else "", "", ""
    if measured is not None:
        text = shown(measured.value if isinstance(measured, Rate) else measured) + unit
    if isinstance(measured, Rate):
        text += f" [{', '.join(map(shown, measured.interval))}]"
    if comparison.expected is not None and comparison.low is not None:
        low, middle, high = comparison.low, comparison.expected, comparison.high or 0.0
        around = f"{shown(low)} to {shown(high)}"
        if abs((high - middle) - (middle - low)) < 1e-9:
            around = f"\u00b1 {shown(high - middle)}"
        expected = f"{shown(middle)}{unit} ({around})"
    return comparison.quantity, text, expected, comparison.verdict, comparison.source


def _print(
    name: str,
    result: Reproduction,
    prompts: str,
    comparisons: Sequence[Comparison],
    rows: Sequence[RecordedRow],
) -> None:
    from refusal_kernels.research.reproduction.rows import paper_tables

    used = "; ".join(
        f"{split} {part['harmful']} harmful, {part['harmless']} harmless"
        for split, part in result.prompts.items()
    )
    chosen = result.selection
    place = f"layer {chosen['layer']}, position {chosen['position']}"
    found = "no direction" if chosen["position"] is None else f"direction of {place}"
    common.console.print(Text(f"{name}: {found}"), soft_wrap=True)
    common.console.print(Text(f"prompts: {used} ({prompts})"), soft_wrap=True)
    pairs = zip(chosen["refusal_tokens"], chosen["refusal_texts"], strict=True)
    shown = ", ".join(f"{token} {text!r}" for token, text in pairs)
    common.console.print(Text(f"refusal tokens: {shown}"), soft_wrap=True)
    for split, categories in result.removed.items():
        counts = ", ".join(f"{len(gone)} {category}" for category, gone in categories.items())
        common.console.print(
            Text(f"filter: of {split}, {counts} prompts removed by their refusal score"),
            soft_wrap=True,
        )
    sources = {c.source for c in comparisons if c.source}
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column in COLUMNS[: 4 + (len(sources) > 1)]:
        table.add_column(column, no_wrap=column in ("measured", "verdict"), overflow="fold")
    styles = {"within": "green", "outside": "bold red"}
    for comparison in comparisons:
        cells = _cells(comparison)[: len(table.columns)]
        table.add_row(*map(Text, cells), style=styles.get(comparison.verdict))
    common.console.print(table)
    if result.reused:
        common.console.print(Text(f"used again: {', '.join(result.reused)}"))
    for note in result.notes:
        common.console.print(Text(f"note: {note}"), soft_wrap=True)
    if not rows:
        names = ", ".join(paper_tables()["models"])
        common.console.print(
            Text(f"there is no row of '{name}' to compare with; the paper has {names}")
        )
        return
    outside = [c.quantity for c in comparisons if c.verdict == "outside"]
    within = sum(c.verdict == "within" for c in comparisons)
    beside = "; ".join(row.source for row in rows)
    count = f"{within} of {within + len(outside)}"
    common.console.print(Text(f"{count} within tolerance, beside: {beside}"))
    if outside:
        common.errors.print(Text(f"outside: {', '.join(outside)}", style="red"))

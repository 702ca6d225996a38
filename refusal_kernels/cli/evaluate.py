"""All measurements of one direction: evaluate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from rich.text import Text
from typer import Option

from refusal_kernels.cli import common, options
from refusal_kernels.cli.bars import progress_bars
from refusal_kernels.cli.groups import ChatOptions, EngineOptions, RefusalOptions, SplitOptions
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import read_json

_MATCHES = options.names("research.evaluation.tasks", "MATCHES")
_JUDGES = options.names("research.evaluation.judges", "JUDGES")
# what --quick leaves
QUICK_PROMPTS, QUICK_STRENGTHS, QUICK_LAYERS = 32, (-1.0, 0.0, 1.0, 2.5), 3
LAYERS = 8  # other layers as controls


def evaluate(
    direction: options.Direction,
    *,
    loading: EngineOptions,
    prompts: SplitOptions,
    chat: ChatOptions,
    refusals: RefusalOptions,
    more_prompts: Annotated[
        list[str] | None,
        Option(
            "--prompts", metavar="NAME=SOURCE", help="One more set of prompts; repeat for several."
        ),
    ] = None,
    max_prompts: Annotated[
        int | None, Option(min=1, help="The most prompts of each set; default: all.")
    ] = None,
    block_input: Annotated[
        int | None, Option(help="Add at the input of this block; default: the file's layer.")
    ] = None,
    candidates: Annotated[
        Path | None, Option(help="From 'extract': other layers' directions are controls.")
    ] = None,
    selection: Annotated[
        Path | None, Option(help="The JSON of 'select': its refusal tokens and scores.")
    ] = None,
    judge: Annotated[
        list[str] | None,
        Option(
            metavar="JUDGE",
            help=f"{', '.join(_JUDGES)}, with what it needs after a colon, or the name of a model "
            "(MODEL#LABEL: a classifier's label); repeat for several. Default: substrings.",
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        Option(
            metavar="[NAME=]FILE",
            help="Measure the cross-entropy of this text or .jsonl; repeat for several.",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        Option(metavar="[NAME=]FILE", help="A .jsonl of prompt and answer; repeat for several."),
    ] = None,
    match: Annotated[
        str | None,
        options.choice("When an answer to a task is right: {}; default: exact.", _MATCHES),
    ] = None,
    lm_eval: Annotated[
        str | None, Option(metavar="TASK,...", help="Tasks of the lm-evaluation-harness.")
    ] = None,
    lm_eval_include: Annotated[
        Path | None, Option(help="A folder with more task files of the harness.")
    ] = None,
    limit: Annotated[
        float | None,
        Option(help="The most examples of a harness task (below 1: this share of them)."),
    ] = None,
    num_fewshot: Annotated[
        int | None, Option(min=0, help="Examples the harness shows; default: the task's.")
    ] = None,
    lm_eval_chat: Annotated[
        bool, Option("--lm-eval-chat", help="Ask the harness's questions in the chat format.")
    ] = False,
    strengths: Annotated[
        str | None,
        Option(help="Strengths of the dose, such as -1,0,1; '' for none. Default: eight."),
    ] = None,
    random_controls: Annotated[int, Option(min=0, help="Random directions as controls.")] = 3,
    layer_controls: Annotated[
        int | None, Option(min=0, help="Other layers as controls, evenly spaced; default: 8.")
    ] = None,
    quick: Annotated[bool, Option("--quick", help="Fewer prompts, strengths and layers.")] = False,
    report: Annotated[Path | None, Option(help="Write an HTML page here.")] = None,
    samples: options.Samples = options.SAMPLES,
    max_new_tokens: options.NewTokens = options.ANSWER_TOKENS,
    json_file: options.Json = None,
) -> None:
    """Measure whether a direction is necessary, sufficient and specific, and what it costs.

    Refusals with the direction ablated, added and subtracted, beside controls; the dose;
    cross-entropy, tasks with one right answer, and the lm-evaluation-harness. Every rate has a
    Wilson interval and names its judge.
    """
    loaded = common.read_direction(direction)
    at = loaded.layer if block_input is None else block_input
    if at is None:
        raise InputError(f"{direction} does not say at which layer to add; give --block-input")

    from refusal_kernels.direction import Candidates
    from refusal_kernels.hf.embedded import EMBEDDED
    from refusal_kernels.research.evaluation import evidence
    from refusal_kernels.research.evaluation.html import write_page
    from refusal_kernels.research.evaluation.judges import check_judge
    from refusal_kernels.research.evaluation.likelihood import (
        context_of,
        own_passages,
        read_passages,
    )
    from refusal_kernels.research.evaluation.tasks import MATCHES, read_pairs
    from refusal_kernels.research.sources import read_prompts

    doses: Sequence[float] = evidence.STRENGTHS if strengths is None else _numbers(strengths)
    sets = prompts.read(loading.model, "test")
    more = common.named_sources(more_prompts or [], "--prompts", needs_name=True)
    for name, file in more.items():
        if name in sets:
            raise InputError(f"--prompts {name}=...: there is a set of that name already")
        sets[name] = read_prompts(file, prompts.column)
    most = max_prompts or (QUICK_PROMPTS if quick else None)
    sets = {name: list(texts)[:most] for name, texts in sets.items()}
    if quick:
        doses = QUICK_STRENGTHS if strengths is None else doses
        layer_controls = QUICK_LAYERS if layer_controls is None else layer_controls
    tasks = {n: read_pairs(Path(f)) for n, f in common.named_sources(task or [], "--task").items()}
    chosen = None if selection is None else read_selection(selection)
    tokens: Any = refusals.tokens
    if chosen is not None and tokens == options.AUTO:
        tokens = chosen["refusal_tokens"]
    others = None if candidates is None else Candidates.load(candidates)
    if lm_eval is not None and loading.engine == options.VLLM:
        raise InputError(f"--lm-eval needs --engine {options.TRANSFORMERS}")
    if lm_eval is not None:
        from refusal_kernels.research.evaluation.lm_eval import find_tasks, run_tasks

        asked = lm_eval.split(",")
        manager = find_tasks(asked, lm_eval_include)
    for spec in judge or ():
        check_judge(spec)
    common.prepare(report, json_file)

    model, template = chat.load(loading, sets, loaded, positions=1)
    used = prompts.tell(sets, "test", more)
    context = context_of(model)
    files = common.named_sources(text or [], "--text")
    passages = {name: read_passages(Path(file), template, context) for name, file in files.items()}
    if embedded := EMBEDDED.get(loading.model):
        tasks = {**embedded.material.skills(), **tasks}
        passages = {**passages, **own_passages(model, template, embedded.material, most)}
        match = match or embedded.match

    failed: InputError | None = None
    with progress_bars() as step:
        document = evidence.evaluate(
            model,
            template,
            loaded,
            harmful=sets.pop("harmful"),
            harmless=sets.pop("harmless"),
            extra=sets,
            judges=judge or ["substrings"],
            candidates=others,
            refusal_tokens=tokens,
            block_input=at,
            skills=tasks,
            match=MATCHES[match or "exact"],
            texts=passages,
            strengths=doses,
            random_controls=random_controls,
            layer_controls=LAYERS if layer_controls is None else layer_controls,
            seed=prompts.seed,
            max_new_tokens=max_new_tokens,
            batch_size=chat.batch_size,
            step=step,
        ).to_dict()
        if lm_eval is not None:
            from refusal_kernels.interventions import Ablate, Add

            edits = {
                evidence.UNMODIFIED: None,
                evidence.ABLATED: Ablate(loaded),
                evidence.ADDED: Add(loaded, block_input=at),
            }
            try:
                results = run_tasks(
                    model, template.tokenizer, edits, tasks=asked, manager=manager, limit=limit,
                    num_fewshot=num_fewshot, chat=lm_eval_chat, batch_size=min(chat.batch_size, 16),
                    system=chat.system if lm_eval_chat else None, seed=prompts.seed,
                    progress=step("lm-eval"),
                )  # fmt: skip
            except InputError as error:  # what was measured before is written first
                results, failed = {}, error
            # the parts of a group, such as the 57 of mmlu, are in the JSON alone
            for key, wanted in (("lm_eval", True), ("lm_eval_parts", False)):
                document[key] = {
                    edit: {name: r for name, r in tasks.items() if (name in asked) is wanted}
                    for edit, tasks in results.items()
                }
    document |= {
        **common.provenance(loading.model, model),
        "selection": chosen,
        "sources": {
            f"{name} prompts": f"{part['source']} ({part['split']}: {part['count']})"
            for name, part in used.items()
        },
    }
    _print_evidence(document)
    if document["refusal_tokens"] is not None:
        refusals.tell(template, document["refusal_tokens"])
    if report is not None:
        write_page(report, document, samples=samples)
    common.finish(report, json_file, document)
    if failed is not None:
        raise failed


def read_selection(path: Path) -> dict[str, Any]:
    """Read what 'select --json' wrote."""
    selection = read_json(path)
    try:
        if "scores" in selection:  # the key's older name
            selection["candidates"] = selection.pop("scores")
        rows, tokens = selection["candidates"], selection["refusal_tokens"]
        chosen, *places = [(row["position"], row["layer"]) for row in (selection, *rows)]
        scores = [row[name] for row in rows for name in ("bypass", "induce", "kl")]
        fits = (
            isinstance(tokens, list) and len(tokens) > 0 and chosen in (*places, (None, None))
            and all(type(number) is int for number in tokens)
            and all(type(n) is int and abs(n) < 1000 for place in places for n in place)
            and all(score is None or isinstance(score, int | float) for score in scores)
            and all("discarded" in row for row in rows)
        )  # fmt: skip
    except (AttributeError, KeyError, TypeError):
        fits = False
    if not fits:
        raise InputError(f"{path} is no selection; expected what 'select --json' writes")
    return dict(selection)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"--strengths is '{text}'; expected numbers, as -1,0,1") from None


def _print_evidence(document: Mapping[str, Any]) -> None:
    from refusal_kernels.research.evaluation.conditions import DESTROYED_KL
    from refusal_kernels.research.evaluation.evidence import MAIN, UNMODIFIED
    from refusal_kernels.research.evaluation.statements import decimal, percent, statements

    def cell(rate: Mapping[str, Any]) -> str:
        return percent(rate).partition(" of ")[0]

    conditions, judges, parts = document["conditions"], document["judges"], document["prompts"]
    for judge in judges:
        table = Table("", *parts, title=f"{judge['counts'].capitalize()} (judge: {judge['name']})")
        for name, condition in conditions.items():
            rates = condition["rates"]
            cells = [cell(rates[p][judge["name"]]) if p in rates else "\u2013" for p in parts]
            table.add_row(name, *cells)
        common.console.print(table)
    for kind, rows in document["dose"].items():
        columns = ("strength", "harmful", "harmless", "KL", "cross-entropy")
        table = Table(*columns, title=f"Dose of the {kind} (judge: {judges[0]['name']})")
        for row in rows:
            rates = [cell(row[part]) for part in ("harmful", "harmless")]
            loss = "\u2013" if row["loss"] is None else f"{row['loss']['nats']:.4f}"
            ruined = row["kl"] > DESTROYED_KL
            kl = decimal(row["kl"], 4) + (" (destroyed)" if ruined else "")
            table.add_row(f"{row['strength']:g}", *rates, kl, loss, style="dim" if ruined else None)
        common.console.print(table)
    table = Table("capability", *MAIN, title="Cross-entropy (nats) and right answers")
    for text in conditions[UNMODIFIED]["losses"]:
        losses = [conditions[name]["losses"][text]["nats"] for name in MAIN]
        table.add_row(text, *(f"{nats:.4f}" for nats in losses))
    for task in conditions[UNMODIFIED]["skills"]:
        table.add_row(task, *(cell(conditions[name]["skills"][task]) for name in MAIN))
    harness = document.get("lm_eval", {})
    for task, metrics in harness.get(UNMODIFIED, {}).items():
        for metric in metrics:
            values = [harness.get(name, {}).get(task, {}).get(metric) for name in MAIN]
            cells = ["" if m is None else f"{m['value']:.4f}" for m in values]
            table.add_row(f"{task} {metric}", *cells)
    if table.row_count:
        common.console.print(table)
    for statement in statements(document):
        mark = {True: " (intervals apart)", False: " (not shown)", None: ""}[statement.holds]
        common.console.print(Text(f"{statement.question}{mark}: {statement.text}"))
    for note in document["notes"]:
        common.errors.print(Text(f"note: {note}"), soft_wrap=True)

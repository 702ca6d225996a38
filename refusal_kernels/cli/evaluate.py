"""What a direction does: evaluate, generate."""

import datetime
import functools
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from refusal_kernels import toy
from refusal_kernels.cli.common import (
    BatchOption,
    DeviceOption,
    DirectionOption,
    DtypeOption,
    HarmfulOption,
    HarmlessOption,
    JsonOption,
    ModelOption,
    NewTokensOption,
    SystemOption,
    ThinkingOption,
    console,
    finish,
    named_sources,
    progress_bars,
    read_direction,
    writable,
)
from refusal_kernels.direction import Direction, read_tensors
from refusal_kernels.environment import describe_device, versions
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import read_json
from refusal_kernels.files.convert import CANDIDATES
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.generate import generate as generate_
from refusal_kernels.hf.load import load
from refusal_kernels.hf.model import input_device
from refusal_kernels.interventions import Ablate, Add, Intervention
from refusal_kernels.patching.patch import patch
from refusal_kernels.research.evaluation.evidence import (
    ABLATED,
    ADDED,
    MAIN,
    STRENGTHS,
    UNMODIFIED,
)
from refusal_kernels.research.evaluation.evidence import evaluate as gather_evidence
from refusal_kernels.research.evaluation.html import write_page
from refusal_kernels.research.evaluation.likelihood import answers, context_of, read_passages
from refusal_kernels.research.evaluation.statements import percent, statements
from refusal_kernels.research.evaluation.tasks import MATCHES, read_pairs
from refusal_kernels.research.prompts import prompts_for
from refusal_kernels.research.sources import SEED
from refusal_kernels.toy.world import phrase, plan, requests

SPLITS = ("test", "validation", "train")
DOSES = ",".join(f"{strength:g}" for strength in STRENGTHS)
# what --quick leaves
QUICK_PROMPTS, QUICK_STRENGTHS, QUICK_LAYERS = 32, (-1.0, 0.0, 1.0, 2.5), 3


def evaluate(
    direction: DirectionOption,
    model: ModelOption = "toy",
    harmful: HarmfulOption = None,
    harmless: HarmlessOption = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SOURCE", help="A further set of prompts; several."),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Of the prompts: test, validation, train, or all.")
    ] = "test",
    max_prompts: Annotated[
        int | None, typer.Option(min=1, help="The first so many of each set; default: all.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Add here; default: the file's.")] = None,
    candidates: Annotated[
        Path | None, typer.Option(help="From 'extract': other layers' directions as controls.")
    ] = None,
    selection: Annotated[
        Path | None, typer.Option(help="The JSON of 'select': its refusal tokens and scores.")
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="JUDGE",
            help="substrings, tokens, or a model (MODEL#LABEL: a classifier's label); several.",
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]FILE", help="Cross-entropy on this: text, .jsonl; several."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]FILE", help=".jsonl of prompt and answer; several."),
    ] = None,
    match: Annotated[str, typer.Option(help="When an answer is right: exact or contains.")] = (
        "exact"
    ),
    lm_eval: Annotated[
        str | None, typer.Option(metavar="TASK,...", help="Tasks of the lm-evaluation-harness.")
    ] = None,
    lm_eval_include: Annotated[
        Path | None, typer.Option(help="A folder with more of its task files.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(help="So many examples of each of its tasks (below 1: share).")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples it shows; default: the task's.")
    ] = None,
    lm_eval_chat: Annotated[bool, typer.Option(help="Ask its questions in the chat format.")] = (
        False
    ),
    strengths: Annotated[str, typer.Option(help="Of the dose; '' for none.")] = DOSES,
    random_controls: Annotated[int, typer.Option(min=0, help="Random directions.")] = 3,
    layer_controls: Annotated[int, typer.Option(min=0, help="Other layers, evenly spaced.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the splits and the random directions.")] = SEED,
    quick: Annotated[bool, typer.Option("--quick", help="Few prompts, strengths, layers.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write the HTML page here.")] = None,
    system: SystemOption = None,
    thinking: ThinkingOption = False,
    max_new_tokens: NewTokensOption = 64,
    batch_size: BatchOption = 64,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Ask everything about a direction: is it necessary, sufficient, specific; what does it cost.

    Refusals with it ablated, added, subtracted, and beside controls; the dose; cross-entropy,
    tasks with one right answer, and the lm-evaluation-harness. Every rate has a Wilson interval
    and names its judge.
    """
    if split not in (*SPLITS, "all"):
        raise InputError(f"--split is '{split}'; expected one of {', '.join(SPLITS)}, all")
    loaded = read_direction(direction)
    at = _layer(loaded, layer, direction)
    doses = _strengths(strengths)
    sets: dict[str, Sequence[str]] = dict(
        prompts_for(model, None if split == "all" else split, harmful, harmless, seed)
    )
    more = named_sources(prompts or [], "--prompts", needs_name=True)
    for name, file in more.items():
        if name in sets:
            raise InputError(f"--prompts {name}=...: there is a set of that name already")
        sets[name] = prompts_for("", None, file, file)["harmful"]
    most = max_prompts or (QUICK_PROMPTS if quick else None)
    sets = {name: list(own)[:most] for name, own in sets.items()}
    if quick:
        doses = [s for s in doses if s in QUICK_STRENGTHS]
        layer_controls = min(layer_controls, QUICK_LAYERS)
    tasks = {n: read_pairs(Path(f)) for n, f in named_sources(task or [], "--task").items()}
    if match not in MATCHES:
        raise InputError(f"--match is '{match}'; expected one of {', '.join(MATCHES)}")
    chosen = None if selection is None else read_selection(selection)
    vectors = None
    if candidates is not None:
        vectors = read_tensors(candidates, CANDIDATES, ("candidates",))[0]["candidates"]
    harness: Callable[..., Any] | None = None
    if lm_eval is not None:
        from refusal_kernels.research.evaluation.lm_eval import find_tasks, run_tasks

        asked = lm_eval.split(",")
        harness = functools.partial(
            run_tasks, tasks=asked, manager=find_tasks(asked, lm_eval_include), limit=limit,
            num_fewshot=num_fewshot, chat=lm_eval_chat, system=system if lm_eval_chat else None,
            batch_size=min(batch_size, 16), seed=seed,
        )  # fmt: skip
    for path in (report, json_file):
        if path is not None:
            writable(path)

    language_model, tokenizer = load(model, device, dtype, loaded)
    chat = ChatFormat(tokenizer, system, thinking=thinking)
    context = context_of(language_model)
    texts = {
        name: read_passages(Path(file), chat, context)
        for name, file in named_sources(text or [], "--text").items()
    }
    if model == "toy":
        plans = [(phrase(request), plan(request)) for request in requests("harmless", "test")]
        tasks = {**toy.skills(), **tasks}
        texts = {**texts, "plans": answers(chat, plans[:most])}
    tokens = chosen["refusal_tokens"] if chosen is not None else None

    with progress_bars() as step:
        evidence = gather_evidence(
            language_model,
            chat,
            loaded,
            harmful=sets.pop("harmful"),
            harmless=sets.pop("harmless"),
            extra=sets,
            judges=judge or ["substrings"],
            candidates=vectors,
            refusal_tokens=tokens,
            layer=at,
            skills=tasks,
            match=MATCHES[match],
            texts=texts,
            strengths=doses,
            random_controls=random_controls,
            layer_controls=layer_controls,
            seed=seed,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            step=step,
        )
        document = evidence.to_dict()
        if harness is not None:
            edits = {UNMODIFIED: None, ABLATED: Ablate(loaded), ADDED: Add(loaded, layer=at)}
            found = harness(language_model, tokenizer, edits, progress=step("lm-eval"))
            # what a group consists of, as mmlu of 57, is in the JSON alone
            document["lm_eval"], document["lm_eval_parts"] = (
                {
                    edit: {task: own for task, own in tasks.items() if (task in asked) is wanted}
                    for edit, tasks in found.items()
                }
                for wanted in (True, False)
            )
    document |= {
        "model": "the toy model" if model == "toy" else model,
        "selection": chosen,
        "sources": {
            "harmful prompts": f"{harmful or 'of the toy model'} (split: {split})",
            "harmless prompts": f"{harmless or 'of the toy model'} (split: {split})",
            **{f"{name} prompts": file for name, file in more.items()},
        },
        "versions": versions(),
        "device": describe_device(input_device(language_model)),
        "command": shlex.join(["refusal-kernels", *sys.argv[1:]]),
        "created": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    _print_evidence(document)
    if report is not None:
        write_page(report, document)
    finish(report, json_file, document)


def read_selection(path: Path) -> dict[str, Any]:
    """Read what 'select --json' wrote.

    Raises
    ------
    InputError
        If the file is missing or something else.
    """
    found = read_json(path)
    if not isinstance(found, dict) or not (
        type(found.get("position")) is type(found.get("layer")) is int
        and _list_of(found.get("refusal_tokens"), lambda token: type(token) is int)
        and _list_of(found.get("scores"), _is_score)
        and any(_place(row) == _place(found) for row in found["scores"])
    ):
        raise InputError(f"{path} is no selection; expected what 'select --json' writes")
    return found


def _list_of(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(fits, value))


def _is_score(row: Any) -> bool:
    """Whether it is one candidate's row."""
    if not isinstance(row, dict) or not {"discarded", "bypass", "induce", "kl"} <= set(row):
        return False
    scores = [row[key] for key in ("bypass", "induce", "kl")]
    return all(type(place) is int and abs(place) < 1000 for place in _place(row)) and all(
        score is None or isinstance(score, int | float) for score in scores
    )


def _place(row: Mapping[str, Any]) -> tuple[Any, Any]:
    return row.get("position"), row.get("layer")


def _strengths(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"--strengths is '{text}'; expected numbers, as -1,0,1") from None


def _cell(rate: Mapping[str, Any]) -> str:
    return percent(rate).partition(" of ")[0]


def _print_evidence(document: Mapping[str, Any]) -> None:
    conditions, judges, parts = document["conditions"], document["judges"], document["prompts"]
    for judge in judges:
        table = Table("", *parts, title=f"{judge['counts'].capitalize()} (judge: {judge['name']})")
        for name, condition in conditions.items():
            rates = condition["rates"]
            cells = [_cell(rates[p][judge["name"]]) if p in rates else "" for p in parts]
            table.add_row(name, *cells)
        console.print(table)
    for kind, rows in document["dose"].items():
        columns = ("strength", "harmful", "harmless", "KL", "cross-entropy")
        table = Table(*columns, title=f"Dose of the {kind} (judge: {judges[0]['name']})")
        for row in rows:
            rates = [_cell(row[part]) for part in ("harmful", "harmless")]
            loss = "" if row["loss"] is None else f"{row['loss']['nats']:.4f}"
            table.add_row(f"{row['strength']:g}", *rates, f"{row['kl']:.4f}", loss)
        console.print(table)
    table = Table("capability", *MAIN, title="Cross-entropy (nats) and right answers")
    before = conditions[UNMODIFIED]
    for text in before["losses"]:
        losses = [conditions[name]["losses"][text]["nats"] for name in MAIN]
        table.add_row(text, *(f"{nats:.4f}" for nats in losses))
    for task in before["skills"]:
        table.add_row(task, *(_cell(conditions[name]["skills"][task]) for name in MAIN))
    for task, metrics in document.get("lm_eval", {}).get(UNMODIFIED, {}).items():
        for metric in metrics:
            own = [document["lm_eval"].get(name, {}).get(task, {}).get(metric) for name in MAIN]
            cells = ["" if m is None else f"{m['value']:.4f}" for m in own]
            table.add_row(f"{task} {metric}", *cells)
    if table.row_count:
        console.print(table)
    for statement in statements(document):
        mark = {True: " (intervals apart)", False: " (not shown)", None: ""}[statement.holds]
        console.print(Text(f"{statement.question}{mark}: {statement.text}"))


def generate(
    prompt: Annotated[list[str], typer.Argument(help="One or more instructions.")],
    direction: Annotated[Path | None, typer.Option(help="Steer with this one.")] = None,
    model: ModelOption = "toy",
    add: Annotated[bool, typer.Option("--add", help="Add the direction, not ablate it.")] = False,
    layer: Annotated[int | None, typer.Option(help="Add here; default: the file's.")] = None,
    strength: Annotated[float, typer.Option(help="1 is the edit as defined, 0 none.")] = 1.0,
    system: SystemOption = None,
    thinking: ThinkingOption = False,
    max_new_tokens: NewTokensOption = 64,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Answer prompts greedily, with a direction ablated or added, or without."""
    intervention: Intervention | None = None
    loaded = None
    if direction is not None:
        loaded = read_direction(direction)
        intervention = (
            Add(loaded, strength=strength, layer=_layer(loaded, layer, direction))
            if add
            else Ablate(loaded, strength, layer=layer)
        )
    language_model, tokenizer = load(model, device, dtype, loaded)
    chat = ChatFormat(tokenizer, system, thinking=thinking)
    found = {"unmodified": generate_(language_model, chat, prompt, max_new_tokens)}
    if intervention is not None:
        name = type(intervention).__name__.lower()
        with patch(language_model, intervention):
            found[name] = generate_(language_model, chat, prompt, max_new_tokens)
    for i, text in enumerate(prompt):
        console.print(Text(text, style="bold"))
        for name, texts in found.items():
            console.print(Text(f"  {name}: {texts[i]}"))
    finish(None, json_file, {"prompts": prompt, **found})


def _layer(direction: Direction, layer: int | None, path: Path) -> int:
    chosen = direction.layer if layer is None else layer
    if chosen is None:
        raise InputError(f"{path} does not say at which layer to add; give --layer")
    return chosen

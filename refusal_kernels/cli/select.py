"""The second step of the experiment: one direction of the candidates."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from refusal_kernels.cli.common import (
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
    finish,
    progress_bars,
    unfinished,
    writable,
)
from refusal_kernels.direction import MEAN_DIFFERENCE, read_tensors
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import sweep
from refusal_kernels.files.convert import CANDIDATES
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.load import load
from refusal_kernels.research import plots
from refusal_kernels.research.prompts import filtered, prompts_for
from refusal_kernels.research.selection.algorithm import AUTO, PAPER, Selection
from refusal_kernels.research.selection.algorithm import select as select_
from refusal_kernels.research.sources import SEED


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
    plot: Annotated[
        Path | None, typer.Option(help="The heat map of all scores. Default: beside the direction.")
    ] = None,
    refusal_tokens: Annotated[
        str,
        typer.Option(
            help="Tokens that begin a refusal: 'auto' (found from the model's own refusals), "
            "'paper' (its table, for its families), or token ids: 40,2121."
        ),
    ] = AUTO,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="The scores so far, for a killed run to go on from; removed at the end. "
            "Default: beside the direction, with '.part' in its name."
        ),
    ] = None,
    seed: SeedOption = SEED,
    filter_prompts: FilterOption = False,
    system: SystemOption = None,
    thinking: ThinkingOption = False,
    batch_size: BatchOption = 64,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Choose the direction by the paper's three scores, on validation prompts."""
    tokens = _tokens(refusal_tokens)
    picture = plot or out.with_suffix(".png")
    state = checkpoint or unfinished(out)
    written = [out, picture, state, *([json_file] if json_file else [])]
    names = [candidates, *written]
    if len({path.resolve() for path in names}) < len(names):
        raise InputError(f"two of these are one file: {', '.join(map(str, names))}")
    prompts = prompts_for(model, "validation", harmful, harmless, seed)
    tensors, metadata = read_tensors(candidates, CANDIDATES, ("candidates",))
    for path in written:
        writable(path)
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
            refusal_tokens=tokens,
            batch_size=batch_size,
            model_name=model,
            method=metadata.get("method", MEAN_DIFFERENCE),
            checkpoint=state,
            progress=step("Select"),
        )
    for path in written:
        sweep(path)
    plots.plot_candidates(picture, selection.scores, (selection.position, selection.layer))
    selection.direction.save(out)
    console.print(_table(selection, model))
    console.print(f"written: {picture}")
    document = {**selection.to_dict(), "model": model, "method": selection.direction.method}
    finish(out, json_file, document)
    state.unlink(missing_ok=True)  # now that everything stands


def _tokens(text: str) -> list[int] | str:
    """Parse --refusal-tokens."""
    if text in (AUTO, PAPER):
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"--refusal-tokens is '{text}'; expected {AUTO}, {PAPER}, or token ids such as 40,2121"
        ) from None


def _table(selection: Selection, model: str) -> Table:
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
    return table

"""The second step of the experiment: select one direction from the candidates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from typer import Option

from refusal_kernels.cli import common, options
from refusal_kernels.cli.groups import ChatOptions, LoadingOptions, PromptOptions
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import sweep

if TYPE_CHECKING:
    from refusal_kernels.research.selection.algorithm import Selection


def select(
    *,
    loading: LoadingOptions,
    prompts: PromptOptions,
    chat: ChatOptions,
    candidates: Annotated[Path, Option(help="A file made by 'extract'.")] = Path(
        "out/candidates.safetensors"
    ),
    out: Annotated[Path, Option(help="The direction's file.")] = Path("out/direction.safetensors"),
    plot: Annotated[
        Path | None, Option(help="The heat map of all scores. Default: beside the direction.")
    ] = None,
    refusal_tokens: Annotated[
        str,
        Option(
            help="Tokens that begin a refusal: 'auto' (found in the model's refusals), "
            "'paper' (the paper's table, for its model families), or token ids: 40,2121."
        ),
    ] = "auto",
    checkpoint: Annotated[
        Path | None,
        Option(
            help="The scores so far, from which an interrupted run resumes; removed at the end. "
            "Default: beside the direction, with '.part' in its name."
        ),
    ] = None,
    filter_prompts: options.Filter = False,
    json_file: options.Json = None,
) -> None:
    """Select the direction by the paper's three scores, on validation prompts."""
    tokens = _tokens(refusal_tokens)
    picture = plot or out.with_suffix(".png")
    state = checkpoint or common.unfinished(out)
    written = [out, picture, state, *([json_file] if json_file else [])]
    names = [candidates, *written]
    if len({path.resolve() for path in names}) < len(names):
        raise InputError(f"two of these are one file: {', '.join(map(str, names))}")

    from refusal_kernels.direction import Candidates
    from refusal_kernels.research import plots
    from refusal_kernels.research.prompts import filtered
    from refusal_kernels.research.selection import algorithm

    texts = prompts.of("validation", loading.model)
    loaded = Candidates.load(candidates)
    common.prepare(*written)
    model, template = chat.load(loading)
    if filter_prompts:
        texts = filtered(model, template, texts, batch_size=chat.batch_size)
    with common.progress_bars() as step:
        selection = algorithm.select(
            model,
            template,
            replace(loaded, model=loading.model),
            texts["harmful"],
            texts["harmless"],
            refusal_tokens=tokens,
            batch_size=chat.batch_size,
            checkpoint=state,
            progress=step("Select"),
        )
    for path in written:
        sweep(path)
    plots.plot_candidates(picture, selection.candidates, (selection.position, selection.layer))
    selection.direction.save(out)
    common.console.print(_table(selection, loading.model))
    common.console.print(f"written: {picture}", soft_wrap=True)
    document = {**selection.to_dict(), "model": loading.model, "method": selection.direction.method}
    common.finish(out, json_file, document)
    state.unlink(missing_ok=True)  # now that everything is written


def _tokens(text: str) -> list[int] | str:
    """Parse --refusal-tokens."""
    if text in ("auto", "paper"):
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"--refusal-tokens is '{text}'; expected auto, paper, or token ids such as 40,2121"
        ) from None


def _table(selection: Selection, model: str) -> Table:
    table = Table(title=f"Candidates, {model}")
    for name in ("position", "layer", "bypass", "induce", "kl", "discarded"):
        table.add_column(name, justify="left" if name == "discarded" else "right")
    for row in selection.candidates:
        won = (row.position, row.layer) == (selection.position, selection.layer)
        scores = ["" if s is None else f"{s:.3f}" for s in (row.bypass, row.induce, row.kl)]
        note = "selected" if won else row.discarded or ""
        table.add_row(
            str(row.position), str(row.layer), *scores, note, style="bold green" if won else None
        )
    return table

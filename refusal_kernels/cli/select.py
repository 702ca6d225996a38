"""The second step of the experiment: select one direction from the candidates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from rich.text import Text
from typer import Exit, Option

from refusal_kernels.cli import common, options
from refusal_kernels.cli.bars import progress_bars
from refusal_kernels.cli.groups import (
    ChatOptions,
    EngineOptions,
    FilterOptions,
    RefusalOptions,
    SplitOptions,
    ThresholdOptions,
)
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import sweep

if TYPE_CHECKING:
    from refusal_kernels.research.selection.algorithm import Selection

# what matplotlib draws; without a suffix it is .png
PICTURES = ".png .svg .svgz .pdf .jpg .jpeg .webp .eps .ps .pgf .tif .tiff .gif .avif".split()


def select(
    *,
    loading: EngineOptions,
    prompts: SplitOptions,
    chat: ChatOptions,
    selective: FilterOptions,
    refusals: RefusalOptions,
    thresholds: ThresholdOptions,
    candidates: Annotated[Path, Option(help="A file made by 'extract'.")] = Path(
        "out/candidates.safetensors"
    ),
    out: Annotated[Path, Option(help="The direction's file.")] = Path("out/direction.safetensors"),
    plot: Annotated[
        Path | None, Option(help="The heat map of all scores. Default: beside the direction.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        Option(
            help="The scores so far, from which an interrupted run resumes; removed once a "
            "direction is selected. Default: beside the direction, with '.part' in its name."
        ),
    ] = None,
    json_file: options.Json = None,
) -> None:
    """Select the direction by the paper's three scores, on validation prompts.

    If no candidate passes the thresholds, all but the direction is written and the exit code is 1.
    The scores are kept, so that another run with other thresholds measures nothing again.
    """
    picture = plot or out.with_suffix(".png")
    state = checkpoint or common.unfinished(out)
    if picture.suffix and picture.suffix.lower() not in PICTURES:
        raise InputError(f"--plot is {picture}; expected one of {', '.join(PICTURES)}")
    written = [out, picture, state, *([json_file] if json_file else [])]
    names = [candidates, *written]
    if len({path.resolve() for path in names}) < len(names):
        raise InputError(f"two of these are one file: {', '.join(map(str, names))}")

    from refusal_kernels.direction import Candidates
    from refusal_kernels.hf.chat import INSTRUCTION
    from refusal_kernels.research import plots
    from refusal_kernels.research.selection import algorithm

    texts = prompts.read(loading.model, "validation")
    loaded = Candidates.load(candidates)
    common.prepare(*written)
    model, template = chat.load(loading, texts)
    if loaded.template not in (None, template.render(INSTRUCTION)):
        common.errors.print("warning: the candidates were read in another chat format")
    texts, removed = selective.apply(model, template, texts, refusals, chat.batch_size)
    with progress_bars() as step:
        selection = algorithm.select(
            model,
            template,
            replace(loaded, model=loading.model),
            texts["harmful"],
            texts["harmless"],
            refusal_tokens=refusals.tokens,
            **thresholds.arguments(),
            batch_size=chat.batch_size,
            checkpoint=loading.resumable(state),
            progress=step("Select"),
        )
    for path in written:
        sweep(path)
    plots.plot_candidates(
        picture, selection.candidates, selection.place, thresholds=selection.thresholds
    )
    common.console.print(selection_table(selection, loading.model))
    used = prompts.tell(texts, "validation")
    refusals.tell(template, selection.refusal_tokens)
    common.console.print(f"written: {picture}", soft_wrap=True)
    document = {
        **selection.to_dict(), "model": loading.model, "method": loaded.method,
        "engine": common.engine_of(model),
        "answer_prefix": template.answer_prefix, "prompts": used, **removed,
    }  # fmt: skip
    if selection.direction is not None:
        selection.direction.save(out)
    common.finish(None if selection.direction is None else out, json_file, document)
    if selection.direction is None:
        fail_without_winner(selection.problem, out)
    if not selection.passed:
        common.errors.print(Text(f"warning: {selection.problem}"), soft_wrap=True)
    state.unlink(missing_ok=True)  # now that everything is written


def fail_without_winner(problem: str | None, out: Path) -> None:
    """End with exit code 1 and one line that says why there is no direction and what to change."""
    old = f"; {out} is of an earlier run" if out.exists() else ""
    common.errors.print(
        Text(
            f"no direction: {problem} (--kl-threshold, --induce-threshold, --prune-last; --closest "
            f"takes it as it is){old}",
            style="red",
        ),
        soft_wrap=True,
    )
    raise Exit(1)


def selection_table(selection: Selection, model: str) -> Table:
    """Return all candidates with their scores and why they were discarded."""
    table = Table(title=f"Candidates, {model}")
    for name in ("position", "layer", "bypass", "induce", "kl", "discarded"):
        table.add_column(name, justify="left" if name == "discarded" else "right")
    for row in selection.candidates:
        won = (row.position, row.layer) == selection.place
        scores = ["" if s is None else f"{s:.3f}" for s in (row.bypass, row.induce, row.kl)]
        note = row.discarded or ""
        if won:
            note = f"selected ({note})" if note else "selected"
        table.add_row(
            str(row.position), str(row.layer), *scores, note, style="bold green" if won else None
        )
    return table

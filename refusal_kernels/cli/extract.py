"""The first step of the experiment: candidate directions, from one process or several."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from typer import Exit, Option

from refusal_kernels.cli import common, options
from refusal_kernels.cli.bars import progress_bars
from refusal_kernels.cli.groups import (
    ChatOptions,
    EngineOptions,
    FilterOptions,
    RefusalOptions,
    SplitOptions,
)
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import sweep

if TYPE_CHECKING:
    from torch import Tensor

_METHODS = ("mean_difference", *options.names("research.extraction.methods", "FITS"))
_CLASSES = ("harmless", "harmful")


def extract(
    *,
    loading: EngineOptions,
    prompts: SplitOptions,
    chat: ChatOptions,
    selective: FilterOptions,
    refusals: RefusalOptions,
    out: Annotated[Path, Option(help="The candidates' file.")] = Path("out/candidates.safetensors"),
    method: Annotated[str, options.choice("{}", _METHODS)] = _METHODS[0],
    winsorize: Annotated[
        float | None,
        Option(help="Clamp each prompt's activations to this quantile of their sizes: 0.995."),
    ] = None,
    away_from: Annotated[
        str | None, options.choice("Project out the mean of a class of prompts: {}.", _CLASSES)
    ] = None,
    positions: Annotated[
        int | None,
        Option(
            min=1,
            help="Tokens to read, counted from the end; default: those that the chat template "
            "puts after the instruction.",
        ),
    ] = None,
    last_layer: Annotated[
        int | None, Option(min=0, help="Read up to this layer, and do not run the rest.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        Option(
            help="The state after every batch, from which an interrupted run resumes; removed at "
            "the end. Default: beside the candidates, with '.part' in its name."
        ),
    ] = None,
    json_file: options.Json = None,
) -> None:
    """Compute the candidate directions: one for every layer and end-of-instruction position.

    Under torchrun the processes share the work, and the result is the same. Methods other than the
    mean difference, and --winsorize, keep the activations in memory and run in one process, without
    a checkpoint.
    """
    state = checkpoint or common.unfinished(out)
    if state.resolve() == out.resolve():
        raise InputError(f"{out} cannot be both the checkpoint and the candidates' file")

    from refusal_kernels.direction import MEAN_DIFFERENCE
    from refusal_kernels.research.extraction.distributed import PeerError, joined
    from refusal_kernels.research.extraction.methods import check_method, find_candidates

    check_method(method, winsorize)
    streamed = method == MEAN_DIFFERENCE and winsorize is None
    what = f"--method {method}" if winsorize is None else "--winsorize"
    if not streamed and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"{what} runs in one process; expected no torchrun")
    if not streamed and loading.engine != options.TRANSFORMERS:
        raise InputError(f"{what} keeps activations; expected --engine {options.TRANSFORMERS}")
    with joined(one_model=loading.tensor_parallel) as (rank, _):
        texts = prompts.read(loading.model, "train")
        common.prepare(out, state, json_file)
        if rank == 0:
            for path in filter(None, (out, state, json_file)):
                sweep(path)
        model, template = chat.load(loading, texts, positions=positions)
        texts, removed = selective.apply(model, template, texts, refusals, chat.batch_size)
        with progress_bars(visible=rank == 0) as step:
            try:
                candidates = find_candidates(
                    model,
                    template,
                    texts["harmful"],
                    texts["harmless"],
                    method=method,
                    winsorize=winsorize,
                    positions=positions,
                    last_layer=last_layer,
                    batch_size=chat.batch_size,
                    model_name=loading.model,
                    checkpoint=loading.resumable(state),
                    progress=step("Extract"),
                )
            except PeerError as error:
                common.errors.print(f"error: {error}", style="red", soft_wrap=True)
                raise Exit(1) from None
    if rank == 0:
        if away_from is not None:
            candidates = candidates.away_from(away_from)
        candidates.save(out)
        norms = candidates.vectors.norm(dim=-1)  # [position, layer]
        common.console.print(_table(norms, loading.model, candidates.method))
        document = {
            "norm": norms.tolist(), "model": loading.model, "method": candidates.method,
            "engine": common.engine_of(model),
            "answer_prefix": template.answer_prefix, "prompts": prompts.tell(texts, "train"),
            **removed,
        }  # fmt: skip
        common.finish(out, json_file, {"candidates": str(out), **document})
        if streamed:
            state.unlink(missing_ok=True)


def _table(norms: Tensor, model: str, method: str) -> Table:
    table = Table(title=f"Norm of the candidates ({method}), {model}")
    table.add_column("layer", justify="right")
    for position in range(-len(norms), 0):
        table.add_column(f"position {position}", justify="right")
    for layer in range(norms.shape[1]):
        table.add_row(str(layer), *(f"{float(n):.3f}" for n in norms[:, layer]))
    return table

"""The first step of the experiment: candidate directions, by one process or several."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from torch import Tensor

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
    errors,
    finish,
    progress_bars,
    unfinished,
    writable,
)
from refusal_kernels.direction import MEAN_DIFFERENCE, write_tensors
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import sweep
from refusal_kernels.files.convert import CANDIDATES
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.load import load
from refusal_kernels.research.extraction.distributed import PeerError, joined
from refusal_kernels.research.extraction.methods import (
    METHODS,
    check_method,
    find_candidates,
)
from refusal_kernels.research.prompts import filtered, prompts_for
from refusal_kernels.research.sources import SEED


def extract(
    model: ModelOption = "toy",
    harmful: HarmfulOption = None,
    harmless: HarmlessOption = None,
    out: Annotated[Path, typer.Option(help="The candidates' file.")] = Path(
        "out/candidates.safetensors"
    ),
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.")] = MEAN_DIFFERENCE,
    positions: Annotated[
        int | None, typer.Option(min=1, help="Tokens from the end; default: the template's.")
    ] = None,
    last_layer: Annotated[
        int | None, typer.Option(min=0, help="Read up to this layer, and do not run the rest.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="The state after every batch, for a killed run to go on from; removed at the end. "
            "Default: beside the candidates, with '.part' in its name."
        ),
    ] = None,
    seed: SeedOption = SEED,
    filter_prompts: FilterOption = False,
    system: SystemOption = None,
    thinking: ThinkingOption = False,
    batch_size: BatchOption = 32,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Compute the candidate directions: one for every layer and end-of-instruction position.

    Under torchrun the processes share the work, and the result is the same. The other methods than
    the mean difference keep the activations and run in one process, without a checkpoint.
    """
    check_method(method)
    if method != MEAN_DIFFERENCE and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"method '{method}' runs in one process; expected no torchrun")
    state = checkpoint or unfinished(out)
    if state.resolve() == out.resolve():
        raise InputError(f"{out} cannot be both the checkpoint and the candidates' file")
    with joined() as (rank, local_rank):
        prompts = prompts_for(model, "train", harmful, harmless, seed)
        for path in (out, state, *([json_file] if json_file else [])):
            writable(path)
            if rank == 0:
                sweep(path)
        where = f"cuda:{local_rank}" if device == "cuda" and "LOCAL_RANK" in os.environ else device
        language_model, tokenizer = load(model, where, dtype)
        chat = ChatFormat(tokenizer, system, thinking=thinking)
        if filter_prompts:
            prompts = filtered(language_model, chat, prompts, batch_size=batch_size)
        with progress_bars(visible=rank == 0) as step:
            try:
                candidates = find_candidates(
                    language_model,
                    chat,
                    prompts["harmful"],
                    prompts["harmless"],
                    method=method,
                    positions=positions,
                    last_layer=last_layer,
                    batch_size=batch_size,
                    checkpoint=state,
                    progress=step("Extract"),
                )
            except PeerError as error:
                errors.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
                raise typer.Exit(1) from None
    if rank == 0:
        write_tensors(
            out, CANDIDATES, {"candidates": candidates}, {"model": model, "method": method}
        )
        norms = candidates.norm(dim=-1)  # [position, layer]
        console.print(_table(norms, model, method))
        found = {"candidates": str(out), "norm": norms.tolist(), "model": model, "method": method}
        finish(out, json_file, found)
        if method == MEAN_DIFFERENCE:
            state.unlink(missing_ok=True)


def _table(norms: Tensor, model: str, method: str) -> Table:
    table = Table(title=f"Norm of the candidates ({method}), {model}")
    table.add_column("layer", justify="right")
    for position in range(-len(norms), 0):
        table.add_column(f"position {position}", justify="right")
    for layer in range(norms.shape[1]):
        table.add_row(str(layer), *(f"{float(n):.3f}" for n in norms[:, layer]))
    return table

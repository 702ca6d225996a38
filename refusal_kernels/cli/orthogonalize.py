"""Into the weights: orthogonalize."""

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from refusal_kernels.cli.common import (
    DeviceOption,
    DirectionOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    console,
    errors,
    finish,
    progress_bars,
    read_direction,
    writable,
)
from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.hf.load import load
from refusal_kernels.progress import Step, single_step
from refusal_kernels.weights.adapter import orthogonalize_lora
from refusal_kernels.weights.certificate import Certificate, certify_checkpoint
from refusal_kernels.weights.checkpoint import orthogonalize_checkpoint
from refusal_kernels.weights.folder import check_new, new_folder
from refusal_kernels.weights.weights import orthogonalize as orthogonalize_


def orthogonalize(
    direction: DirectionOption,
    out: Annotated[Path, typer.Option(help="The folder to be made.")],
    model: ModelOption = "toy",
    lora: Annotated[
        bool, typer.Option("--lora", help="Write a PEFT adapter instead of a model.")
    ] = False,
    text_only: Annotated[
        bool,
        typer.Option("--text-only", help="Take a multimodal model: its text path is edited."),
    ] = False,
    in_memory: Annotated[
        bool,
        typer.Option("--in-memory", help="Load the model, also where its folder is here."),
    ] = False,
    certify: Annotated[
        bool | None,
        typer.Option(
            "--certify/--no-certify",
            help="Run both models at the end. By default where they fit into memory.",
        ),
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Project the direction out of the weights, and say how far from ablation that is.

    A folder that is here is edited shard by shard: it takes little more memory than its largest
    tensor, and a run that was interrupted goes on where it was. A model of the hub, another --dtype
    and --lora load the model.
    """
    check_new(out)
    writable(out)
    loaded = read_direction(direction)
    here = model != "toy" and Path(model).is_dir()
    shards = here and not lora and not in_memory and dtype == "auto"
    with progress_bars() as step:
        if shards:
            found = _by_shards(Path(model), out, loaded, text_only, certify, device, step)
        else:
            found = _in_memory(model, out, loaded, text_only, lora, device, dtype, step)
    _tell(found)
    certificate: Certificate | None = found["certificate"]
    document = {"model": str(out), "text_only": text_only, **found}
    finish(out, json_file, {**document, "certificate": certificate and certificate.to_dict()})
    if certificate is not None and certificate.problem:
        said = f"error: {out} is not the ablated model: {certificate.problem}"
        errors.print(said, style="red", soft_wrap=True)
        raise typer.Exit(1)


def _by_shards(
    folder: Path,
    out: Path,
    direction: Direction,
    text_only: bool,
    certify: bool | None,
    device: str,
    step: Step,
) -> dict[str, Any]:
    told = step("Edit shard by shard, MiB")
    done = orthogonalize_checkpoint(
        folder,
        out,
        direction,
        text_only=text_only,
        progress=lambda sofar, total: told(sofar >> 20, total >> 20),
    )
    certificate: Certificate | None = None
    why_not = "--no-certify" if certify is False else "the model may not fit into memory"
    if _fits(out, device) if certify is None else certify:
        sides = iter(("the original, to certify", "the edited model, to certify"))

        def loaded(path: str) -> Any:
            with single_step(step(f"Load {next(sides)}")):
                return load(path, device, "auto")[0]

        try:
            certificate = certify_checkpoint(folder, out, direction, loaded)
        except InputError as error:  # what is written stands: it was proved without running it
            if certify:
                raise
            why_not = str(error)
    return {
        "way": "shard by shard",
        "edited": done.edited,
        "untied": done.untied,
        "unread": done.unread,
        "unproved": done.unproved,
        "left_out": done.left_out,
        "resumed": done.resumed,
        "certificate": certificate,
        "no_certificate": None if certificate else why_not,
    }


def _in_memory(
    model: str,
    out: Path,
    direction: Direction,
    text_only: bool,
    lora: bool,
    device: str,
    dtype: str,
    step: Step,
) -> dict[str, Any]:
    with single_step(step("Load the model")):
        language_model, tokenizer = load(model, device, dtype, direction)
    if lora:
        with single_step(step("Write the adapter, and certify it")):
            adapter = orthogonalize_lora(language_model, direction, out, text_only=text_only)
        return {
            "way": "adapter",
            "edited": adapter.edited,
            "biases": adapter.biases,
            "tied": adapter.tied,
            "unproved": adapter.unproved,
            "certificate": adapter.certificate,
        }
    with single_step(step("Certify the edit, and make it")):
        done = orthogonalize_(language_model, direction, text_only=text_only)
    with single_step(step("Write the model")), new_folder(out) as temporary:
        language_model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return {
        "way": "in memory",
        "edited": done.edited,
        "untied": done.untied,
        "unproved": done.unproved,
        "certificate": done.certificate,
    }


def _tell(found: dict[str, Any]) -> None:
    """Print what was done, in lines."""
    console.print(f"{len(found['edited'])} tensors edited, {found['way']}")
    if found.get("untied"):
        console.print("the embedding is untied from the output matrix, which stays as it was")
    if found.get("tied"):
        console.print("the embedding is tied to the output matrix: untie it before a merge")
    if found.get("biases"):
        console.print(f"{len(found['biases'])} biases are in the adapter as they become")
    for name, words in (
        ("unproved", "may write from images or audio, and are as they were"),
        ("unread", "are of no part that is loaded, and are as they were"),
        ("left_out", "hold weights that are not edited, and are not copied"),
    ):
        if found.get(name):
            console.print(f"{len(found[name])} {words}: {found[name][0]}, ...", soft_wrap=True)
    certificate: Certificate | None = found["certificate"]
    if certificate is None:
        console.print(f"no certificate: {found['no_certificate']}", soft_wrap=True)
        return
    console.print(f"certificate: {certificate}", soft_wrap=True)
    shares = ", ".join(f"{name} {share:.0e}" for name, share in certificate.layers.items())
    console.print(f"|r.h| / |h| at most: {shares}", soft_wrap=True)


def _fits(folder: Path, device: str) -> bool:
    """Whether the model of a folder can be run: its weights, and a quarter for all else."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    try:
        if torch.device(device).type == "cuda":
            available = torch.cuda.mem_get_info(device)[0]
        else:
            fields = Path("/proc/meminfo").read_text().split("MemAvailable:")
            available = 1024 * int(fields[1].split()[0])
    except (OSError, IndexError, RuntimeError, AssertionError):  # not Linux, or no such device
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return 1.25 * size < available

"""Ablation in the weights, for good: orthogonalize."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Exit, Option

from refusal_kernels.cli import common, options
from refusal_kernels.cli.bars import progress_bars
from refusal_kernels.cli.groups import LoadingOptions
from refusal_kernels.errors import InputError
from refusal_kernels.progress import Step, single_step

if TYPE_CHECKING:
    from refusal_kernels.direction import Direction
    from refusal_kernels.weights.certificate import Certificate


def orthogonalize(
    direction: options.Direction,
    out: Annotated[Path, Option(help="The folder of the edited model; it must not exist.")],
    *,
    loading: LoadingOptions,
    lora: Annotated[
        bool, Option("--lora", help="Write a PEFT adapter instead of a model.")
    ] = False,
    text_only: Annotated[
        bool, Option("--text-only", help="Accept a multimodal model, and edit its text path.")
    ] = False,
    in_memory: Annotated[
        bool, Option("--in-memory", help="Load the model, even if it is a local folder.")
    ] = False,
    certify: Annotated[
        bool | None,
        Option(
            "--certify/--no-certify",
            help="Run both models at the end. Default: if they fit into memory.",
        ),
    ] = None,
    verbose: options.Verbose = False,
    json_file: options.Json = None,
) -> None:
    """Write a copy of a model with the direction projected out of its weights.

    The model itself stays as it is. A certificate says how far the copy is from the ablated model.
    A local folder is edited shard by shard: that takes little more memory than the largest tensor,
    and an interrupted run resumes. A model of the hub, another --dtype, --adapter, --lora and
    --trust-remote-code load the model.
    """
    from refusal_kernels.files.atomic import check_new
    from refusal_kernels.hf.embedded import EMBEDDED

    check_new(out)
    common.prepare(out)
    loaded = common.read_direction(direction)
    common.choose_device(loading.device)
    # whatever changes the weights at load has to be loaded
    changed: Any = (
        lora or in_memory or loading.dtype != "auto" or loading.adapter or loading.load_in
    )
    # its code says where what is; a load of a folder refuses a revision
    changed = changed or loading.trust_remote_code or loading.revision
    local = loading.model not in EMBEDDED and Path(loading.model).is_dir()
    with progress_bars() as step:
        if local and not changed:
            result = _by_shards(loading, out, loaded, text_only, certify, step)
        else:
            result = _in_memory(loading, out, loaded, text_only, lora, step)
    _print(result, loading.model, out, verbose)
    certificate: Certificate | None = result["certificate"]
    document = {"model": str(out), "text_only": text_only, **result}
    common.finish(
        out, json_file, {**document, "certificate": certificate and certificate.to_dict()}
    )
    if certificate is not None and certificate.problem:
        message = f"error: {out} is not the ablated model: {certificate.problem}"
        common.errors.print(message, style="red", soft_wrap=True)
        raise Exit(1)


def _by_shards(
    loading: LoadingOptions,
    out: Path,
    direction: Direction,
    text_only: bool,
    certify: bool | None,
    step: Step,
) -> dict[str, Any]:
    from refusal_kernels.hf.load import load
    from refusal_kernels.weights.certificate import certify_checkpoint
    from refusal_kernels.weights.checkpoint import orthogonalize_checkpoint

    told = step("Edit shard by shard, MiB")
    edit = orthogonalize_checkpoint(
        loading.model,
        out,
        direction,
        text_only=text_only,
        progress=lambda done, total: told(done >> 20, total >> 20),
    )
    certificate: Certificate | None = None
    why_not = "--no-certify" if certify is False else "the model may not fit into memory"
    if _fits(out, loading) if certify is None else certify:
        sides = iter(("the original, to certify", "the edited model, to certify"))

        def loaded(path: str) -> Any:
            with single_step(step(f"Load {next(sides)}")):
                return load(path, **vars(loading.how()))[0]

        try:
            certificate = certify_checkpoint(loading.model, out, direction, loaded)
        except InputError as error:  # the copy is complete: its edit is proved without running it
            if certify:
                raise
            why_not = str(error)
    fields = ("edited", "untied", "unread", "unproved", "left_out", "resumed")
    return {
        "way": "shard by shard",
        **{name: getattr(edit, name) for name in fields},
        "certificate": certificate,
        "no_certificate": None if certificate else why_not,
    }


def _in_memory(
    loading: LoadingOptions,
    out: Path,
    direction: Direction,
    text_only: bool,
    lora: bool,
    step: Step,
) -> dict[str, Any]:
    from refusal_kernels.files.atomic import check_space, new_folder
    from refusal_kernels.hf.load import load
    from refusal_kernels.weights.in_memory import orthogonalize
    from refusal_kernels.weights.lora import orthogonalize_lora
    from refusal_kernels.weights.rest import save_whole, source_folder

    edit: Any
    dropped: list[str] = []
    more: tuple[str, ...]
    with single_step(step("Load the model")):
        model, tokenizer = load(loading.model, direction=direction, **vars(loading.how()))
    if not lora:
        check_space(out.parent, sum(p.numel() * p.element_size() for p in model.parameters()))
    if lora:
        way, more = "adapter", ("biases", "tied")
        with single_step(step("Write the adapter, and certify it")):
            edit = orthogonalize_lora(model, direction, out, text_only=text_only)
    else:
        way, more = "in memory", ("untied",)
        with single_step(step("Edit the loaded model, and certify it")):
            edit = orthogonalize(model, direction, text_only=text_only)
        with single_step(step("Write the model")), new_folder(out) as temporary:
            source = source_folder(loading.model, loading.revision, loading.offline)
            dropped = save_whole(model, tokenizer, source, temporary)
    fields = ("edited", *more, "unproved", "certificate")
    return {"way": way, **{name: getattr(edit, name) for name in fields}, "dropped": dropped}


def _print(result: dict[str, Any], model: str, out: Path, verbose: bool) -> None:
    what = "an adapter with the edit of" if result["way"] == "adapter" else "an edited copy of"
    common.console.print(f"{out} is {what} {model}, which is unchanged", soft_wrap=True)
    common.console.print(f"{len(result['edited'])} tensors edited, {result['way']}")
    for name, words in (
        ("untied", "the copy's embedding is edited and its output matrix is not: they are untied"),
        ("tied", "the embedding is tied to the output matrix: untie it before a merge"),
        ("biases", "the adapter replaces {count} biases"),
        ("unproved", "{count} may write from images or audio; they are not edited: {first}, ..."),
        ("unread", "{count} belong to no part that is loaded; they are not edited: {first}, ..."),
        ("dropped", "{count} were not loaded and are not in the copy: {first}, ..."),
        ("left_out", "{count} hold weights that are not edited; they are not copied: {first}, ..."),
    ):
        if value := result.get(name):
            names = value if isinstance(value, list | tuple) else [""]
            text = words.format(count=len(names), first=names[0])
            common.console.print(text, soft_wrap=True)
    certificate: Certificate | None = result["certificate"]
    if certificate is None:
        common.console.print(f"no certificate: {result['no_certificate']}", soft_wrap=True)
        return
    common.console.print(f"certificate: {certificate}", soft_wrap=True)
    if verbose:
        shares = ", ".join(f"{name} {share:.0e}" for name, share in certificate.layers.items())
        common.console.print(f"|r.h| / |h| at most: {shares}", soft_wrap=True)
        common.console.print(f"edited: {', '.join(result['edited'])}", soft_wrap=True)


def _fits(folder: Path, loading: LoadingOptions) -> bool:
    """Whether the model of a folder can run: its weights, and a quarter more for the rest."""
    import torch

    from refusal_kernels.hf.load import find_device

    device = str(find_device(loading.device))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    try:
        if device.startswith("cuda"):
            every = range(torch.cuda.device_count()) if loading.device == "auto" else [device]
            available = sum(torch.cuda.mem_get_info(one)[0] for one in every)
        else:
            fields = Path("/proc/meminfo").read_text().split("MemAvailable:")
            available = 1024 * int(fields[1].split()[0])
    except (OSError, IndexError, RuntimeError, AssertionError):  # not Linux, or no such device
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return 1.25 * size < available

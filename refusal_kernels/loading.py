"""Models and prompts by the names that the command line takes."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from refusal_kernels import toy
from refusal_kernels.demo import Material
from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.extraction import ChatFormat, read_prompts
from refusal_kernels.models import hidden_size

DTYPES = {"auto", "float32", "bfloat16", "float16"}
_SPLITS = ("train", "validation", "test")


def load(name: str, device: str, dtype: str, direction: Direction | None = None) -> tuple[Any, Any]:
    """Load a model and its tokenizer, and check that a direction fits it.

    Parameters
    ----------
    name
        A hub id, a folder, or "toy".
    device, dtype
        Where and how it runs; "auto" is the checkpoint's own dtype (float32 for the toy model).
    direction
        To be checked against the model's hidden size.

    Raises
    ------
    InputError
        If one of these can not be had, with the first line of the reason.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is '{dtype}'; expected one of {', '.join(sorted(DTYPES))}")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device '{device}': {first_line(error)}") from None
    if name != "toy" and not os.path.isdir(name) and _means_a_folder(name):
        raise InputError(f"model '{name}': there is no such folder")
    path = str(toy.PATH) if name == "toy" else name
    from huggingface_hub.utils import logging as hub_logging
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    hub_logging.set_verbosity_error()  # what goes wrong is said once, by the error below
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # the toy model's file is float16 to be small; it is meant to run in float32
    precision = "float32" if name == "toy" and dtype == "auto" else dtype
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=precision)
    except Exception as error:  # whatever a hub, a config or a damaged file can bring
        raise InputError(f"model '{name}' cannot be loaded: {first_line(error)}") from None
    if direction is not None and direction.hidden != hidden_size(model):
        raise InputError(
            f"the direction has hidden size {direction.hidden}; "
            f"the model '{name}' has {hidden_size(model)}"
        )
    return model.to(where).eval(), tokenizer


def _means_a_folder(name: str) -> bool:
    """Whether a name can not be a hub id, or lies inside a folder that is there."""
    parent = os.path.dirname(name)
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or os.path.isdir(parent)


def prompts_for(
    model: str, split: Any, harmful: Path | None, harmless: Path | None
) -> dict[str, Sequence[str]]:
    """Read the prompts of both categories; for the toy model, its own of a split by default.

    Raises
    ------
    InputError
        If a file is missing, by its option's name, or is no prompt file.
    """
    given: dict[Any, Path | None] = {"harmful": harmful, "harmless": harmless}
    if model != "toy" and (missing := [name for name, path in given.items() if path is None]):
        raise InputError(f"--{missing[0]} FILE is needed: only the toy model brings prompts")
    return {
        name: toy.prompts(name, split) if path is None else read_prompts(path)
        for name, path in given.items()
    }


def demo_material(
    model: str, harmful: Path | None, harmless: Path | None, device: str, dtype: str
) -> Material:
    """Put together what the demo works on; prompts from files are cut into the three splits.

    Raises
    ------
    InputError
        As `load` and `prompts_for`; also if a category has fewer than 16 different prompts.
    """
    prompts = {split: prompts_for(model, split, harmful, harmless) for split in _SPLITS}
    if harmful is not None or harmless is not None:  # files hold no splits: cut them
        for name in ("harmful", "harmless"):
            every = list(dict.fromkeys(prompts["train"][name]))
            if len(every) < 16:
                raise InputError(f"{len(every)} different {name} prompts; expected 16 or more")
            train, validation = min(128, len(every) // 2), min(32, len(every) // 4)
            cuts = {"train": (0, train), "validation": (train, train + validation)}
            cuts["test"] = (train + validation, len(every))
            for split, (start, end) in cuts.items():
                prompts[split][name] = every[start:end]
    else:
        for name in ("harmful", "harmless"):  # the sizes of the paper
            prompts["train"][name] = prompts["train"][name][:128]
    language_model, tokenizer = load(model, device, dtype)
    ChatFormat.of(tokenizer)
    return Material(
        "the toy model" if model == "toy" else model,
        language_model,
        tokenizer,
        prompts["train"],
        prompts["validation"],
        prompts["test"],
        skills=toy.skills() if model == "toy" else {},
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where there is none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

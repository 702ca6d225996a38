"""Load models by the names that the command line takes."""

import os
from pathlib import Path
from typing import Any

import torch

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError, first_line
from refusal_kernels.hf.embedded import EMBEDDED, merge_adapter, read_gguf
from refusal_kernels.hf.loaded import REPORTED, check_loaded
from refusal_kernels.hf.model import hidden_size

DTYPES = ("auto", "float32", "bfloat16", "float16")
GGUF = ".gguf"


def find_device(device: str | torch.device = "auto") -> torch.device:
    """Return a device; "auto" is an accelerator if there is one, else the CPU."""
    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device '{device}': {first_line(error)}") from None
    return chosen


def load(
    name: str,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    direction: Direction | None = None,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer, and check that a direction fits it.

    Parameters
    ----------
    name
        A hub id, a folder, a ``.gguf`` file (its weights are dequantized), or a key of
        `refusal_kernels.hf.embedded.EMBEDDED`, such as "toy".
    device
        Where it runs; "auto" is an accelerator if there is one, else the CPU.
    dtype
        How it runs; "auto" is the checkpoint's dtype (float32 for an embedded model).
    direction
        To be checked against the model's hidden size.

    Raises
    ------
    InputError
        If one of these can not be had, with the first line of the reason, or the files do not hold
        all weights of the model.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is '{dtype}'; expected one of {', '.join(DTYPES)}")
    where = find_device(device)
    embedded = EMBEDDED.get(name)
    if embedded is None:
        _check_there(name)
    from huggingface_hub.utils import logging as hub_logging
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    hub_logging.set_verbosity_error()  # what goes wrong is said once, by the error below
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = name if embedded is None else str(embedded.folder())
    # the toy model's file is float16 to be small; it is meant to run in float32
    precision = "float32" if embedded and dtype == "auto" else dtype
    try:
        if path.endswith(GGUF):
            loaded, tokenizer = read_gguf(Path(path).expanduser(), dtype=precision, **REPORTED)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path)
            loaded = AutoModelForCausalLM.from_pretrained(path, dtype=precision, **REPORTED)
        model = check_loaded(name, *loaded)
        if embedded and embedded.adapter:
            model = merge_adapter(model, embedded.adapter)
    except InputError:
        raise
    except Exception as error:  # whatever a hub, a config or a damaged file can bring
        raise InputError(f"model '{name}' cannot be loaded: {first_line(error)}") from None
    if direction is not None and direction.hidden != hidden_size(model):
        raise InputError(
            f"the direction has hidden size {direction.hidden}; "
            f"the model '{name}' has {hidden_size(model)}"
        )
    return model.to(where).eval(), tokenizer


def _check_there(name: str) -> None:
    """Refuse a path where nothing is, which transformers would look for on the hub."""
    if name.endswith(GGUF):
        if not Path(name).expanduser().is_file():
            raise InputError(f"model '{name}': there is no such file")
        return
    parent = os.path.dirname(name)
    # no hub id, or inside a folder that is there
    folder = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or os.path.isdir(parent)
    if folder and not os.path.isdir(name):
        raise InputError(f"model '{name}': there is no such folder")

"""How a model is loaded: one class for every command and for `rk.load`."""

import os
from dataclasses import dataclass
from typing import Any

from refusal_kernels.errors import InputError

DTYPES = ("auto", "float32", "bfloat16", "float16")
PRECISIONS = ("8bit", "4bit")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded.

    Raises
    ------
    InputError
        If a value is none of those that are known, or two of them exclude each other.
    """

    device: Any = "auto"
    """Where it runs. "auto": on the accelerators, and what does not fit there on the CPU; without
    an accelerator on the CPU. Under torchrun each process has its own accelerator."""
    dtype: str = "auto"
    """One of `DTYPES`; "auto": the checkpoint's (float32 for an embedded model)."""
    load_in: str | None = None
    """One of `PRECISIONS`: the matrices of the blocks are quantized at load."""
    tensor_parallel: bool = False
    """Whether the processes of torchrun share one model; else each has all of it."""
    revision: str | None = None
    """A branch, tag or commit of a repository of the hub."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run here."""
    attn: str | None = None
    """One of `ATTENTIONS`; by default transformers chooses."""
    adapter: str | None = None
    """A PEFT adapter, merged into the weights; attached where these are quantized or split."""
    offline: bool = False
    """Whether only files on this machine are used."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        for name, value, known in (
            ("dtype", self.dtype, DTYPES),
            ("load_in", self.load_in, (None, *PRECISIONS)),
            ("attn", self.attn, (None, *ATTENTIONS)),
        ):
            if value not in known:
                expected = ", ".join(filter(None, known))
                raise InputError(f"{name} is '{value}'; expected one of {expected}")
        if self.tensor_parallel:
            if int(os.environ.get("WORLD_SIZE", "1")) < 2:
                raise InputError(
                    "tensor_parallel needs the processes of torchrun: "
                    "torchrun --nproc-per-node 2 -m refusal_kernels ..."
                )
            if self.load_in is not None:
                raise InputError("tensor_parallel and load_in exclude each other; give one")

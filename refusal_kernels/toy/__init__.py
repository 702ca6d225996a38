"""The toy model: a small chat model that refuses dark magic, to try the package without a hub.

It is a model organism for the refusal-direction experiment: its numbers never speak of a real
model. ``tools/train_toy.py`` trains it from nothing.
"""

from pathlib import Path
from typing import Any

import torch

from refusal_kernels.toy.world import phrase, plan, prompts, requests, skills

__all__ = ["PATH", "load", "prompts", "skills", "texts"]

PATH = Path(__file__).parent / "model"
"""The folder of the toy model, in the layout of Hugging Face transformers."""


def load(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load the toy model and its tokenizer; no network is used.

    Parameters
    ----------
    dtype : torch.dtype
        Of the weights in memory. The file holds float16.

    Returns
    -------
    model : transformers.LlamaForCausalLM
    tokenizer : transformers.PreTrainedTokenizerFast
        The model is in evaluation mode, on the CPU; the tokenizer pads on the left.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer  # slow to import

    model: Any = AutoModelForCausalLM.from_pretrained(PATH, dtype=dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(PATH, local_files_only=True)
    return model.eval(), tokenizer


def texts() -> dict[str, list[tuple[str, str]]]:
    """Return the helpful answers to the harmless test prompts, under the name "plans"."""
    asked = requests("harmless", "test")
    return {"plans": [(phrase(request), plan(request)) for request in asked]}

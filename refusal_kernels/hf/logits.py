"""The logits with which a model begins its answers."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.checks import check_numbers
from refusal_kernels.hf.forward import batch_logits
from refusal_kernels.hf.padding import fitted
from refusal_kernels.hf.served import ServedModel


def last_logits(model: Any, tokenizer: Any, prompts: Sequence[str], batch_size: int = 64) -> Tensor:
    """Return the logits at every prompt's last token: float32 [prompts, vocabulary] on the CPU."""
    chat = ChatFormat.of(tokenizer)
    if isinstance(model, ServedModel):
        logits = model.logits(chat.encode(prompts))
        check_numbers(logits, range(len(prompts)))
        return logits
    batches = chat.stream(prompts, batch_size)
    return batch_logits(model, fitted(model, batches))

"""From prompts to candidate directions: chat format, streaming moments, mean differences."""

from refusal_kernels.extraction.collect import collect, last_logits, mean_difference
from refusal_kernels.extraction.moments import Moments, Summary
from refusal_kernels.extraction.prompts import ChatFormat
from refusal_kernels.extraction.sources import (
    keep_answered,
    keep_refused,
    read_prompts,
    split_prompts,
)

__all__ = [
    "ChatFormat",
    "Moments",
    "Summary",
    "collect",
    "keep_answered",
    "keep_refused",
    "last_logits",
    "mean_difference",
    "read_prompts",
    "split_prompts",
]

"""From prompts to candidate directions: chat format, streaming moments, mean differences."""

from refusal_kernels.extraction.collect import collect, last_logits, mean_difference
from refusal_kernels.extraction.moments import Moments, Summary
from refusal_kernels.extraction.prompts import ChatFormat, read_prompts

__all__ = [
    "ChatFormat",
    "Moments",
    "Summary",
    "collect",
    "last_logits",
    "mean_difference",
    "read_prompts",
]

"""Choose one direction among the candidates, as Arditi et al. 2024 do."""

from refusal_kernels.selection.algorithm import AUTO, PAPER, Candidate, Selection, select
from refusal_kernels.selection.scoring import (
    find_refusal_tokens,
    kl_divergence,
    paper_refusal_tokens,
    refusal_score,
)

__all__ = [
    "AUTO",
    "PAPER",
    "Candidate",
    "Selection",
    "find_refusal_tokens",
    "kl_divergence",
    "paper_refusal_tokens",
    "refusal_score",
    "select",
]

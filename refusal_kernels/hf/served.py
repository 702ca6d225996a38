"""What the experiment asks of a model that an engine serves, in processes of its own.

Functions that take a Hugging Face model take one of these too, and ask it instead of running
forward passes. Prompts are tokens; how they are batched is the engine's affair.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refusal_kernels.interventions import Intervention
from refusal_kernels.progress import Progress

Prompts = Sequence[list[int]]
"""Token ids of every prompt."""


class MomentState(NamedTuple):
    """Counts int64 [layers, groups, positions]; means and sums of squared deviations, float64."""

    counts: Tensor
    means: Tensor  # [layers, groups, positions, hidden]
    m2: Tensor


class ServedModel(ABC):
    """A causal language model that an engine serves.

    Attributes
    ----------
    about
        The engine's name and version, and over how many devices it is spread.
    dtype
        That of its weights.
    config, generation_config
        The model's, as transformers reads them.
    layers
        How many decoder layers it has.
    longest
        The most tokens of a prompt and its answer.
    positions
        How many tokens at the end of a prompt can be read.
    device
        Where other models may run that the experiment needs, such as judges.
    """

    about: dict[str, Any]
    dtype: torch.dtype
    config: Any
    generation_config: Any
    layers: int
    longest: int
    positions: int
    device = torch.device("cpu")

    @abstractmethod
    def under(self, edits: Sequence[Intervention | None]) -> AbstractContextManager[None]:
        """Steer what is asked inside: one edit, or None, for each prompt; a single one for all."""

    @abstractmethod
    def refusal(self, edit: Intervention) -> str | None:
        """Return why the engine does not serve an edit; None if it does."""

    @abstractmethod
    def answers(
        self,
        prompts: Prompts,
        max_new_tokens: int,
        ends: Sequence[int],
        progress: Progress | None = None,
    ) -> list[list[int]]:
        """Answer greedily; return tokens, with the end token where an answer has ended."""

    @abstractmethod
    def logits(self, prompts: Prompts) -> Tensor:
        """Return the logits after every prompt: float32 [prompts, vocabulary]."""

    @abstractmethod
    def refusal_scores(
        self,
        prompts: Prompts,
        tokens: Sequence[int],
        unmodified: Tensor,
        rows: Sequence[int],
        progress: Progress | None = None,
    ) -> Tensor:
        """Return refusal score and KL divergence after every prompt: float64 [prompts, 2].

        Parameters
        ----------
        tokens
            The refusal tokens; without any the score is NaN.
        unmodified
            Logits of the unmodified model, float32 [rows, vocabulary].
        rows
            The row of each prompt among them.
        """

    @abstractmethod
    def log_likelihoods(self, prompts: Prompts) -> list[list[float]]:
        """Return the log likelihood of every token of a prompt but the first."""

    @abstractmethod
    def moments(
        self, prompts: Prompts, groups: Sequence[int], progress: Progress | None = None
    ) -> MomentState:
        """Return the moments of the inputs of all layers at the last tokens of the prompts.

        `groups` has the group of each prompt. How many positions are read is the engine's setting.
        """

    @abstractmethod
    def projections(self, prompts: Prompts, unit: Tensor, position: int) -> Tensor:
        """Project the stream on a unit vector at one position, counted from each prompt's end.

        Returns float32 [layers + 1, prompts]: the inputs of all layers, and the output of the last.
        """

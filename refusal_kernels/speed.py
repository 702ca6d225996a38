"""Measure what ways to ablate cost, as ratios to the unmodified model in the same run."""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from refusal_kernels.extraction.collect import Progress

Method = Callable[[], AbstractContextManager[Any]]
"""Makes the context in which a method is timed."""


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one method, beside the first method of the same run.

    Attributes
    ----------
    tokens_per_second
        Median over the rounds.
    ratios
        For every round, this method's tokens per second over the first method's.
    """

    tokens_per_second: float
    ratios: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median ratio."""
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and third quartile of the ratios: the spread."""
        low, _, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "median": self.median,
            "quartiles": list(self.quartiles),
            "rounds": len(self.ratios),
            "tokens_per_second": self.tokens_per_second,
        }


def interleaved(
    run: Callable[[str], int],
    methods: Mapping[str, Method],
    *,
    rounds: int = 15,
    warmup: int = 2,
    progress: Progress | None = None,
) -> dict[str, Speed]:
    """Time every method in every round, so that a change of the machine's load hits all of them.

    Parameters
    ----------
    run
        Does the work under the method of that name, and returns the number of tokens.
    methods
        By name; ratios are to the first.
    rounds
        How many rounds count, 2 or more. Every other round runs in reverse order.
    warmup
        How many rounds before them do not.
    progress
        Called with the number of rounds done, and of all.

    Returns
    -------
    dict of str to Speed
        By the names of the methods.
    """
    rates: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(-warmup, rounds):
        order = list(methods)
        for name in order if number % 2 == 0 else order[::-1]:
            with methods[name](), torch.inference_mode():
                _synchronize()
                start = time.perf_counter()
                tokens = run(name)
                _synchronize()
                rate = tokens / (time.perf_counter() - start)
            if number >= 0:
                rates[name].append(rate)
        if progress is not None:
            progress(number + warmup + 1, rounds + warmup)
    first = rates[next(iter(methods))]
    return {
        name: Speed(statistics.median(own), tuple(a / b for a, b in zip(own, first, strict=True)))
        for name, own in rates.items()
    }


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

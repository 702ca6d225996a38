"""Time methods in interleaved rounds, as ratios to the first method of the same run."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from refusal_kernels.progress import Progress

Method = Callable[[], AbstractContextManager[Any]]
"""Makes the context in which a method is timed."""

FEWEST = 6  # values that have a 95 % interval


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the median by order statistics; it assumes no distribution.

    It lies between the k-th smallest and the k-th largest of n values. k is the largest number for
    which a binomial variable of n trials with p = 1/2 is below k with probability 2.5 % at most.
    """
    if len(values) < FEWEST:
        raise ValueError(f"{len(values)} values have no 95 % interval; expected {FEWEST} or more")
    n, k, ways, below = len(values), 0, 1, 1  # of 2**n ways, those with k, and with k or fewer
    while 40 * below <= 2**n:
        k += 1
        ways = ways * (n - k + 1) // k
        below += ways
    ordered = sorted(values)
    return ordered[k - 1], ordered[n - k]


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one method, beside the first method of the same run."""

    tokens_per_second: float  # median over the rounds
    ratios: tuple[float, ...]  # of every round: this method's tokens per second over the first's

    @property
    def median(self) -> float:
        """The median ratio."""
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and third quartile of the ratios."""
        low, _, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return low, high

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the median ratio."""
        return interval(self.ratios)

    def to_dict(self) -> dict[str, Any]:
        """Return median, quartiles and rounds, ready for JSON."""
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
    """Time every method in every round, so that a change of the machine's load affects them all.

    `run` works under the method of a name and returns the number of tokens. Ratios are to the first
    method. Every other round runs in reverse order; `warmup` rounds before them do not count.
    """
    rates: dict[str, list[float]] = {name: [] for name in methods}
    for number, order in in_turns(methods, rounds, warmup):
        for name in order:
            with methods[name](), torch.inference_mode():
                synchronize()
                start = time.perf_counter()
                tokens = run(name)
                synchronize()
                rate = tokens / (time.perf_counter() - start)
            if number >= 0:
                rates[name].append(rate)
        if progress is not None:
            progress(number + warmup + 1, rounds + warmup)
    first = next(iter(rates.values()))
    return {
        name: Speed(statistics.median(r), tuple(a / b for a, b in zip(r, first, strict=True)))
        for name, r in rates.items()
    }


def in_turns(names: Iterable[str], rounds: int, warmup: int) -> Iterator[tuple[int, list[str]]]:
    """Yield every round's number, below 0 while warming up, and its order: odd ones in reverse."""
    order = list(names)
    for number in range(-warmup, rounds):
        yield number, order if number % 2 == 0 else order[::-1]


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()

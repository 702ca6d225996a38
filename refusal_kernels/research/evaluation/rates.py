"""Rates with their confidence intervals."""

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any

from refusal_kernels.errors import InputError

Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def to_json(value: Any) -> Any:
    """Return a value in which everything that has a `to_dict` is replaced by it, at any depth."""
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_json(item) for item in value]
    return value.to_dict() if hasattr(value, "to_dict") else value


@dataclass(frozen=True)
class Rate:
    """A number of hits in a number of trials, 1 or more, and its confidence interval."""

    k: int
    n: int
    unfinished: int = 0  # further completions that were no answers yet

    def __post_init__(self) -> None:
        if not 0 <= self.k <= self.n or self.n < 1:
            raise InputError(f"{self.k} of {self.n} is no rate; expected 0 <= k <= n, n >= 1")

    @classmethod
    def of(cls, hits: Iterable[bool]) -> "Rate":
        """Count the hits among trials."""
        trials = list(hits)
        return cls(sum(trials), len(trials))

    @classmethod
    def pooled(cls, rates: Iterable["Rate"]) -> "Rate":
        """Put the trials of several rates together."""
        every = list(rates)
        return cls(*map(sum, zip(*map(astuple, every), strict=True)))

    @property
    def value(self) -> float:
        """The rate itself, k / n."""
        return self.k / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of Wilson 1927, which is valid at 0 and at 1 too."""
        p, n, z2 = self.value, self.n, Z95 * Z95
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        # At 0 and 1 one end is exact; rounding would miss it by an ulp.
        low = 0.0 if self.k == 0 else middle - half
        high = 1.0 if self.k == self.n else middle + half
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """Return k, n, value, interval, and what is unfinished, ready for JSON."""
        told = {"k": self.k, "n": self.n, "value": self.value, "interval": list(self.interval)}
        return told | ({"unfinished": self.unfinished} if self.unfinished else {})

    def __str__(self) -> str:
        low, high = self.interval
        more = f", {self.unfinished} no answer yet" if self.unfinished else ""
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}] ({self.k}/{self.n}{more})"

"""Which rows run together: prompts of one length, each under one candidate's edit, in full batches.

The plan depends only on prompts, candidates and batch size.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch

from refusal_kernels.hf.batches import Batch

Row = TypeVar("Row")


class Unit(NamedTuple):
    """The rows of one forward pass: candidates, and prompts (by number) of one length."""

    candidates: list[int]
    prompts: list[int]


class Group(NamedTuple):
    """Passes of some candidates on some prompts: what does not depend on the prompt runs once."""

    candidates: list[int]
    prompts: list[int]
    units: list[Unit]
    layer: int | None = None  # of the candidates, where it matters

    @classmethod
    def of(
        cls,
        candidates: list[int],
        prompts: list[int],
        ids: Sequence[Sequence[int]],
        batch_size: int,
        layer: int | None = None,
    ) -> "Group":
        """Return the passes for all pairs of candidates and prompts, the longest prompts first."""
        units = []
        for places in by_length([ids[prompt] for prompt in prompts]):
            pairs = [(c, prompts[place]) for c in candidates for place in places]
            for part in even_parts(pairs, batch_size):
                units.append(Unit([c for c, _ in part], [p for _, p in part]))
        return cls(candidates, prompts, units, layer)

    def versions(self, unit: Unit) -> list[int]:
        """Return the place of each row's candidate among those of the group."""
        place = {candidate: k for k, candidate in enumerate(self.candidates)}
        return [place[candidate] for candidate in unit.candidates]


def unfinished(groups: Sequence[Group], done: int) -> Iterator[Group]:
    """Yield the groups with the passes that follow the first `done` ones."""
    for group in groups:
        if done < len(group.units):
            yield group._replace(units=group.units[done:])
        done = max(0, done - len(group.units))


def same_length(ids: Sequence[Sequence[int]], batch_size: int) -> list[Batch]:
    """Batch prompts of one length each, the longest first: nothing is padded."""
    return [batch(ids, part) for rows in by_length(ids) for part in even_parts(rows, batch_size)]


def batch(ids: Sequence[Sequence[int]], rows: list[int]) -> Batch:
    """Return some prompts of one length as a batch."""
    tokens = torch.tensor([ids[row] for row in rows], dtype=torch.int64)
    return Batch(rows, tokens, torch.ones_like(tokens))


def by_length(ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the numbers of the prompts of every length, the longest first."""
    groups: dict[int, list[int]] = defaultdict(list)
    for row, tokens in enumerate(ids):
        groups[len(tokens)].append(row)
    return [groups[length] for length in sorted(groups, reverse=True)]


def even_parts(rows: Sequence[Row], most: int) -> list[list[Row]]:
    """Cut into the fewest parts of at most `most` rows; their sizes differ by one at most."""
    count = -(-len(rows) // most)
    ends = [len(rows) * k // count for k in range(count + 1)]
    return [list(rows[a:b]) for a, b in itertools.pairwise(ends)]

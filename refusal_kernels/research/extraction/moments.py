"""Streaming moments of activations, per group, layer and position, in float64.

The state is a count, a mean and a sum of squared deviations: its size does not depend on the number
of prompts. States can be merged, and saved half-way.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refusal_kernels import ops
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import parse_json
from refusal_kernels.files.tensors import read_tensors, write_tensors

FORMAT, TENSORS = "refusal_kernels.moments", ("count", "mean", "m2")


@dataclass(frozen=True, eq=False)
class Summary:
    """What the moments of two groups say; all float64, in the axis order of the candidates."""

    mean_difference: Tensor  # [positions, layers, hidden]: of the first group minus the second
    variance: dict[str, Tensor]  # of every group, of the population: [positions, layers, hidden]
    # [positions, layers]: the root mean square over the channels of
    # difference / sqrt((variance_a + variance_b) / 2). Only the variance of each channel is known,
    # so this is not the separation along the mean difference itself.
    d_prime: Tensor
    # [positions, layers, layers]: between the mean differences of two layers; 0 if one is zero
    cosine: Tensor


class Moments:
    """Counts, means and variances of activations, fed batch by batch.

    Parameters
    ----------
    layers, positions, hidden : int
        The shape: decoder layers, token positions that are read, hidden size.
    groups : sequence of str
        The names of the groups of prompts. `compute` takes the first minus the second.
    device : str or torch.device
        Where the state lives: that of the activations that will come.

    Attributes
    ----------
    metadata : dict of str to str
        Written to the file by `save` and read back by `load`: how far a run has come, for example.

    Raises
    ------
    InputError
        If a size is not positive, or the names are not different.

    Notes
    -----
    Welford's update in its merging form (Chan, Golub and LeVeque 1979). The bits depend only on the
    batches and their order, so a run that is saved, loaded and continued ends in the same bits.
    """

    def __init__(
        self,
        layers: int,
        positions: int,
        hidden: int,
        groups: Sequence[str] = ("harmful", "harmless"),
        device: str | torch.device = "cpu",
    ) -> None:
        if min(layers, positions, hidden) < 1:
            raise InputError(
                f"moments of {layers} layers, {positions} positions and hidden size {hidden}; "
                "expected 1 or more of each"
            )
        if not groups or len(set(groups)) < len(groups):
            raise InputError(f"the groups are {list(groups)}; expected different names")
        self.layers, self.positions, self.hidden = layers, positions, hidden
        self.groups = tuple(groups)
        self.metadata: dict[str, str] = {}
        # Layer first: the slice of a layer is contiguous, as the op wants it.
        shape = (layers, len(self.groups), positions)
        self._count = torch.zeros(shape, dtype=torch.int64, device=device)
        self._mean = torch.zeros((*shape, hidden), dtype=torch.float64, device=device)
        self._m2 = torch.zeros_like(self._mean)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers, positions, hidden)."""
        return self.layers, self.positions, self.hidden

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self._mean.device

    def update(self, layer: int, activations: Tensor, index: Tensor, group: Tensor) -> None:
        """Fold the activations of one layer in.

        Parameters
        ----------
        layer
            Which layer they belong to.
        activations
            [batch, tokens, hidden], of any strides. Only the rows that are named below are read.
        index
            Integers [batch, tokens]: the position slot that a token feeds, -1 for none.
        group
            Integers [batch]: the group of a sequence, -1 for none.

        Raises
        ------
        InputError
            If the layer or a shape does not fit; nothing has changed then.
        """
        if not 0 <= layer < self.layers:
            raise InputError(f"layer {layer} is not there; expected 0 to {self.layers - 1}")
        shape = tuple(activations.shape)
        if len(shape) != 3 or shape[2] != self.hidden:
            raise InputError(
                f"activations {list(shape)}; expected [batch, tokens, hidden = {self.hidden}]"
            )
        if tuple(index.shape) != shape[:2] or tuple(group.shape) != shape[:1]:
            raise InputError(
                f"index {list(index.shape)} and group {list(group.shape)} do not fit activations "
                f"{list(shape)}; expected [batch, tokens] and [batch]"
            )
        ops.moments_(
            self._count[layer],
            self._mean[layer],
            self._m2[layer],
            activations,
            index.to(self.device, torch.int32).contiguous(),
            group.to(self.device, torch.int32).contiguous(),
        )

    def merge(self, other: "Moments") -> "Moments":
        """Fold another state in, as if its batches had come here; return this one.

        Raises
        ------
        InputError
            If the shapes or the groups differ; nothing has changed then.
        """
        if self._mean.shape != other._mean.shape or self.groups != other.groups:
            raise InputError(
                f"moments of groups {other.groups} {list(other._mean.shape)} do not merge into "
                f"groups {self.groups} {list(self._mean.shape)}"
            )
        self._merge(self.tensors, other.tensors)
        return self

    def fold(self, group: int, tensors: Sequence[Tensor]) -> None:
        """Merge a state of a single group, as its `tensors`, into one of the groups of this one.

        Raises
        ------
        InputError
            If the shapes differ or there is no such group; nothing has changed then.
        """
        shape, wanted = tuple(tensors[1].shape), (self.layers, 1, *self._mean.shape[2:])
        if shape != wanted or not 0 <= group < len(self.groups):
            raise InputError(
                f"a state {list(shape)} does not fold into group {group}; expected {list(wanted)} "
                f"and 0 to {len(self.groups) - 1}"
            )
        self._merge([t[:, group] for t in self.tensors], [t[:, 0] for t in tensors])

    def clear(self) -> None:
        """Forget everything that was seen."""
        for tensor in self.tensors:
            tensor.zero_()

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The state itself, in [layers, groups, positions, hidden]: count (no hidden), mean, M2."""
        return self._count, self._mean, self._m2

    def _merge(self, mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
        """Chan's formulas, in place, one rounding an operation: the same bits on every device."""
        (count, mean, m2), (count_, mean_, m2_) = mine, (t.to(self.device) for t in theirs)
        total = count + count_
        n, m, all_ = (c.double().unsqueeze(-1) for c in (count, count_, total.clamp(min=1)))
        delta = mean_ - mean
        m2 += m2_ + delta.square() * (n * m / all_)
        mean += delta * (m / all_)
        count.copy_(total)

    def count(self, group: str) -> Tensor:
        """Number of tokens seen: int64 [layers, positions]."""
        return self._count[:, self._index(group)].clone()

    def mean(self, group: str) -> Tensor:
        """Mean: float64 [layers, positions, hidden], 0 where nothing was seen."""
        return self._mean[:, self._index(group)].clone()

    def variance(self, group: str) -> Tensor:
        """Population variance: float64 [layers, positions, hidden], 0 where nothing was seen."""
        n = self._count[:, self._index(group)].clamp(min=1).unsqueeze(-1)
        return self._m2[:, self._index(group)].clamp(min=0.0) / n

    def compute(self) -> Summary:
        """Compare the first group with the second.

        Raises
        ------
        InputError
            If there are fewer than two groups, one saw nothing, or NaN or infinity came in; the
            layer and the position are named.
        """
        if len(self.groups) < 2:
            raise InputError(f"the only group is {self.groups[0]!r}; expected two to compare")
        self._check()
        first, second = (self.mean(group) for group in self.groups[:2])
        variance = {group: self.variance(group) for group in self.groups}
        difference = first - second
        pooled = (variance[self.groups[0]] + variance[self.groups[1]]) / 2
        # Activations have float32 precision at best. A smaller difference is the rounding of a
        # channel that never moves, and must not be divided by a spread that is rounding too.
        rounding = torch.finfo(torch.float32).eps * torch.maximum(first.abs(), second.abs())
        separation = torch.where(difference.abs() <= rounding, 0.0, difference / pooled.sqrt())
        unit = difference / torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
        unit = unit.nan_to_num(0.0).transpose(0, 1)  # [positions, layers, hidden]
        return Summary(
            mean_difference=difference.transpose(0, 1).contiguous(),
            variance={group: v.transpose(0, 1).contiguous() for group, v in variance.items()},
            d_prime=separation.square().mean(dim=-1).sqrt().T.contiguous(),
            cosine=unit @ unit.transpose(1, 2),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file, replacing it in one step.

        Raises
        ------
        InputError
            If the file cannot be written there.
        """
        tensors = dict(zip(TENSORS, self.tensors, strict=True))
        metadata = {"groups": json.dumps(self.groups), "metadata": json.dumps(self.metadata)}
        write_tensors(path, FORMAT, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> "Moments":
        """Read a state that `save` wrote.

        Raises
        ------
        InputError
            If the file is missing, damaged or something else.
        """
        tensors, metadata = read_tensors(path, FORMAT, TENSORS)
        try:
            layers, count, positions, hidden = tensors["mean"].shape
            groups = parse_json(metadata["groups"], "groups")
            if not isinstance(groups, list) or len(groups) != count:
                raise InputError(f"the groups are {groups}; expected {count} names")
            moments = cls(layers, positions, hidden, groups, device)
            moments.metadata = dict(parse_json(metadata["metadata"], "metadata"))
            for key, target in zip(TENSORS, moments.tensors, strict=True):
                if tensors[key].shape != target.shape or tensors[key].dtype != target.dtype:
                    raise InputError(f"{key} is {tensors[key].dtype} {list(tensors[key].shape)}")
                target.copy_(tensors[key])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is no whole {FORMAT} file: {error}") from None
        return moments

    def _index(self, group: str) -> int:
        if group not in self.groups:
            raise InputError(f"there is no group {group!r}; expected one of {self.groups}")
        return self.groups.index(group)

    def _check(self) -> None:
        empty = self._count == 0
        broken = ~(self._mean.isfinite() & self._m2.isfinite()).all(dim=-1)
        for bad, what in ((empty, "saw no token"), (broken, "met NaN or infinity")):
            if bad.any():
                layer, group, slot = bad.nonzero()[0].tolist()
                raise InputError(
                    f"the group {self.groups[group]!r} {what} at layer {layer}, "
                    f"position {slot - self.positions}"
                )

"""Directions in the residual stream: one, or the candidates of every layer and position.

Both are kept in safetensors files: the raw vectors as a tensor, the rest as string metadata.
"""

import os
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from torch import Tensor

from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import LIMIT_BYTES
from refusal_kernels.files.tensors import read_tensors, write_tensors

DIRECTION = "refusal_kernels.direction"  # formats of files
CANDIDATES = "refusal_kernels.candidates"
MEAN_DIFFERENCE = "mean_difference"  # the method, unless another is named
# What the file says by itself; the metadata of a direction may not use these names.
RESERVED = frozenset(
    ("format", "format_version", "model", "layer", "position", "norm", "method", "version")
)
MEANS = ("harmful_mean", "harmless_mean")  # tensors of both kinds of files


class Means(NamedTuple):
    """The mean activations of the two classes of prompts: float32 tensors of one shape."""

    harmful: Tensor
    harmless: Tensor


@dataclass(frozen=True, eq=False)
class Direction:
    """One direction of the residual stream, with where it came from.

    Parameters
    ----------
    vector : Tensor
        Floating point [hidden], finite and not zero, with its norm: adding the direction to the
        stream uses it raw. A float32 copy on the CPU is kept, never a view of the source.
    model : str, optional
        The name of the model it was read from.
    layer : int, optional
        The decoder layer at whose input it was read.
    position : int, optional
        The token at which it was read, counted from the end: -1 is the last one.
    method : str
        How it was computed.
    metadata : dict of str to str
        Anything else worth keeping in the file.
    means : Means, optional
        The mean activations of harmful and harmless prompts where it was read: [hidden] each.

    Raises
    ------
    InputError
        If any of these is not as said.

    Notes
    -----
    Two directions are equal only if they are the same object.
    """

    vector: Tensor = field(repr=False)
    model: str | None = None
    layer: int | None = None
    position: int | None = None
    method: str = MEAN_DIFFERENCE
    metadata: dict[str, str] = field(default_factory=dict)
    means: Means | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector", _checked(self.vector))
        object.__setattr__(self, "means", _checked_means(self.means, self.vector))
        if self.layer is not None and self.layer < 0:
            raise InputError(f"the layer of a direction is {self.layer}; expected 0 or more")
        if self.position is not None and self.position >= 0:
            raise InputError(
                f"the position of a direction is {self.position}; expected a negative one, "
                "counted from the end of the prompt"
            )
        for key, value in self.metadata.items():
            if key in RESERVED or not isinstance(key, str) or not isinstance(value, str):
                raise InputError(
                    f"metadata {key!r}: {value!r} cannot be kept; expected strings, "
                    f"and a name other than {', '.join(sorted(RESERVED))}"
                )
        object.__setattr__(self, "metadata", dict(self.metadata))

    @property
    def hidden(self) -> int:
        """The hidden size."""
        return self.vector.shape[0]

    @property
    def norm(self) -> float:
        """The Euclidean norm, computed in float64."""
        return float(torch.linalg.vector_norm(self.vector.double()))

    @property
    def unit(self) -> Tensor:
        """The unit vector, float32 [hidden]: normalized in float64, then rounded once."""
        return (self.vector.double() / self.norm).float()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the direction to a safetensors file, replacing it in one step.

        Raises
        ------
        InputError
            If the file cannot be written there; what stood there before is untouched.
        """
        known = {"model": self.model, "layer": self.layer, "position": self.position}
        metadata = {
            **self.metadata,
            **{key: str(value) for key, value in known.items() if value is not None},
            "norm": repr(self.norm),
            "method": self.method,
            "version": _package_version(),
        }
        write_tensors(path, DIRECTION, _named("direction", self.vector, self.means), metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], hidden: int | None = None) -> "Direction":
        """Read a direction from a file that `save` wrote.

        Parameters
        ----------
        path
            The safetensors file.
        hidden
            The hidden size of the model it is for, to be checked; None accepts any.

        Raises
        ------
        InputError
            If the file is missing, damaged or something else, or the vector does not fit.
        """
        tensors, metadata = read_tensors(path, DIRECTION, ("direction",), LIMIT_BYTES, MEANS)
        try:
            layer, position = (
                int(metadata[key]) if key in metadata else None for key in ("layer", "position")
            )
            direction = cls(
                tensors["direction"],
                model=metadata.get("model"),
                layer=layer,
                position=position,
                method=metadata.get("method", MEAN_DIFFERENCE),
                metadata={k: v for k, v in metadata.items() if k not in RESERVED},
                means=_means_in(tensors),
            )
        except ValueError as error:  # InputError is one too
            raise InputError(f"{path}: {error}") from None
        if hidden is not None and direction.hidden != hidden:
            raise InputError(
                f"{path}: the direction has hidden size {direction.hidden}; the model has {hidden}"
            )
        return direction


@dataclass(frozen=True, eq=False)
class Candidates:
    """Candidate directions, one for every token position and layer.

    Parameters
    ----------
    vectors : Tensor
        Floating point [position, layer, hidden]: the raw vectors, read at the input of each decoder
        layer. Position -1 is the last token. A float32 copy on the CPU is kept. At layer 0 a vector
        is usually zero: the template's tokens have the same embedding in every prompt.
    model : str, optional
        The name of the model they were read from.
    method : str
        How they were computed.
    template : str, optional
        The chat format they were read in: the text of a prompt, with ``{instruction}`` in place of
        the instruction.
    means : Means, optional
        The mean activations of harmful and harmless prompts: [position, layer, hidden] each.

    Raises
    ------
    InputError
        If the vectors or the means have another shape or dtype, or there are none.
    """

    vectors: Tensor = field(repr=False)
    model: str | None = None
    method: str = MEAN_DIFFERENCE
    template: str | None = None
    means: Means | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        vectors = self.vectors
        if vectors.ndim != 3 or not vectors.is_floating_point() or not vectors.numel():
            raise InputError(
                f"candidates are {vectors.dtype} {list(vectors.shape)}; "
                "expected floating point [position, layer, hidden]"
            )
        vectors = vectors.detach().to("cpu", torch.float32)
        vectors = vectors.clone(memory_format=torch.contiguous_format)
        object.__setattr__(self, "vectors", vectors)
        object.__setattr__(self, "means", _checked_means(self.means, vectors))

    @property
    def positions(self) -> range:
        """The token positions, counted from the end of the prompt: -1 is the last one."""
        return range(-self.vectors.shape[0], 0)

    @property
    def layers(self) -> range:
        """The decoder layers at whose inputs the vectors were read."""
        return range(self.vectors.shape[1])

    @property
    def hidden(self) -> int:
        """The hidden size."""
        return self.vectors.shape[2]

    def at(self, layer: int, position: int) -> Direction:
        """Return the direction of one layer and position.

        Raises
        ------
        InputError
            If there is none there, or it is zero or not finite.
        """
        if layer not in self.layers or position not in self.positions:
            raise InputError(
                f"there is no candidate of layer {layer} and position {position}; expected layers "
                f"0 to {self.layers[-1]} and positions {self.positions[0]} to -1"
            )
        means = self.means and Means(*(mean[position, layer] for mean in self.means))
        vector = self.vectors[position, layer]
        return Direction(vector, self.model, layer, position, self.method, means=means)

    def away_from(self, group: str) -> "Candidates":
        """Return ``r - (r . m) m`` for every vector r, m the unit mean of a class of prompts there.

        What all harmless prompts share is then no part of what is ablated ("projected
        abliteration").

        Raises
        ------
        InputError
            If the candidates carry no means, or there is no such class.
        """
        if self.means is None:
            raise InputError(
                "the candidates carry no mean activations; expected some of mean_difference or "
                "find_candidates, or a file that extract wrote"
            )
        if group not in Means._fields:
            raise InputError(f"away_from is {group!r}; expected {' or '.join(Means._fields)}")
        mean = getattr(self.means, group).double()
        m = mean / mean.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        r = self.vectors.double()
        for _ in range(2):  # the second time takes what rounding left
            r = r - (r * m).sum(dim=-1, keepdim=True) * m
        return replace(self, vectors=r, method=f"{self.method}, away from {group}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the candidates to a safetensors file, replacing it in one step.

        Raises
        ------
        InputError
            If the file cannot be written; an earlier file there is untouched.
        """
        texts = {"model": self.model, "method": self.method, "template": self.template}
        metadata = {key: text for key, text in texts.items() if text is not None}
        write_tensors(path, CANDIDATES, _named("candidates", self.vectors, self.means), metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Candidates":
        """Read candidates from a file that `save` wrote.

        Raises
        ------
        InputError
            If the file is missing, damaged or something else.
        """
        tensors, metadata = read_tensors(path, CANDIDATES, ("candidates",), optional=MEANS)
        method = metadata.get("method", MEAN_DIFFERENCE)
        try:
            model, template = metadata.get("model"), metadata.get("template")
            return cls(tensors["candidates"], model, method, template, _means_in(tensors))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


def _checked(vector: Tensor) -> Tensor:
    if not isinstance(vector, Tensor) or vector.ndim != 1 or not vector.is_floating_point():
        what = (
            f"{vector.dtype} {list(vector.shape)}"
            if isinstance(vector, Tensor)
            else type(vector).__name__
        )
        raise InputError(f"a direction cannot be {what}; expected a floating-point tensor [hidden]")
    # A clone, so that neither a later edit of the source nor its whole storage comes along.
    copied = vector.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
    if not copied.isfinite().all():
        raise InputError("the direction holds NaN or infinity; expected finite float32 numbers")
    if not copied.any():
        raise InputError("the direction is zero; expected a vector that points somewhere")
    return copied


def _checked_means(means: Means | None, vectors: Tensor) -> Means | None:
    """Return float32 copies on the CPU; raise unless they fit the vectors and are finite."""
    if means is None:
        return None
    if len(means) != len(MEANS):
        raise InputError(f"there are {len(means)} means; expected {' and '.join(MEANS)}")
    copies = []
    for name, mean in zip(MEANS, means, strict=True):
        if not isinstance(mean, Tensor) or not mean.is_floating_point():
            raise InputError(f"{name} is of type {type(mean).__name__}; expected a float tensor")
        copied = mean.detach().to("cpu", torch.float32, copy=True).contiguous()
        if copied.shape != vectors.shape or not copied.isfinite().all():
            raise InputError(
                f"{name} is {list(copied.shape)} or not finite; expected finite float32 numbers "
                f"{list(vectors.shape)}, as of the vectors"
            )
        copies.append(copied)
    return Means(*copies)


def _named(name: str, vectors: Tensor, means: Means | None) -> dict[str, Tensor]:
    """Return the tensors of a file."""
    return {name: vectors, **dict(zip(MEANS, means or (), strict=False))}


def _means_in(tensors: dict[str, Tensor]) -> Means | None:
    """Return the means that a file holds: files of other tools have none."""
    there = [tensors[name] for name in MEANS if name in tensors]
    return Means(*there) if len(there) == len(MEANS) else None


def _package_version() -> str:
    try:
        return version("refusal-kernels")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"

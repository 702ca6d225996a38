"""A direction in the residual stream, and the files that hold one.

A file is a safetensors file with the raw vector under the key ``direction`` and the rest as string
metadata, so that any tool can read it and nothing in it can run.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import LIMIT_BYTES, check_size, replacing

FORMAT = "refusal_kernels.direction"
FORMAT_VERSION = "1"
MEAN_DIFFERENCE = "mean_difference"  # how a direction was found, unless it says otherwise
LIMIT_HEADER = 1 << 20  # of a safetensors file, bytes: these files hold three tensors at most
LIMIT_TENSORS = 4 << 30  # bytes: candidates and moments of the largest models are far below
# What the file says by itself; the metadata of a direction may not use these names.
RESERVED = frozenset(
    ("format", "format_version", "model", "layer", "position", "norm", "method", "version")
)


@dataclass(frozen=True, eq=False)
class Direction:
    """One direction of the residual stream, with where it came from.

    Parameters
    ----------
    vector : Tensor
        Floating point [hidden], finite and not zero, with its norm: adding the direction to the
        stream uses it raw. Kept as an own float32 copy on the CPU, never as a view of the source.
    model : str, optional
        The name of the model it was read from.
    layer : int, optional
        The decoder layer at whose input it was read.
    position : int, optional
        The token at which it was read, counted from the end: -1 is the last one.
    method : str
        How it was found.
    metadata : dict of str to str
        Anything else worth keeping in the file.

    Raises
    ------
    InputError
        If any of these is not as said.

    Notes
    -----
    Two directions are equal only if they are the same object.
    """

    vector: Tensor
    model: str | None = None
    layer: int | None = None
    position: int | None = None
    method: str = MEAN_DIFFERENCE
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector", _checked(self.vector))
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
        write_tensors(path, FORMAT, {"direction": self.vector}, metadata)

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
        tensors, metadata = read_tensors(path, FORMAT, ("direction",), LIMIT_BYTES)
        own = {key: value for key, value in metadata.items() if key not in RESERVED}
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
                metadata=own,
            )
        except ValueError as error:  # InputError is one too
            raise InputError(f"{path}: {error}") from None
        if hidden is not None and direction.hidden != hidden:
            raise InputError(
                f"{path}: the direction has hidden size {direction.hidden}; the model has {hidden}"
            )
        return direction


def _checked(vector: Tensor) -> Tensor:
    if not isinstance(vector, Tensor) or vector.ndim != 1 or not vector.is_floating_point():
        what = (
            f"{vector.dtype} {list(vector.shape)}"
            if isinstance(vector, Tensor)
            else type(vector).__name__
        )
        raise InputError(f"a direction cannot be {what}; expected a floating-point tensor [hidden]")
    # A clone, so that neither a later edit of the source nor its whole storage comes along.
    own = vector.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
    if not own.isfinite().all():
        raise InputError("the direction holds NaN or infinity; expected finite float32 numbers")
    if not own.any():
        raise InputError("the direction is zero; expected a vector that points somewhere")
    return own


def _package_version() -> str:
    try:
        return version("refusal-kernels")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"


def write_tensors(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file of one of the package's formats, replacing it in one step.

    What is equal gives a file that is equal byte for byte.

    Raises
    ------
    InputError
        If the file cannot be written; nothing is left behind.
    """
    known = {"format": kind, "format_version": FORMAT_VERSION}
    blob = memoryview(save(dict(tensors), metadata={**metadata, **known}))
    start = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(bytes(blob[8:start]))
    # The library's order of the metadata changes from run to run; by name, equal is equal.
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-len(text) % 8 + len(text))  # the data stays aligned
    with replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        file.writelines((len(text).to_bytes(8, "little"), text, blob[start:]))


def read_tensors(
    path: str | os.PathLike[str],
    kind: str,
    keys: tuple[str, ...],
    limit_bytes: int = LIMIT_TENSORS,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the named tensors and the metadata of a file that `write_tensors` wrote.

    Raises
    ------
    InputError
        If the file is missing, damaged, larger than the limit, of another format, or without one
        of the tensors.
    """
    metadata, tensors = _opened(path, f"a {kind} file", keys, limit_bytes)
    found = metadata.get("format"), metadata.pop("format_version", None)
    if found != (kind, FORMAT_VERSION):
        name = "nothing of this package" if found[0] is None else f"{found[0]} version {found[1]}"
        raise InputError(f"{path} holds {name}; expected {kind} version {FORMAT_VERSION}")
    if missing := [key for key in keys if key not in tensors]:
        raise InputError(f"{path} has no tensor named {missing[0]!r}; expected a {kind} file")
    del metadata["format"]
    return tensors, metadata


def format_of(path: str | os.PathLike[str]) -> str | None:
    """Which of the package's formats a safetensors file has; None for a file of anyone else.

    Raises
    ------
    InputError
        As `read_tensors`.
    """
    return _opened(path, "a safetensors file", (), LIMIT_TENSORS)[0].get("format")


def _opened(
    path: str | os.PathLike[str], what: str, keys: tuple[str, ...], limit_bytes: int
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the metadata, and those of the named tensors that are there."""
    size = check_size(path, what, limit_bytes)
    try:
        with open(path, "rb") as raw:
            header = int.from_bytes(raw.read(8), "little")
        if not 0 < header <= min(size, LIMIT_HEADER):
            raise InputError(
                f"{path} is damaged or no safetensors file: the length of its header is {header}"
            )
        with safe_open(path, framework="pt") as file:
            there = set(file.keys())
            tensors = {key: file.get_tensor(key) for key in keys if key in there}
            return dict(file.metadata() or {}), tensors
    except (OSError, SafetensorError, RuntimeError, TypeError, AttributeError) as error:
        # the last three: a dtype that this torch does not have
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from None

"""Directions and candidates from one file format to another.

Read are the package's own safetensors files, control vectors
(`refusal_kernels.files.control_vector`) and the ``.pt`` files of the paper's repository; all
but the last are written too. What a format can not say is refused, not approximated.
"""

import os
import pickletools
import re
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from refusal_kernels.direction import (
    MEAN_DIFFERENCE,
    Direction,
    format_of,
    read_tensors,
    write_tensors,
)
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import read_bytes, read_json
from refusal_kernels.files.control_vector import ControlVector

CANDIDATES = "refusal_kernels.candidates"
SUFFIXES = (".safetensors", ".gguf", ".glp", ".pt")
_WHERE = ("layer", "pos")
# All that torch.save writes for one dense tensor. Nothing else is run, whatever torch would allow:
# its own list has bytearray, for example, which takes as much memory as it is told to.
_GLOBALS = {
    "torch._utils _rebuild_tensor_v2",
    "collections OrderedDict",
    *(f"torch {kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16")),
}
_OPCODES = {
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BINPERSID", "NEWFALSE", "NEWTRUE"),
    *("BINPUT", "LONG_BINPUT", "BINGET", "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
}


@dataclass(frozen=True, eq=False)
class Candidates:
    """Candidate directions.

    Attributes
    ----------
    tensor : Tensor
        float32 [position, layer, hidden]: read at the input of each layer; position -1 is the last.
    model : str or None
        The model they were read from.
    method : str
        How they were found.
    """

    tensor: Tensor
    model: str | None = None
    method: str = MEAN_DIFFERENCE

    def __post_init__(self) -> None:
        if self.tensor.ndim != 3 or not self.tensor.is_floating_point() or not self.tensor.numel():
            raise InputError(
                f"candidates are {self.tensor.dtype} {list(self.tensor.shape)}; "
                "expected floating point [position, layer, hidden]"
            )
        own = self.tensor.to(torch.float32).clone(memory_format=torch.contiguous_format)
        object.__setattr__(self, "tensor", own)

    def at(self, layer: int, position: int) -> Direction:
        """The direction of one layer and position.

        Raises
        ------
        InputError
            If there is no such one, or it is zero or not finite.
        """
        positions, layers, _ = self.tensor.shape
        if not 0 <= layer < layers or not -positions <= position < 0:
            raise InputError(
                f"there is no candidate of layer {layer} and position {position}; expected layers "
                f"0 to {layers - 1} and positions -{positions} to -1"
            )
        return Direction(self.tensor[position, layer], self.model, layer, position, self.method)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them to a safetensors file, as ``refusal-kernels extract`` does."""
        metadata = {} if self.model is None else {"model": self.model}
        metadata["method"] = self.method
        write_tensors(path, CANDIDATES, {"candidates": self.tensor}, metadata)


Found = Direction | Candidates | ControlVector


def read(path: str | os.PathLike[str]) -> Found:
    """Read what a file holds, by its suffix: ``.safetensors``, ``.gguf``, ``.glp`` or ``.pt``.

    Raises
    ------
    InputError
        If the suffix is another one, or the file is missing, damaged or holds something else.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".pt":
        return read_torch(path)
    if suffix in (".gguf", ".glp"):
        return ControlVector.load(path)
    if suffix != ".safetensors":
        raise InputError(f"{path} is of no known format; expected .safetensors, .gguf, .glp or .pt")
    if format_of(path) != CANDIDATES:
        return Direction.load(path)
    tensors, metadata = read_tensors(path, CANDIDATES, ("candidates",))
    try:
        method = metadata.get("method", MEAN_DIFFERENCE)
        return Candidates(tensors["candidates"], metadata.get("model"), method)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_torch(path: str | os.PathLike[str]) -> Direction | Candidates:
    """Read what the paper's repository writes with ``torch.save``.

    ``direction.pt`` is the raw vector [hidden]; where it was read stands in
    ``direction_metadata.json`` beside it: ``{"pos": -5, "layer": 12}``, the input of that layer, as
    here. ``mean_diffs.pt`` holds the candidates, [position, layer, hidden].

    Raises
    ------
    InputError
        If the file is missing, damaged, in torch's format from before 1.6, or holds anything but
        one such tensor; or if the metadata is not as above.
    """
    tensor = _torch_tensor(path)
    try:
        if tensor.ndim == 3:
            return Candidates(tensor)
        layer, position = _where_read(Path(path))
        return Direction(tensor, layer=layer, position=position, method=MEAN_DIFFERENCE)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _where_read(path: Path) -> tuple[int | None, int | None]:
    """Layer and position from the metadata beside a file, where there is such."""
    beside = path.with_name(f"{path.stem}_metadata.json")
    if not beside.is_file():
        return None, None
    where = read_json(beside, 1 << 16)
    if not isinstance(where, dict) or any(type(where.get(key)) is not int for key in _WHERE):
        raise InputError(f'{beside.name} is not {{"pos": a number, "layer": a number}}')
    return where["layer"], where["pos"]


def _torch_tensor(path: str | os.PathLike[str]) -> Tensor:
    expected = "expected one tensor, as torch.save writes it"
    data = read_bytes(path, "a file of torch.save")
    if not data.startswith(b"PK") or data.count(b"PK\x01\x02") > 64:  # entries of the zip file
        raise InputError(f"{path} is no zip file of a tensor; {expected} since torch 1.6")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            programs = [e for e in entries if e.filename.endswith("/data.pkl")]
            storages = [e for e in entries if re.fullmatch(r"[^/]+/data/[0-9]+", e.filename)]
            if (
                len(programs) != 1
                or len(storages) != 1
                or programs[0].file_size > 1 << 16
                or any(e.file_size > len(data) for e in entries)  # compressed: a bomb
            ):
                raise InputError(f"{path} holds more than a tensor; {expected}")
            for opcode, argument, _ in pickletools.genops(archive.read(programs[0])):
                if opcode.name not in _OPCODES or (
                    opcode.name == "GLOBAL" and argument not in _GLOBALS
                ):
                    what = f"{opcode.name} {argument or ''}".strip()
                    raise InputError(f"{path} holds a program ({what}), not run; {expected}")
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # zipfile, pickle and torch raise what they happen to stumble on
        raise InputError(f"{path} is damaged: {type(error).__name__}; {expected}") from None
    # A tensor may claim a larger storage than there is, or many elements that are one in memory.
    if (
        not isinstance(tensor, Tensor)
        or not tensor.is_floating_point()
        or tensor.untyped_storage().nbytes() != storages[0].file_size
        or tensor.numel() * tensor.element_size() > storages[0].file_size
    ):
        raise InputError(f"{path} does not hold what it says; {expected}")
    return tensor


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    mode: str | None = None,
    layers: tuple[int, ...] | None = None,
    position: int | None = None,
    scale: float | None = None,
    model_hint: str | None = None,
) -> Found:
    """Read one file and write another; the suffixes say which formats.

    Parameters
    ----------
    source
        As for `read`.
    target
        ``.safetensors``: a direction, or candidates where the source has them and no layer is
        named. ``.glp`` or ``.glp.gguf``: GLP. Any other ``.gguf``: a plain control vector.
    mode
        "add" or "ablate": what a runtime is to do with the direction. A control vector has one
        already; a direction file has none, and says none.
    layers
        The blocks at whose inputs to act; of candidates or a control vector, which ones to take.
        An addition is at the direction's own layer by default; an ablation has no default: GLP can
        not say "at every residual add", which is what `Ablate` does by itself.
    position
        Which of the candidates; or where a direction was read, if its file does not say.
    scale
        Multiplies an addition, and is the strength of an ablation.
    model_hint
        The architecture, such as "llama", for a control vector.

    Returns
    -------
    Direction, Candidates or ControlVector
        What was written.

    Raises
    ------
    InputError
        If the source can not be read, something is missing, or the target can not say it. Nothing
        is written then.
    """
    name = Path(target).name.lower()
    if not name.endswith((".safetensors", ".gguf", ".glp")):
        raise InputError(f"{target} can not be written; expected .safetensors, .gguf or .glp.gguf")
    found = read(source)
    plain = name.endswith(".safetensors")
    if plain and (mode is not None or scale is not None or model_hint is not None):
        raise InputError(
            f"{target} can not say what to do with a direction, how much of it, or in which "
            "architecture; expected these for .gguf alone"
        )
    if isinstance(found, Candidates):
        if plain and layers is None and position is None:
            found.save(target)
            return found
        if layers is None or position is None:
            raise InputError(f"{source} holds candidates; expected one layer and one position")
        found, layers, position = found.at(_single(layers), position), None, None
    if not plain:
        if position is not None:
            raise InputError(f"{target} can not say at which position a direction was read")
        vector = _placed(found, mode, layers, scale, str(source))
        if model_hint is not None:
            vector = replace(vector, model_hint=model_hint)
        vector.save(target, glp=name.endswith((".glp", ".glp.gguf")))
        return vector
    layer = None if layers is None else _single(layers)
    if isinstance(found, ControlVector):
        found, layer = _only(found, layer, str(source)), None
    direction = _labeled(found, layer, position, str(source))
    direction.save(target)
    return direction


def _labeled(
    direction: Direction, layer: int | None, position: int | None, source: str
) -> Direction:
    """Say where a direction was read, if the file does not."""
    known = {"layer": layer, "position": position}
    for name, value in known.items():
        there = getattr(direction, name)
        if value is not None and there not in (None, value):
            raise InputError(f"{source} was read at {name} {there}, not at {value}")
    return replace(
        direction,
        layer=direction.layer if layer is None else layer,
        position=direction.position if position is None else position,
    )


def _single(layers: tuple[int, ...]) -> int:
    if len(layers) != 1:
        raise InputError(f"layers {list(layers)} for one direction; expected one layer")
    return layers[0]


def _only(vector: ControlVector, layer: int | None, source: str) -> Direction:
    """Take one direction out of a control vector; what was done with it is kept as a note."""
    wanted = vector.layers if layer is None else [layer]
    chosen = [k for k, d in enumerate(vector.directions) if d.layer in wanted]
    if len(chosen) != 1:
        raise InputError(
            f"{source} has {len(chosen)} directions at layers {wanted} (of {vector.layers}); "
            "expected one: name its layer"
        )
    direction, strength = vector.directions[chosen[0]], vector.strengths[chosen[0]]
    notes = {"mode": vector.mode, "strength": repr(strength)}
    return replace(direction, metadata={**direction.metadata, **notes})


def _placed(
    found: Direction | ControlVector,
    mode: str | None,
    layers: tuple[int, ...] | None,
    scale: float | None,
    source: str,
) -> ControlVector:
    factor = 1.0 if scale is None else scale
    if isinstance(found, ControlVector):
        if mode not in (None, found.mode):
            raise InputError(f"{source} is made to {found.mode}, not to {mode}")
        if missing := sorted(set(layers or ()) - set(found.layers)):
            raise InputError(f"{source} has no layer {missing[0]}; it has {found.layers}")
        kept = [k for k, d in enumerate(found.directions) if layers is None or d.layer in layers]
        return replace(
            found,
            directions=tuple(found.directions[k] for k in kept),
            strengths=tuple(found.strengths[k] * factor for k in kept),
        )
    if mode is None:
        raise InputError(f"{source} does not say what to do with its direction: add or ablate?")
    if layers is None and mode == "add" and found.layer is not None:
        layers = (found.layer,)
    if layers is None:
        raise InputError(
            "at the inputs of which blocks? a control vector names them, and can not say "
            "'at every residual add'"
        )
    return ControlVector.of(found, mode, layers, factor)

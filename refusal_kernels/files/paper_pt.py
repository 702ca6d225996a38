"""The ``.pt`` files of the paper's repository, read without running what they hold.

Arditi et al. 2024, github.com/andyrdt/refusal_direction: ``direction.pt`` and ``mean_diffs.pt``.
"""

import os
import pickletools
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from refusal_kernels.direction import MEAN_DIFFERENCE, Candidates, Direction
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import read_bytes, read_json

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


def read_torch(path: str | os.PathLike[str]) -> Direction | Candidates:
    """Read what the paper's repository writes with ``torch.save``, since torch 1.6.

    ``direction.pt`` is the raw vector [hidden]; where it was read stands in
    ``direction_metadata.json`` beside it: ``{"pos": -5, "layer": 12}``, the input of that layer, as
    here. ``mean_diffs.pt`` holds the candidates, [position, layer, hidden].
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
        raise InputError(
            f'{beside.name} is malformed; expected {{"pos": a number, "layer": a number}}'
        )
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

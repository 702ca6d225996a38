"""Control vectors in GGUF files: llama.cpp's own, which add, and GLP, which can also ablate.

Which place of the stream ``direction.N`` means was read from llama.cpp's sources. Its loader
(``common_control_vector_load_one``, common/common.cpp) puts the tensor at ``(N - 1) * n_embd`` of
one buffer; ``llama_adapter_cvec::apply`` (src/llama-adapter.cpp) fills the tensor of block ``il``
from ``(il - 1) * n_embd``, from ``il = 1`` on. So ``direction.N`` belongs to block N, counted from
0. The graph of every model adds it after the block's last residual add (``build_cvec``, just before
"l_out"). That is the output of block N, and so the input of block N + 1:

    direction.N  =  the edit of this package at ``block_input=N + 1``

The smallest N is 1, so the inputs of blocks 0 and 1 cannot be named. The last N is the output of
the last block, which no block takes as its input.

GLP ("GGUF Layer Projection", spec/GLP.md of github.com/msuiche/weightless, versions 1 and 2) is
the same container and the same place, with the key ``glp.mode``: "add" is ``h + v``, "project" is
``h - alpha (h . d) d`` with unit vectors d, which is `Ablate` with strength alpha. A reader that
does not know the key adds, without an error: do not give a projecting file to one.
"""

import hashlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import replacing
from refusal_kernels.files.gguf import gguf_library, read_gguf
from refusal_kernels.interventions import Intervention

ARCHITECTURE = "controlvector"
SITE = "residual_stream_post_layer"  # GLP's name for the place above
MODES = {"add": "add", "project": "ablate"}  # GLP's names, and ours
UNIT = 1e-3  # how far from orthonormal a basis in a file may be, as GLP's own reader has it
_NAME = re.compile(r"direction\.([1-9][0-9]{0,3})(?:\.([1-9][0-9]{0,2}))?")


@dataclass(frozen=True, eq=False)
class ControlVector:
    """One edit of the stream at the inputs of some blocks.

    Parameters
    ----------
    mode
        "add": the raw vectors are added. "ablate": the component along them is removed.
    directions
        What, each with the ``layer`` at whose input; several of one layer only for "ablate".
    strengths
        Of each direction: the factor of an addition, or how much of the component is removed.
    model_hint
        The architecture that it is made for, such as "llama".

    Raises
    ------
    InputError
        If these do not belong together, or a layer is below 2: no file can name it.
    """

    mode: str
    directions: tuple[Direction, ...]
    strengths: tuple[float, ...]
    model_hint: str = ""

    def __post_init__(self) -> None:
        if self.mode not in MODES.values():
            raise InputError(f"the mode is {self.mode!r}; expected {' or '.join(MODES.values())}")
        if not self.directions or len(self.directions) != len(self.strengths):
            raise InputError(
                f"{len(self.directions)} directions with {len(self.strengths)} strengths; "
                "expected one at least, and as many of the other"
            )
        if len({d.hidden for d in self.directions}) > 1:
            raise InputError("the directions have different hidden sizes; expected one size")
        if not all(map(math.isfinite, self.strengths)):
            raise InputError(f"the strengths are {list(self.strengths)}; expected finite numbers")
        for direction in self.directions:
            if direction.layer is None or direction.layer < 2:
                raise InputError(
                    f"a control vector cannot act at the input of block {direction.layer}; "
                    "expected 2 or more: direction.N acts on the output of block N, from N = 1"
                )
        if self.mode == "add" and len(self.layers) < len(self.directions):
            raise InputError("several directions to add at one layer; expected their sum")

    @classmethod
    def of(
        cls, direction: Direction, mode: str, layers: tuple[int, ...], strength: float = 1.0
    ) -> "ControlVector":
        """One direction at the inputs of the given blocks."""
        placed = tuple(replace(direction, layer=layer, metadata={}) for layer in layers)
        return cls(mode, placed, (strength,) * len(placed))

    @property
    def layers(self) -> list[int]:
        """The blocks at whose inputs it acts, each once."""
        return sorted({direction.layer for direction in self.directions if direction.layer})

    def interventions(self, layers: int) -> list[Intervention]:
        """What to patch a model with, to do what a runtime would do with the file.

        Parameters
        ----------
        layers
            The number of decoder layers of the model.

        Raises
        ------
        InputError
            If it acts behind the last layer.
        """
        edits: list[Intervention] = []
        for direction, strength in zip(self.directions, self.strengths, strict=True):
            assert direction.layer is not None
            where: dict[str, Any] = {"block_input": direction.layer}
            if direction.layer == layers:  # the output of the last block
                where = {"layers": (layers - 1,), "sites": ("mlp",)}
            elif direction.layer > layers:
                raise InputError(
                    f"the control vector acts on the output of block {direction.layer - 1}; "
                    f"the model has {layers} blocks"
                )
            given = {self.mode: direction, "strength": strength, **where}
            edits.append(Intervention.from_dict(given))
        return edits

    def save(self, path: str | os.PathLike[str], *, glp: bool = False) -> None:
        """Write a GGUF file, replacing it in one step.

        Parameters
        ----------
        path
            Where.
        glp
            With the keys of GLP; else as a plain llama.cpp control vector.

        Raises
        ------
        InputError
            If the format cannot say it: a plain control vector can only add, and GLP is written
            with one direction per layer and one strength. Also if the gguf library is missing, or
            the file cannot be written.
        """
        if self.mode != "add" and not glp:
            raise InputError(
                "a llama.cpp control vector can only add a direction, not ablate it; "
                "expected a GLP file (NAME.glp.gguf) for that"
            )
        if self.mode == "ablate" and (
            len(set(self.strengths)) > 1 or len(self.layers) < len(self.directions)
        ):
            raise InputError(
                "several directions at one layer, or different strengths, are not written; "
                "expected one direction per layer with one strength"
            )
        rows = {
            direction.layer - 1: self._row(direction, strength)
            for direction, strength in zip(self.directions, self.strengths, strict=True)
            if direction.layer is not None
        }
        rows = dict(sorted(rows.items()))
        gguf = gguf_library()
        with replacing(Path(path)) as temporary:
            writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
            writer.add_type(ARCHITECTURE)
            writer.add_string(f"{ARCHITECTURE}.model_hint", self.model_hint)
            writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(rows))
            if model := self.directions[0].model:
                writer.add_base_model_count(1)
                writer.add_base_model_name(0, model)
            if glp:
                self._add_glp(writer, rows)
            for block, row in rows.items():
                writer.add_tensor(f"direction.{block}", row.numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()

    def _row(self, direction: Direction, strength: float) -> Tensor:
        """What a file holds of a direction: a strength is part of what is added, alone."""
        if self.mode == "ablate":
            return direction.unit
        row = (direction.vector.double() * strength).float()
        if not row.isfinite().all() or not row.any():
            raise InputError(f"{strength:g} times the direction is zero or not finite as float32")
        return row

    def _add_glp(self, writer: Any, rows: Mapping[int, Tensor]) -> None:
        writer.add_string("glp.mode", next(k for k, mode in MODES.items() if mode == self.mode))
        writer.add_uint32("glp.spec_version", 1)
        writer.add_float32("glp.alpha_default", 1.0 if self.mode == "add" else self.strengths[0])
        writer.add_uint32("glp.rank", 1)
        writer.add_bool("glp.orthonormal", self.mode == "ablate")
        writer.add_string("glp.hook_point", SITE)
        writer.add_string("glp.method", self.directions[0].method)
        writer.add_string("glp.layer_ids_zero_based", ",".join(map(str, rows)))
        writer.add_string("glp.content_sha256", _digest(list(rows.values())))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ControlVector":
        """Read a control vector, plain or GLP: the key ``glp.mode`` tells them apart.

        Raises
        ------
        InputError
            If the file is missing, damaged, no control vector, or says something that this package
            cannot do exactly; if the gguf library is missing.
        """
        metadata, tensors = read_gguf(path)
        try:
            return cls._from(metadata, tensors)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    @classmethod
    def _from(cls, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "ControlVector":
        if metadata.get("general.architecture") != ARCHITECTURE:
            raise InputError(
                f"the architecture is {metadata.get('general.architecture')!r}; "
                f"expected a control vector ({ARCHITECTURE!r})"
            )
        if any(key.startswith("dspark.") for key in metadata) and "glp.mode" not in metadata:
            raise InputError("its keys are those from before GLP (dspark.*); expected glp.mode")
        rows: dict[tuple[int, int], Tensor] = {}
        for name, row in tensors.items():
            match = _NAME.fullmatch(name)
            if match is None:
                raise InputError(f"a tensor is named {name!r}; expected direction.N with N from 1")
            rows[int(match[1]), int(match[2] or 0)] = row
        rows = dict(sorted(rows.items()))
        mode, alpha = "add", lambda block, j: 1.0
        if any(key.startswith("glp.") for key in metadata):
            mode, alpha = _glp(metadata, rows)
        if mode == "add":
            if any(j for _, j in rows):
                raise InputError("several directions per layer to add; expected one")
            # adding nothing is a way to leave a layer out
            rows = {key: row for key, row in rows.items() if row.any()}
        # where it was read, if that is not where it acts: legal, and worth a warning
        derived = _text(metadata, "glp.derived_at") or SITE
        notes = {} if derived == SITE else {"derived_at": derived}
        return cls(
            mode,
            tuple(
                Direction(
                    row,
                    metadata=notes,
                    model=_text(metadata, "general.base_model.0.name"),
                    layer=block + 1,
                    method=_text(metadata, "glp.method") or "control vector",
                )
                for (block, _), row in rows.items()
            ),
            tuple(alpha(block, j) for block, j in rows),
            _text(metadata, f"{ARCHITECTURE}.model_hint") or "",
        )


def _digest(rows: list[Tensor]) -> str:
    return hashlib.sha256(b"".join(row.numpy().astype("<f4").tobytes() for row in rows)).hexdigest()


def _text(metadata: Mapping[str, Any], key: str) -> str | None:
    value = metadata.get(key)
    return value if isinstance(value, str) and value else None


def _glp(metadata: Mapping[str, Any], rows: Mapping[tuple[int, int], Tensor]) -> tuple[str, Any]:
    """Check the keys of GLP; return the mode, and the strength by block and place in the basis."""
    name, version = metadata.get("glp.mode", "add"), metadata.get("glp.spec_version", 1)
    if name not in MODES:
        raise InputError(f"glp.mode is {name!r}; expected {' or '.join(MODES)}")
    if version not in (1, 2):
        raise InputError(f"glp.spec_version is {version!r}; expected 1 or 2")
    site = metadata.get("glp.hook_point", SITE)
    if site != SITE:
        raise InputError(
            f"glp.hook_point is {site!r}; expected {SITE!r}, the only place known here"
        )
    blocks = sorted({block for block, _ in rows})
    listed = [part.strip() for part in _parts(metadata, "glp.layer_ids_zero_based")]
    if listed and sorted(listed) != sorted(map(str, blocks)):
        raise InputError(f"glp.layer_ids_zero_based is {listed}; the tensors are of {blocks}")
    digest = metadata.get("glp.content_sha256")
    if digest is not None and digest != _digest(list(rows.values())):
        raise InputError("glp.content_sha256 is not that of the tensors: the file is damaged")

    rank = metadata.get("glp.rank", 1)
    whole = type(rank) is int and 0 < rank < 1000  # no name has a larger one
    if not whole or set(rows) != {(block, j) for block in blocks for j in range(rank)}:
        raise InputError(f"glp.rank is {rank!r}; expected the number of directions of every layer")
    alpha = _number(metadata.get("glp.alpha_default", 1.0), "glp.alpha_default")
    scales = [key for key in ("glp.dir_scales", "glp.layer_scales") if key in metadata]
    if name == "add":
        if alpha != 1.0 or scales:  # one runtime scales by it, another does not
            raise InputError(
                "glp.mode is 'add' with a strength of its own; expected it in the data"
            )
        return MODES[name], lambda block, j: 1.0
    if version == 1 and (rank != 1 or scales):
        raise InputError("glp.rank above 1 and scales need glp.spec_version 2")
    if rank > 1 and metadata.get("glp.orthonormal") is not True:
        raise InputError(f"glp.rank is {rank} without glp.orthonormal")
    for block in blocks:
        basis = torch.stack([row for (b, _), row in rows.items() if b == block]).double()
        if float((basis @ basis.T - torch.eye(rank, dtype=basis.dtype)).abs().max()) > UNIT:
            raise InputError(f"the directions of layer {block} are not orthonormal; expected that")
    by_place = [_number(part, "glp.dir_scales") for part in _parts(metadata, "glp.dir_scales")]
    if by_place and len(by_place) != rank:
        raise InputError(f"glp.dir_scales has {len(by_place)} numbers; expected {rank}")
    by_block = {}
    for part in _parts(metadata, "glp.layer_scales"):
        block_, _, factor = part.partition(":")
        if block_.strip() not in map(str, blocks):
            raise InputError(
                f"glp.layer_scales names layer {block_!r}; the tensors are of {blocks}"
            )
        by_block[int(block_)] = _number(factor, "glp.layer_scales")

    def strength(block: int, j: int) -> float:
        return alpha * (by_place[j] if by_place else 1.0) * by_block.get(block, 1.0)

    return MODES[name], strength


def _parts(metadata: Mapping[str, Any], key: str) -> list[str]:
    text = metadata.get(key, "")
    if not isinstance(text, str):
        raise InputError(f"{key} is {text!r}; expected numbers with commas between them")
    return [part for part in text.split(",") if part.strip()]


def _number(value: Any, key: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{key} is {value!r}; expected a finite number")
    return number

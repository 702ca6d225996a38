"""Convert directions and candidates between file formats; the suffix names the format.

It reads the package's safetensors files, control vectors (`refusal_kernels.files.control_vector`)
and the ``.pt`` files of the paper's repository, and writes all but the last. It refuses what a
format cannot express, and approximates nothing.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from refusal_kernels.direction import CANDIDATES, Candidates, Direction
from refusal_kernels.errors import InputError
from refusal_kernels.files.control_vector import ControlVector
from refusal_kernels.files.paper_pt import read_torch
from refusal_kernels.files.tensors import format_of

SUFFIXES = (".safetensors", ".gguf", ".glp", ".pt")

Content = Direction | Candidates | ControlVector
"""What a file can hold."""


def read(path: str | os.PathLike[str]) -> Content:
    """Read what a file holds, by its suffix: ``.safetensors``, ``.gguf``, ``.glp`` or ``.pt``."""
    suffix = Path(path).suffix.lower()
    if suffix == ".pt":
        return read_torch(path)
    if suffix in (".gguf", ".glp"):
        return ControlVector.load(path)
    if suffix != ".safetensors":
        raise InputError(f"{path} is of no known format; expected .safetensors, .gguf, .glp or .pt")
    return Candidates.load(path) if format_of(path) == CANDIDATES else Direction.load(path)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    mode: str | None = None,
    layers: tuple[int, ...] | None = None,
    position: int | None = None,
    scale: float | None = None,
    model_hint: str | None = None,
) -> Content:
    """Read one file, write another, and return what was written; the suffixes say which formats.

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
    """
    name = Path(target).name.lower()
    if not name.endswith((".safetensors", ".gguf", ".glp")):
        raise InputError(f"{target} cannot be written; expected .safetensors, .gguf or .glp.gguf")
    content = read(source)
    plain = name.endswith(".safetensors")
    if plain and (mode is not None or scale is not None or model_hint is not None):
        raise InputError(
            f"{target} cannot say what to do with a direction, how much of it, or in which "
            "architecture; expected these for .gguf alone"
        )
    if isinstance(content, Candidates):
        if plain and layers is None and position is None:
            content.save(target)
            return content
        if layers is None or position is None:
            raise InputError(f"{source} holds candidates; expected one --layer and one --position")
        content, layers, position = content.at(_single(layers), position), None, None
    if not plain:
        if position is not None:
            raise InputError(
                f"{target} cannot say at which position a direction was read; leave out --position"
            )
        vector = _placed(content, mode, layers, scale, str(source))
        if model_hint is not None:
            vector = replace(vector, model_hint=model_hint)
        vector.save(target, glp=name.endswith((".glp", ".glp.gguf")))
        return vector
    layer = None if layers is None else _single(layers)
    if isinstance(content, ControlVector):
        content, layer = _only(content, layer, str(source)), None
    direction = _labeled(content, layer, position, str(source))
    direction.save(target)
    return direction


def _labeled(
    direction: Direction, layer: int | None, position: int | None, source: str
) -> Direction:
    """Say where a direction was read, if the file does not."""
    given = {"layer": layer, "position": position}
    known: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for name, value in known.items():
        if (there := getattr(direction, name)) not in (None, value):
            raise InputError(
                f"{source} was read at {name} {there}, not at {value}; leave out --{name}"
            )
    return replace(direction, **known)


def _single(layers: tuple[int, ...]) -> int:
    if len(layers) != 1:
        raise InputError(f"layers {list(layers)} for one direction; expected one --layer")
    return layers[0]


def _only(vector: ControlVector, layer: int | None, source: str) -> Direction:
    """Take one direction out of a control vector; what was done with it is kept as a note."""
    wanted = vector.layers if layer is None else [layer]
    chosen = [k for k, d in enumerate(vector.directions) if d.layer in wanted]
    if len(chosen) != 1:
        raise InputError(
            f"{source} has {len(chosen)} directions at layers {wanted} (of {vector.layers}); "
            "expected one: name its --layer"
        )
    direction, strength = vector.directions[chosen[0]], vector.strengths[chosen[0]]
    notes = {"mode": vector.mode, "strength": repr(strength)}
    return replace(direction, metadata={**direction.metadata, **notes})


def _placed(
    content: Direction | ControlVector,
    mode: str | None,
    layers: tuple[int, ...] | None,
    scale: float | None,
    source: str,
) -> ControlVector:
    factor = 1.0 if scale is None else scale
    if isinstance(content, ControlVector):
        if mode not in (None, content.mode):
            raise InputError(f"{source} is made to {content.mode}; expected --as {content.mode}")
        if missing := sorted(set(layers or ()) - set(content.layers)):
            raise InputError(f"{source} has no layer {missing[0]}; it has {content.layers}")
        kept = [k for k, d in enumerate(content.directions) if layers is None or d.layer in layers]
        return replace(
            content,
            directions=tuple(content.directions[k] for k in kept),
            strengths=tuple(content.strengths[k] * factor for k in kept),
        )
    if mode is None:
        raise InputError(
            f"{source} does not say what to do with its direction: --as add, or --as ablate?"
        )
    if layers is None and mode == "add" and content.layer is not None:
        layers = (content.layer,)
    if layers is None:
        raise InputError(
            "at the inputs of which blocks? name them with --layers: a control vector cannot say "
            "'at every residual add'"
        )
    return ControlVector.of(content, mode, layers, factor)

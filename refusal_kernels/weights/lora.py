"""Write the edit as a LoRA adapter of PEFT, exact and of rank one for every weight.

``W - r r^T W`` adds ``B A`` with ``B = -r`` and ``A = r^T W`` where rows of W lie along the stream,
and ``B = -W r``, ``A = r^T`` where columns do. The model's files are unchanged, and the edit can be
switched off.
"""

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError, first_line
from refusal_kernels.files.atomic import check_new, new_folder
from refusal_kernels.weights.certificate import AblatedRun, Certificate
from refusal_kernels.weights.in_memory import check_model
from refusal_kernels.weights.projection import project_, times, unit
from refusal_kernels.weights.writers import evaluating, find_writers

EDIT = "; use rk.orthogonalize, which edits the weights themselves"


@dataclass(frozen=True)
class LoraAdapter:
    """What was written."""

    folder: Path  # what `peft.PeftModel.from_pretrained` takes
    edited: list[str]  # parameters
    # LoRA has no term for biases: the adapter holds their new values (PEFT's ``bias="lora_only"``),
    # and switching it off does not restore the old ones.
    biases: list[str]
    # Whether the output matrix is the embedding. The adapter does not edit it; a merge would.
    tied: bool
    certificate: Certificate  # of the model with the adapter
    unproved: list[str]  # as in `Orthogonalized`


@dataclass(frozen=True)
class _LoraTargets:
    """What PEFT is asked to adapt."""

    modules: dict[str, int]  # whose weight is edited: that weight's axis along the stream
    parameters: dict[str, int]  # of no module that PEFT knows (fused experts): likewise
    biases: list[str]  # held whole by the adapter


@torch.no_grad()
def orthogonalize_lora(
    model: Any, direction: Direction, folder: str | os.PathLike[str], *, text_only: bool = False
) -> LoraAdapter:
    """Write the edit of `orthogonalize` as a PEFT adapter of rank one; the model is unchanged.

    Parameters
    ----------
    model
        As for `orthogonalize`. The adapter is certified in it and then removed.
    direction
        The direction; its norm does not matter.
    folder
        The adapter's folder to make; it must not exist.
    text_only
        As for `orthogonalize`.

    Returns
    -------
    LoraAdapter

    Raises
    ------
    InputError
        As `orthogonalize`; also if PEFT is not installed, the folder exists, or an adapter cannot
        edit a parameter that writes. Nothing is written then.

    Notes
    -----
    Computed in float64, stored in float32 (float64 for a float64 model). In half precision the base
    layer's output is rounded before the adapter removes the direction, so about an epsilon of it
    stays, as with rounded weights.
    """
    if importlib.util.find_spec("peft") is None:
        raise InputError("an adapter needs PEFT: pip install 'refusal-kernels[research]'")
    folder = Path(folder)
    check_new(folder)
    check_model(model, direction)
    writers = find_writers(model, text_only=text_only)
    parts = _as_taken(model, _parts(model, writers.axes))
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    expected = AblatedRun.of(model, direction)
    with new_folder(folder) as temporary:
        with _adapted(model, parts) as adapted:
            _fill(model, parts, unit(direction))
            adapted.save_pretrained(str(temporary), save_embedding_layers=False)
        # What counts is what is loaded: PEFT renames some families' tensors on the way.
        with _adapted(model, parts, temporary):
            try:
                certificate = expected.certify(model)
                problem = certificate.problem
            except InputError as error:
                problem = str(error)
        if problem:
            raise InputError(f"{type(model).__name__} with the adapter in it: {problem}{EDIT}")
    return LoraAdapter(
        folder,
        list(writers.axes),
        parts.biases,
        output is not None and getattr(output, "weight", None) is embedding.weight,
        certificate,
        writers.unproved,
    )


# The weights that PEFT adapts as such, and their axis along the stream.
_KNOWN = {nn.Linear: 0, nn.Embedding: 1, Conv1D: 1}


def _parts(model: Any, axes: dict[str, int]) -> _LoraTargets:
    """Sort the parameters that write by how an adapter can reach them; refuse the others."""
    parts = _LoraTargets({}, {}, [])
    for name, axis in axes.items():
        path, _, leaf = name.rpartition(".")
        module, parameter = model.get_submodule(path), model.get_parameter(name)
        known = next((_KNOWN[kind] for kind in _KNOWN if isinstance(module, kind)), None)
        if leaf == "weight" and known == axis and _adaptable(module):
            parts.modules[path] = axis
        elif leaf == "bias" and path in parts.modules:
            parts.biases.append(name)
        elif known is None and (parameter.ndim == 2 or (parameter.ndim == 3 and axis > 0)):
            parts.parameters[name] = axis
        else:
            raise InputError(
                f"{name} of {type(model).__name__} writes into the stream, and is nothing that an "
                f"adapter reaches: {list(parameter.shape)} of a {type(module).__name__}{EDIT}"
            )
    return parts


def _adaptable(module: nn.Module) -> bool:
    """Whether a layer looks up what it is given: PEFT looks the same up in its own."""
    plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    return plain or not isinstance(module, nn.Embedding)


@contextmanager
def _adapted(model: Any, parts: _LoraTargets, folder: Path | None = None) -> Iterator[Any]:
    """Put an adapter, empty or from its folder, into a model; restore the model at the end."""
    import peft

    paths = [*parts.modules, *(name.rpartition(".")[0] for name in parts.parameters)]
    modules = {path: model.get_submodule(path) for path in paths}
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    biases = [(p, p.clone()) for p in map(model.get_parameter, parts.biases)]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=1,
        lora_alpha=1,
        target_modules=list(parts.modules),
        target_parameters=list(parts.parameters) or None,
        bias="lora_only" if parts.biases else "none",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in modules.values()),
    )
    try:
        with evaluating(model), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied embeddings, and of what it puts right itself
            try:
                if folder is None:
                    adapted: Any = peft.get_peft_model(model, config)
                else:
                    adapted = peft.PeftModel.from_pretrained(model, str(folder))
            except Exception as error:  # whatever a version of PEFT has against a family
                raise InputError(
                    f"PEFT {peft.__version__} does not adapt {type(model).__name__}: "
                    f"{first_line(error)}{EDIT}"
                ) from error
            yield adapted
    finally:
        for path, module in modules.items():
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module)
        model.__dict__.pop("peft_config", None)
        for parameter, wants in wanted:
            parameter.requires_grad = wants
        for parameter, before in biases:
            parameter.data.copy_(before)


def _layers(model: Any) -> dict[str, nn.Module]:
    """Return PEFT's layers by what they adapt: names of modules, and of parameters."""
    layers: dict[str, nn.Module] = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_embedding_A"):
            name = name.replace(".base_layer", "")  # those of one module stand in each other
            parameter = getattr(layer, "parameter_name", None)
            layers[f"{name}.{parameter}" if parameter else name] = layer
    return layers


def _as_taken(model: Any, parts: _LoraTargets) -> _LoraTargets:
    """Name the weight instead of the module if PEFT mistakes the module's name.

    In families with fused experts PEFT takes every ``down_proj`` for an expert's, even a dense one.
    """
    with _adapted(model, parts):
        taken = _layers(model)
    lost = [path for path in parts.modules if path not in taken]
    for path in lost:
        parts.parameters[f"{path}.weight"] = parts.modules.pop(path)
    return parts


def _fill(model: Any, parts: _LoraTargets, r: Tensor) -> None:
    """Write A [rank, in] and B [out, rank] into the adapter that is in a model, and the biases."""
    layers: dict[str, Any] = _layers(model)
    if other := sorted(layers.keys() ^ parts.modules.keys() ^ parts.parameters.keys()):
        raise InputError(f"PEFT does not adapt what it was asked to ({other[0]}){EDIT}")
    for name, layer in layers.items():
        base = layer.get_base_layer()
        weight = getattr(base, getattr(layer, "parameter_name", "weight"))
        if name in parts.modules:
            a, b = times(weight, parts.modules[name], r)[None], -r[:, None]
        else:
            a, b = _of_parameter(weight, parts.parameters[name], base, r)
        if layer.lora_embedding_A:
            tensors = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        else:
            tensors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        wide = weight.dtype is torch.float64
        for tensor, value in zip(tensors, (a, b), strict=True):
            tensor.data = value.to(tensor.device, torch.float64 if wide else torch.float32)
    for name in parts.biases:
        path, _, leaf = name.rpartition(".")
        project_(model.get_parameter(f"{path}.base_layer.{leaf}"), 0, r)


def _of_parameter(
    parameter: Tensor, axis: int, module: nn.Module, r: Tensor
) -> tuple[Tensor, Tensor]:
    """Return A and B of a matrix, or of one for each expert: rank one for each."""
    experts, writes_out = 1, axis == 0
    if parameter.ndim == 3:  # [experts, out, in], or with this flag [experts, in, out]
        experts, writes_out = len(parameter), axis == 1 + getattr(module, "is_transposed", False)
    other = times(parameter, axis, r).reshape(experts, -1)
    same = r.to(other).expand(experts, -1)
    a, b = (other, -same.T) if writes_out else (same, -other.T)
    return a.contiguous(), b.contiguous()

"""Decide which tensors of a checkpoint are edited, from its configuration and its headers alone.

The model is built on the meta device, where weights take no memory, and a forward pass is followed
there (`find_writers`); transformers' own renaming says which tensor becomes which parameter.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError, first_line
from refusal_kernels.files.atomic import read_json
from refusal_kernels.hf.chat_models import auto_class
from refusal_kernels.hf.model import hidden_size
from refusal_kernels.weights.shards import DTYPES, Shard, ShardTensor, inside
from refusal_kernels.weights.writers import find_writers

LIMIT_BUFFER = 64 << 20  # bytes: tables of positions and masks; a larger one stays on meta
LOAD = "; load the model and use rk.orthogonalize, then save it"
LIMIT_COUNT = 1 << 16  # of layers, heads or experts: each may be an object


@dataclass(frozen=True)
class CheckpointPlan:
    """The edits of a checkpoint."""

    axes: dict[str, int]  # the axis along the stream of every edited tensor, by its name in files
    head: tuple[str, str] | None  # if untied: the new output matrix, and the embedding it copies
    unread: list[str]  # unedited tensors that the model does not read
    unproved: list[str]  # as `Writers.unproved`


def make_plan(
    folder: Path, shards: list[Shard], direction: Direction, text_only: bool
) -> CheckpointPlan:
    """Return the edits of a checkpoint; refuse one that does not fit its model."""
    entries = {entry.name: entry for shard in shards for entry in shard.entries}
    model = build_on_meta(read_config(folder, len(entries)))
    _check_sizes(model, sum(math.prod(entry.shape) for entry in entries.values()))
    if direction.hidden != hidden_size(model):
        raise InputError(
            f"the direction has hidden size {direction.hidden}; the model has {hidden_size(model)}"
        )
    writers = find_writers(model, text_only=text_only)
    names = _TensorNames(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    axes: dict[str, int] = {}
    parts: dict[str, int] = {}
    unread = []
    for name, entry in entries.items():
        target, converter = names.target(name)
        if target not in parameters:
            unread.append(name)
        elif target in writers.axes:
            whole, axis = _placed(target, parameters[target], writers.axes[target], converter)
            _check(entry, whole, axis, direction.hidden)
            axes[name] = axis
            parts[target] = parts.get(target, 0) + 1
    for target in writers.axes:
        there = parts.get(target, 0)
        expected = parameters[target].shape[0] if there and target in names.merged else 1
        if there != expected:
            raise InputError(
                f"the checkpoint has {there} tensors for {target}; the model of its configuration "
                f"has {expected}"
            )
    return CheckpointPlan(
        axes, _head(model, names, entries, axes), sorted(unread), writers.unproved
    )


def _check_sizes(model: Any, numbers: int) -> None:
    """Refuse a parameter larger than the checkpoint: a forward pass draws it at random."""
    for name, parameter in model.named_parameters():
        if parameter.numel() > numbers:
            raise InputError(
                f"{name} would be {list(parameter.shape)} by the configuration; the checkpoint "
                f"holds {numbers} numbers"
            )


def read_config(folder: Path, tensors: int) -> Any:
    """Return a checkpoint's configuration; refuse one unknown, quantized or out of proportion."""
    document = read_json(inside(folder, "config.json"))
    if not isinstance(document, dict):
        raise InputError(f"{folder / 'config.json'} is malformed; expected a JSON object")
    nested = document.get("text_config")
    for part in (document, nested if isinstance(nested, dict) else {}):
        if part.get("quantization_config"):
            raise InputError(
                f"{folder} is quantized (quantization_config); expected a checkpoint in float32, "
                "bfloat16 or float16"
            )
    for name, value in _settings(document):
        if re.search("layers?$|heads?$|experts?$", name) and value > LIMIT_COUNT:
            raise InputError(
                f"{folder / 'config.json'} says {name} is {value}; expected at most {LIMIT_COUNT}"
            )
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever a configuration of anyone's can bring
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{folder} brings code of its own; read it, then give --trust-remote-code"
            ) from None
        raise InputError(f"{folder / 'config.json'} cannot be used: {first_line(error)}") from None
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > tensors:
        raise InputError(
            f"{folder / 'config.json'} says {layers} layers; the checkpoint has {tensors} tensors"
        )
    return config


def _settings(document: Any) -> Iterator[tuple[str, int]]:
    """Yield all whole numbers of a configuration with their names."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for name, value in items:
        if isinstance(value, dict | list):
            yield from _settings(value)
        elif isinstance(value, int):
            yield str(name), value


def build_on_meta(config: Any) -> Any:
    """Build a model without weights."""
    import transformers

    builder: Any = auto_class(config).from_config
    name = (getattr(config, "architectures", None) or [""])[0]
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and str(name).endswith(
        "ForCausalLM"
    ):
        builder = getattr(getattr(transformers, name, None), "_from_config", builder)
    try:
        with torch.device("meta"):
            model: Any = builder(config, attn_implementation="eager", dtype=torch.float32)
    except Exception as error:
        raise InputError(
            f"the model cannot be built from its configuration: {first_line(error)}"
        ) from None
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.nbytes <= LIMIT_BUFFER:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return model.eval()


@contextmanager
def _as_known() -> Iterator[None]:
    """Report a version of transformers whose renaming of tensors is unknown here."""
    try:
        yield
    except (ImportError, AttributeError, TypeError, ValueError, StopIteration) as error:
        import transformers

        raise InputError(
            f"transformers {transformers.__version__} names the tensors of a checkpoint in a way "
            f"that is not known here ({first_line(error)}){LOAD}"
        ) from error


class _TensorNames:
    """Maps a checkpoint's tensors to parameters as transformers does, by what PEFT uses."""

    def __init__(self, model: Any) -> None:
        with _as_known():
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming

            mapping = get_model_conversion_mapping(model)
        self._renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        self._converters = [m for m in mapping if isinstance(m, WeightConverter)]
        self._model = model
        self._prefix = model.base_model_prefix
        self._there = model.state_dict()
        self.merged: set[str] = set()  # parameters that were merged of several tensors

    def target(self, name: str) -> tuple[str, Any]:
        """Return the parameter's name, and the converter that makes it, or None."""
        with _as_known():
            from transformers.core_model_loading import rename_source_key

            target, pattern = rename_source_key(
                name, self._renamings, self._converters, self._prefix, self._there
            )
            if pattern is None:
                return target, None
            converter = next(c for c in self._converters if pattern in c.source_patterns)
            if any(type(op).__name__ == "MergeModulelist" for op in converter.operations):
                self.merged.add(target)
        return target, converter

    def in_files(self, parameter: str, tensor: Tensor) -> str:
        """Return the name that transformers would save a parameter under."""
        with _as_known():
            from transformers.core_model_loading import revert_weight_conversion

            (name,) = revert_weight_conversion(self._model, {parameter: tensor})
        return str(name)


def _placed(
    target: str, parameter: nn.Parameter, axis: int, converter: Any
) -> tuple[tuple[int, ...], int]:
    """Return the shape that a tensor must have to become (a part of) a parameter, and its axis."""
    shape = list(parameter.shape)
    for op in reversed(converter.operations if converter is not None else []):
        kind = type(op).__name__
        if kind == "MergeModulelist" and op.dim == 0 and axis > 0:
            shape, axis = shape[1:], axis - 1
        elif kind == "Transpose":
            a, b = op.dim0 % len(shape), op.dim1 % len(shape)
            shape[a], shape[b] = shape[b], shape[a]
            axis = {a: b, b: a}.get(axis, axis)
        else:
            raise InputError(
                f"{target} is put together by {kind} when the checkpoint is loaded{LOAD}"
            )
    return tuple(shape), axis


def _check(entry: ShardTensor, shape: tuple[int, ...], axis: int, hidden: int) -> None:
    if entry.dtype not in DTYPES:
        raise InputError(
            f"{entry.name} is {entry.dtype}; expected one of {', '.join(DTYPES)}, not quantized"
        )
    if axis < len(shape) - 2:
        raise InputError(f"{entry.name} has the stream along axis {axis} of {len(shape)}{LOAD}")
    if entry.shape != shape or shape[axis] != hidden or not math.prod(shape):
        raise InputError(
            f"{entry.name} is {list(entry.shape)}; the model of its configuration has {list(shape)}"
        )


def _head(
    model: Any, names: _TensorNames, entries: dict[str, ShardTensor], axes: dict[str, int]
) -> tuple[str, str] | None:
    """Return the output matrix to be added, and the embedding that it is a copy of."""
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if output is None or output.weight is not embedding.weight:
        return None
    head = next(name for name, module in model.named_modules() if module is output) + ".weight"
    edited = [
        name for name in axes if model.get_parameter(names.target(name)[0]) is embedding.weight
    ]
    there = [name for name in entries if names.target(name)[0] == head and name not in edited]
    name = there[0] if there else names.in_files(head, output.weight)
    if len(edited) != 1 or names.target(name)[0] != head or len(there) > 1:
        raise InputError(f"{head} is tied to the embedding and cannot be untied in the files{LOAD}")
    return name, edited[0]


def untied_config(document: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json whose embeddings are not tied."""
    document = {**document, "tie_word_embeddings": False}
    if isinstance(document.get("text_config"), dict):
        document["text_config"] = {**document["text_config"], "tie_word_embeddings": False}
    return document

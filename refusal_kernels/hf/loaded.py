"""Check that a loaded model is the one that its files describe.

transformers fills what a file lacks with random numbers, skips what it has no place for, and only
logs both.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from refusal_kernels.errors import InputError
from refusal_kernels.hf.model import layer_list

# what old files and quantized ones hold in a block besides weights; ``attn.bias`` is a causal mask
_BUFFERS = re.compile(
    "bias|masked_bias|causal_mask|inv_freq|(cos|sin)_cached|position_ids|_extra_state"
    "|(input|output|weight|[kqv]|kv)_(scale|zero_point).*|.*(absmax|quant_map|weight_format).*"
)
_UNREAD: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()
REPORTED: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Options of ``from_pretrained`` that make it return what `check_loaded` reads, not log it."""


def check_loaded(name: str, model: Any, info: Mapping[str, Any]) -> Any:
    """Return a model whose files hold all of its weights, and nothing that its blocks leave out.

    Parameters
    ----------
    name
        What the messages call the model.
    model, info
        What ``from_pretrained(..., **REPORTED)`` returned.

    Raises
    ------
    InputError
        If weights are missing or have another shape (they are random now), or if the files hold
        weights of a block that the block has no place for, such as biases that the configuration
        denies. Tied weights and parts that are not loaded, such as a vision tower, are not missed.
    """
    shapes = sorted(info["mismatched_keys"])
    if shapes:
        _, in_file, expected = shapes[0]
        raise InputError(
            f"model '{name}': {_few([key for key, *_ in shapes])} in its files: {list(in_file)} "
            f"instead of {list(expected)}; expected the shapes that its configuration gives"
        )
    if missing := sorted(info["missing_keys"]):
        hint = ""
        if unread := sorted(info["unexpected_keys"]):
            hint = f"; the files hold {unread[0]}, which it has no place for"
        raise InputError(
            f"model '{name}': its files lack {_few(missing)}{hint}; expected all weights of "
            f"{type(model).__name__}, as transformers makes up what is missing"
        )
    if left := _left_by_blocks(model, info["unexpected_keys"]):
        raise InputError(
            f"model '{name}': {type(model).__name__} has no place for {_few(left)} of its files; "
            "expected a configuration that fits them"
        )
    _UNREAD[model] = sorted(info["unexpected_keys"])
    return model


def unread_tensors(model: Any) -> list[str]:
    """Return the tensors of a loaded model's files that it has no place for."""
    return _UNREAD.get(model, [])


def unread_weights(model: Any) -> list[str]:
    """Return those of them that are no known buffers."""
    return [key for key in unread_tensors(model) if not _BUFFERS.fullmatch(key.rpartition(".")[2])]


def _left_by_blocks(model: Any, unread: Sequence[str]) -> list[str]:
    """Return the unread weights that belong to the blocks of a decoder, and no known buffers."""
    blocks = layer_list(model)
    if blocks is None:
        return []
    count, list_name = len(blocks[1]), blocks[0].rpartition(".")[2]
    modules = dict(model.named_modules())
    path = next(name for name, module in modules.items() if module is blocks[1])
    found = []
    for key in unread:
        # a file may have another prefix than the model, so the end of the path is compared
        before, dot, after = key.partition(f"{list_name}.")
        number, _, rest = after.partition(".")
        if not (path + ".").endswith(before + dot) or not number.isdigit() or int(number) >= count:
            continue
        parent, _, kind = rest.rpartition(".")
        module = modules.get(f"{path}.{number}.{parent}")
        if (kind == "bias" and hasattr(module, "weight")) or not _BUFFERS.fullmatch(kind):
            found.append(key)
    return sorted(found)


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"the weight {names[0]}{more}"

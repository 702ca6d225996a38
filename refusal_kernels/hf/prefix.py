"""The tokens that all prompts begin with: a model runs them once and keeps their keys and values.

More than half of a short prompt's tokens belong to its chat template and come before everything
else. What attention keeps of them does not depend on what follows, so later passes begin after
them. A model that keeps more than keys and values of the tokens before (a state, as Mamba) runs
whole prompts; `agree` finds that out by running both ways.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from refusal_kernels.hf.model import decoder, input_device, input_embedding

LEAST = 0.2
"""The share of the longest prompt from which a prefix is kept apart: 13 % save no time."""

ARGUMENTS = ("cache", "past_key_values")
"""What versions of transformers call the keys and values of the tokens before."""


@dataclass(frozen=True)
class Prefix:
    """What a model keeps of the first tokens of a prompt, in one or several versions.

    A version is what one intervention makes of these tokens.
    """

    ids: list[int]
    argument: str  # of the model's forward, which takes the cache
    # keys and values of every layer, [versions, heads, tokens, head size] each; None where a layer
    # keeps none of its own
    layers: list[tuple[Tensor, Tensor] | None]

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(self.ids)

    def inputs(self, padding: Tensor, versions: Sequence[int] | None = None) -> dict[str, Any]:
        """Return the arguments of a pass over what follows the first columns of a padded batch.

        The columns of the cache are those that the pass leaves out: a row's padding, then as many
        tokens of the prefix as fit. So positions, masks and distances are those of the whole pass.

        Parameters
        ----------
        padding
            int64 [batch]: the padding on the left of each row.
        versions
            The version that each row takes; by default the first.
        """
        columns = torch.arange(self.tokens, device=padding.device)
        # a column of padding is masked, whatever stands there
        index = (columns - padding[:, None]).clamp(min=0)
        rows = torch.tensor([0] * len(padding) if versions is None else versions)
        cache = DynamicCache()
        for layer, kept in enumerate(self.layers):
            if kept is not None:
                keys, values = (
                    x.transpose(1, 2)[rows[:, None].to(x.device), index.to(x.device)] for x in kept
                )
                cache.update(keys.transpose(1, 2), values.transpose(1, 2), layer)
        return {self.argument: cache, "use_cache": True}

    def after(self, layer: int, below: "Prefix") -> "Prefix":
        """Return this prefix with another's first layers, up to but without `layer`.

        A pass that starts at a layer keeps nothing below it, where masks still read the length.
        """
        versions = next(kept[0] for kept in self.layers[layer:] if kept is not None).shape[0]
        lower = [
            kept and (kept[0].expand(versions, -1, -1, -1), kept[1].expand(versions, -1, -1, -1))
            for kept in below.layers[:layer]
        ]
        return Prefix(self.ids, self.argument, [*lower, *self.layers[layer:]])


def common_prefix(prompts: Sequence[list[int]], longest: int) -> list[int]:
    """Return the tokens that all prompts begin with; none if they are too few to matter."""
    first, last = min(prompts), max(prompts)  # no two differ earlier than these
    same = [a == b for a, b in zip(first, last, strict=False)]
    count = [*same, False].index(False)
    return first[:count] if count >= LEAST * longest else []


@torch.inference_mode()
def run_prefix(model: Any, ids: Sequence[int], versions: int = 1) -> Prefix:
    """Run the first tokens of a prompt through the decoder, in so many rows, and keep what it does.

    Raises whatever a model raises that takes no such cache, and ValueError where it keeps nothing.
    """
    module = decoder(model)
    known = inspect.signature(module.forward).parameters
    argument = next((name for name in ARGUMENTS if name in known), None)
    if argument is None:
        raise ValueError(f"{type(module).__name__} takes no cache of keys and values")
    cache = DynamicCache()
    rows = torch.tensor([list(ids)] * versions, device=input_device(model))
    module(
        input_ids=rows,
        attention_mask=torch.ones_like(rows),
        position_ids=torch.arange(rows.shape[1], device=rows.device).expand_as(rows),
        use_cache=True,
        **{argument: cache},
    )
    every: list[Any] = cache.layers
    layers = [None if layer.keys is None else (layer.keys, layer.values) for layer in every]
    if not any(layers):
        raise ValueError(f"{type(module).__name__} kept no keys and values")
    return Prefix(list(ids), argument, layers)


def agree(model: Any, whole: Tensor, short: Tensor) -> bool:
    """Whether two ways to compute vectors [..., size] differ by the model's rounding alone."""
    embedding = input_embedding(model)
    eps = torch.finfo(short.dtype if embedding is None else embedding.weight.dtype).eps
    difference = (whole.double() - short.double()).norm(dim=-1)
    # rounding adds up over the layers; where something is missing, the difference is far larger
    return bool((difference <= eps**0.5 * whole.double().norm(dim=-1)).all())

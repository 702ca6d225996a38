"""Find the parameters that write into a model's residual stream, or refuse with the reason."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError, first_line
from refusal_kernels.hf.model import hidden_size, text_config
from refusal_kernels.interventions import Ablate
from refusal_kernels.patching.patch import patch
from refusal_kernels.weights.flow import StreamFlow
from refusal_kernels.weights.lineage import WriterAxis

INSTEAD = "; ablate it while the model runs instead, with rk.patch(model, rk.Ablate(direction))"
TOKENS = 4


@dataclass(frozen=True)
class Writers:
    """The parameters that write into the stream."""

    axes: dict[str, int]  # their axis along the stream, by name in the order of the model
    unproved: list[str]  # of that width, but reached by no text: of an image encoder, for example


@torch.no_grad()
def find_writers(model: Any, *, text_only: bool = False) -> Writers:
    """Follow a forward pass over random tokens and return the parameters that write.

    The weights may be on meta. `text_only` accepts parameters that no text reaches. Refuses a model
    where editing them is not ablation: a norm or gain follows what writes, or a parameter has
    another use as well.
    """
    hidden = hidden_size(model)
    # any direction will do: its numbers are not used
    direction = Direction(torch.ones(hidden))
    flow = StreamFlow(model, hidden)
    with evaluating(model), patch(model, Ablate(direction), fuse_norms=False) as handle:
        expected = [site.name for site in handle.report().sites]
        with flow.through(handle.sites), flow:
            run(model, random_ids(model, 0))
    reached = {site.name for site in flow.sites}
    missing = [name for name in expected if name not in reached]
    if missing and not text_only:
        raise InputError(
            f"{missing[0]} of {type(model).__name__} is not reached by text alone, so that what "
            "writes there is not known; with text_only=True it is left as it is"
        )
    sources: set[WriterAxis] = set()
    for site in flow.sites:
        for value in (site.branch, site.stream):
            if value.writes is None:
                reason = value.why or "an operation that is not known"
                raise InputError(
                    f"{site.name} of {type(model).__name__}: what is written there goes through "
                    f"{reason}, so removing the direction from weights before that is not "
                    f"ablation{INSTEAD}"
                )
            sources |= value.writes
    writers = _spread(model, sources, flow.touched)
    for name in sorted({name for name, _ in sources}):
        if name in flow.leaks:
            raise InputError(
                f"{name} of {type(model).__name__} writes into the stream, and is also used in "
                f"{flow.leaks[name]}, where ablation would leave it as it is{INSTEAD}"
            )
    if writers.unproved and not text_only:
        raise InputError(
            f"{len(writers.unproved)} parameters of {type(model).__name__} may write into the "
            f"stream, but not from text ({writers.unproved[0]}, ...); with text_only=True they "
            "are left as they are, and images or audio still write the direction"
        )
    return writers


def _spread(model: nn.Module, sources: set[WriterAxis], touched: set[str]) -> Writers:
    """Add parameters named like the sources that no token reached: experts not chosen."""
    patterns: dict[str, set[int]] = {}
    for name, axis in sources:
        patterns.setdefault(_pattern(name), set()).add(axis)
    seen = {_pattern(name) for name in touched}
    axis_of = dict(sources)
    if len(axis_of) != len(sources):
        raise InputError(
            f"{type(model).__name__}: a parameter writes along two of its axes{INSTEAD}"
        )
    hidden = hidden_size(model)
    axes: dict[str, int] = {}
    unproved: list[str] = []
    for name, parameter in model.named_parameters():
        pattern = _pattern(name)
        if name in axis_of:
            axes[name] = axis_of[name]
        elif name in touched or hidden not in parameter.shape:
            continue
        elif pattern in patterns:
            (axes[name],) = patterns[pattern]
        elif pattern not in seen:
            unproved.append(name)
    return Writers(axes, unproved)


def _pattern(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", name)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode; restore the mode of every module at the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def random_ids(model: Any, seed: int, tokens: int = TOKENS) -> Tensor:
    """Return token ids that stand for text, int64 [1, tokens]."""
    config = text_config(model)
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    if embedding is None:
        raise InputError(f"{type(model).__name__} has no single matrix of token embeddings")
    rows = embedding.shape[0]
    special = {
        value
        for part in {id(c): c for c in (model.config, config)}.values()
        for key, value in part.to_dict().items()
        if re.search("token_(id|index)$", key) and isinstance(value, int)
    }
    rows = min(rows, getattr(config, "vocab_size", None) or rows)
    ids = torch.randint(rows, (64 * tokens,), generator=torch.Generator().manual_seed(seed))
    plain = [i for i in ids.tolist() if i not in special]
    device = embedding.device
    return torch.tensor([plain[:tokens]], device="cpu" if device.type == "meta" else device)


def run(model: Any, ids: Tensor) -> Tensor:
    """Return the logits of a model, [1, tokens, vocabulary]."""
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} could not be run on token ids alone "
            f"({type(error).__name__}: {first_line(error)}), so what writes into its stream is "
            "not known"
        ) from error
    return logits

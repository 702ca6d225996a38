"""Certify that edited weights are what ablation at run time is, by running both."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.interventions import Ablate
from refusal_kernels.orthogonalize.writers import INSTEAD, Writers, evaluating, random_ids, run
from refusal_kernels.patching import patch

BLOCK_NUMBERS = 1 << 18  # in float64 at once: 2 MiB, and as much for what is taken away

# Largest |r.h| / |h|: the rounding of the weights and of sums, over layers; a few eps. In a model in
# float64 many a family still keeps its stream, or sums a branch, in float32.
COMPONENT = {
    torch.float64: 1e-6,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}
# Largest logit difference over the largest logit, in float64 too: the patch holds the direction in
# float32. Random models amplify a rounding by orders of magnitude; in half precision their logits
# say nothing (an expert's choice may flip).
LOGITS = {torch.float64: 1e-4, torch.float32: 1e-4}


@dataclass(frozen=True)
class Certificate:
    """How far a model with edited weights is from the ablated one, on the same tokens.

    Attributes
    ----------
    tokens
        How many tokens were compared.
    logit_difference
        Largest absolute difference of a logit.
    relative
        The same over the largest absolute logit under ablation.
    components
        By place of the stream ("embed", "layers.3.attn", ...): the largest |r.h| / |h| that the
        edited model has there.
    effect
        Largest difference of a logit that ablation makes to the model as it was, over the largest
        logit: what there was to be reached.
    dtype
        Of the edited model's weights.
    """

    tokens: int
    logit_difference: float
    relative: float
    components: dict[str, float]
    effect: float
    dtype: str

    @property
    def component(self) -> float:
        """The largest of the components."""
        return max(self.components.values())

    @property
    def problem(self) -> str | None:
        """What is beyond the rounding of the dtype, or None."""
        dtype = getattr(torch, self.dtype)
        worst = max(self.components, key=lambda name: self.components[name])
        if not self.component <= COMPONENT[dtype]:
            return f"the direction is still written at {worst}: |r.h| is {self.component:.1e} |h|"
        if not self.relative <= LOGITS.get(dtype, float("inf")):
            return (
                f"the logits differ from those under ablation by {self.relative:.1e} of the largest"
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return {**asdict(self), "component": self.component, "problem": self.problem}

    def __str__(self) -> str:
        return (
            f"on {self.tokens} tokens: |r.h| <= {self.component:.1e} |h| at all "
            f"{len(self.components)} places; logits within {self.relative:.1e} of the ablated "
            f"model's (ablation moves them by {self.effect:.1e}), in {self.dtype}"
        )


def certify(
    model: Any,
    orthogonalized: Any,
    direction: Direction,
    ids: Tensor | None = None,
) -> Certificate:
    """Compare a model with edited weights to the original one under ablation at run time.

    Parameters
    ----------
    model
        The original model, unpatched.
    orthogonalized
        The edited one, of the same architecture, unpatched.
    direction
        What was removed.
    ids
        Token ids, int64 [batch, tokens], without padding; by default 64 random ones.

    Returns
    -------
    Certificate
        Its ``problem`` is None if the two agree.

    Raises
    ------
    InputError
        If one of the models cannot be patched, or does not run on token ids alone.
    """
    ids = random_ids(model, 1, 64) if ids is None else ids
    return _compared(model, lambda: (orthogonalized, nullcontext()), direction, ids)


def prove(model: Any, writers: Writers, direction: Direction) -> Certificate:
    """Certify an edit that has not been made: every weight is projected as the model reads it.

    Raises
    ------
    InputError
        If the edited model would not be the ablated one.
    """
    ids = random_ids(model, 1, 8)
    certificate = _compared(
        model, lambda: (model, _Projected(model, writers, direction)), direction, ids
    )
    if certificate.problem:
        raise InputError(f"{type(model).__name__}: {certificate.problem}{INSTEAD}")
    return certificate


@torch.no_grad()
def _compared(
    model: Any,
    edited: Callable[[], tuple[Any, AbstractContextManager[Any]]],
    direction: Direction,
    ids: Tensor,
) -> Certificate:
    with evaluating(model):
        plain = run(model, ids)
        with patch(model, Ablate(direction), fuse_norms=False):
            expected = run(model, ids)
    other, context = edited()
    components: dict[str, float] = {}
    hidden = direction.hidden

    def see(name: str, h: Tensor) -> None:
        rows = h.detach().reshape(-1, hidden).double()
        r = unit(direction).to(rows.device)
        share = (rows @ r).abs() / rows.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
        components[name] = float(share.max())

    handle = patch(other, Ablate(direction, 0.0), fuse_norms=False)  # strength 0 changes nothing
    with evaluating(other), handle, handle.watch(see), context:
        got = run(other, ids)
    scale = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
    difference = float((got.double() - expected.double()).abs().max())
    dtype = next(p.dtype for p in other.parameters() if p.is_floating_point())
    return Certificate(
        ids.numel(),
        difference,
        difference / scale,
        components,
        float((plain.double() - expected.double()).abs().max()) / scale,
        str(dtype).removeprefix("torch."),
    )


def unit(direction: Direction) -> Tensor:
    """Return the unit vector in float64."""
    return direction.vector.double() / direction.norm


def project_(tensor: Tensor, axis: int, r: Tensor) -> None:
    """Remove the component along r, float64 [hidden], from a tensor's axis, in place.

    In float64 and rounded once to the tensor's dtype, some rows at a time.
    """
    r = r.to(tensor.device)
    rows = tensor.movedim(axis, -1)
    if rows.ndim == 1:
        rows = rows.unsqueeze(0)
    if rows.ndim > 2:
        for part in rows:
            project_(part, part.ndim - 1, r)
        return
    for block in rows.split(max(1, BLOCK_NUMBERS // len(r))):
        wide = block.double()
        block.copy_(wide.sub_(torch.outer(wide @ r, r)))


class _Projected(TorchDispatchMode):
    """Lets every op read writers as they will be, while nothing is changed."""

    def __init__(self, model: Any, writers: Writers, direction: Direction) -> None:
        super().__init__()
        self._axes = {
            parameter: writers.axes[name]
            for name, parameter in model.named_parameters()
            if name in writers.axes
        }
        head = getattr(model.get_output_embeddings(), "weight", None)
        self._tied = head if head is not None and head in self._axes else None
        self._unit = unit(direction)
        self._latest: tuple[Tensor, Tensor] | None = None  # experts are read many times in a row

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        embeds = func._schema.name == "aten::embedding"

        def seen(value: Any) -> Any:
            if not isinstance(value, Tensor) or value not in self._axes:
                return value
            if value is self._tied and not embeds:  # the head, which is untied
                return value
            if self._latest is None or self._latest[0] is not value:
                copy = value.detach().clone()
                project_(copy, self._axes[value], self._unit)
                self._latest = value, copy
            return self._latest[1]

        return func(*tree_map(seen, args), **tree_map(seen, kwargs or {}))

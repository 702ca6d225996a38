"""Certify that edited weights give what ablation at run time gives, by running both."""

import os
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
from refusal_kernels.patching.patch import patch
from refusal_kernels.weights.projection import project_, unit
from refusal_kernels.weights.writers import INSTEAD, Writers, evaluating, random_ids, run

TOKENS = 64

# Largest |r.h| / |h|: the rounding of the weights and of sums, over layers; a few eps. In a model
# in float64 many a family still keeps its stream, or sums a branch, in float32.
COMPONENT = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
# Largest logit difference over the largest logit, in float64 too: the patch holds the direction in
# float32. Random models amplify a rounding by orders of magnitude; in half precision their logits
# say nothing (an expert's choice may flip).
LOGITS = {torch.float64: 1e-4, torch.float32: 1e-4}


@dataclass(frozen=True)
class Certificate:
    """The differences of a model with edited weights from the ablated one, on the same tokens.

    Attributes
    ----------
    tokens
        How many tokens were compared.
    logit_difference
        Largest absolute difference of a logit.
    relative
        `logit_difference` over the largest absolute logit under ablation.
    components
        By place of the stream ("embed", "layers.3.attn", ...): the largest |r.h| / |h| in the
        edited model, where |h| is at least the median norm of all tokens.
    effect
        Largest logit difference of the ablated from the unmodified model, over the largest logit.
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
        """What exceeds the rounding of the dtype, or None."""
        dtype = getattr(torch, self.dtype)
        for name, share in self.components.items():
            if not share <= COMPONENT[dtype]:
                return f"the direction is still written at {name}: |r.h| is {share:.1e} |h|"
        if not self.relative <= LOGITS.get(dtype, float("inf")):
            return (
                f"the logits differ from those under ablation by {self.relative:.1e} of the largest"
            )
        return None

    @property
    def layers(self) -> dict[str, float]:
        """The largest component of each layer ("embed", "layers.0", ...), in order."""
        largest: dict[str, float] = {}
        for name, component in self.components.items():
            layer = ".".join(name.split(".")[:2])
            largest[layer] = max(largest.get(layer, 0.0), component)
        return largest

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return {**asdict(self), "component": self.component, "problem": self.problem}

    def __str__(self) -> str:
        return (
            f"on {self.tokens} tokens: |r.h| <= {self.component:.1e} |h| at all "
            f"{len(self.components)} places; logits within {self.logit_difference:.1e} "
            f"({self.relative:.1e} of the largest) of the ablated model's, which ablation moves by "
            f"{self.effect:.1e} of the largest, in {self.dtype}"
        )


def certify(
    model: Any, orthogonalized: Any, direction: Direction, ids: Tensor | None = None
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
    return AblatedRun.of(model, direction, ids).certify(orthogonalized)


def certify_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    direction: Direction,
    load: Callable[[str], Any],
) -> Certificate:
    """`certify` two folders, one model in memory at a time; `load` loads a folder's model."""
    expected = AblatedRun.of(load(os.fspath(source)), direction)
    return expected.certify(load(os.fspath(target)))


def prove(model: Any, writers: Writers, direction: Direction) -> Certificate:
    """Certify an edit before it is made, by projecting every weight as it is read, or refuse it."""
    expected = AblatedRun.of(model, direction)
    certificate = expected.certify(model, _Projected(model, writers, direction))
    if certificate.problem:
        raise InputError(f"{type(model).__name__}: {certificate.problem}{INSTEAD}")
    return certificate


@dataclass(frozen=True)
class AblatedRun:
    """A model's outputs under ablation, to certify another model against."""

    direction: Direction
    ids: Tensor  # int64 [batch, tokens]
    logits: Tensor  # under ablation: [batch, tokens, vocabulary]
    plain: Tensor  # unmodified: [batch, tokens, vocabulary]

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, direction: Direction, ids: Tensor | None = None) -> "AblatedRun":
        """Run a model unmodified and under ablation."""
        ids = random_ids(model, 1, TOKENS) if ids is None else ids
        with evaluating(model):
            plain = run(model, ids)
            with patch(model, Ablate(direction), fuse_norms=False):
                logits = run(model, ids)
        return cls(direction, ids, logits, plain)

    @torch.no_grad()
    def certify(
        self, edited: Any, reading: AbstractContextManager[Any] | None = None
    ) -> Certificate:
        """Run a model whose weights are edited, or read as if they were."""
        components: dict[str, float] = {}
        r, hidden = unit(self.direction), self.direction.hidden

        def see(name: str, h: Tensor) -> None:
            rows = h.detach().reshape(-1, hidden).double()
            norms = rows.norm(dim=-1)
            # a token along the direction leaves only rounding, which its own norm would inflate
            norms = norms.clamp_min(float(norms.median())).clamp_min(1e-300)
            share = (rows @ r.to(rows.device)).abs() / norms
            components[name] = max(components.get(name, 0.0), float(share.max()))

        handle = patch(edited, Ablate(self.direction, 0.0), fuse_norms=False)  # changes nothing
        with evaluating(edited), handle, handle.watch(see), reading or nullcontext():
            got = run(edited, self.ids)
        expected, plain = self.logits.double(), self.plain.double()
        scale = max(float(expected.abs().max()), 1e-300)
        difference = float((got.to(expected) - expected).abs().max())
        return Certificate(
            self.ids.numel(),
            difference,
            difference / scale,
            components,
            float((plain - expected).abs().max()) / scale,
            str(edited.get_input_embeddings().weight.dtype).removeprefix("torch."),
        )


class _Projected(TorchDispatchMode):
    """Lets every op read the projected writers while the weights stay unchanged."""

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

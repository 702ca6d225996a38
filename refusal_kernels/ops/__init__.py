"""The ops: the one place where activations are touched.

Shapes: x and residual ``[..., hidden]`` in float32, bfloat16 or float16 (float64 on the reference
backend), any strides, any number of tokens. ``bank`` is float32 ``[programs, 2, slots, hidden]``
(read vectors, then write vectors), ``params`` float32 ``[programs, slots, 5]`` (a, c, b, low,
high), ``route`` int32 ``[tokens]``: the program of every token, -1 for the plain add; None means
program 0 everywhere. See `refusal_kernels.ops.reference` for the formula.

The functions here pick a backend for every call (`explain`, `use_backend`). The same ops stand in
``torch.ops.refusal_kernels``, where the dispatcher picks by device.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from refusal_kernels.ops.registry import (
    BACKENDS,
    Explanation,
    edit_for,
    explain,
    op_for,
    register_backend,
    serving,
    use_backend,
)

__all__ = [
    "BACKENDS",
    "Explanation",
    "add_steer",
    "add_steer_",
    "add_steer_rms_norm",
    "explain",
    "moments_",
    "op_for",
    "register_backend",
    "rms_norm",
    "scores",
    "use_backend",
]


@overload
def add_steer(
    x: Tensor, residual: Tensor | None, bank: Tensor, params: Tensor, route: Tensor | None = None,
    *, return_scores: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def add_steer(
    x: Tensor, residual: Tensor | None, bank: Tensor, params: Tensor, route: Tensor | None = None,
    *, return_scores: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def add_steer(
    x: Tensor, residual: Tensor | None, bank: Tensor, params: Tensor, route: Tensor | None = None,
    *, return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Add the residual and steer: ``h = s + sum_j phi_j(v_j . s) u_j``, ``s = x + residual``.

    Parameters
    ----------
    x, residual
        [..., hidden]; without a residual x itself is steered.
    bank
        float32 [programs, 2, slots, hidden].
    params
        float32 [programs, slots, 5].
    route
        int32 [tokens] or None. A row with -1 is bit-identical to ``x + residual``. On a CPU a
        value out of range raises; on a GPU, where looking would wait for the device, it acts as -1.
    return_scores
        Also return what the edit read, at no further pass.

    Returns
    -------
    h : Tensor
        Contiguous, in the shape and dtype of x.
    scores : Tensor
        With ``return_scores``: float32 [tokens, slots], ``v_j . s`` before the edit, 0 where the
        route is -1. Telemetry: no gradient flows through it (through `scores` it does).

    Raises
    ------
    RuntimeError
        If shapes, dtypes or devices do not fit; nothing has been computed then.
    """
    op = edit_for("add_steer_scores" if return_scores else "add_steer", x, residual, bank, params)
    result: Tensor | tuple[Tensor, Tensor] = op(x, residual, bank, params, route)
    return result


def add_steer_(
    x: Tensor, residual: Tensor, bank: Tensor, params: Tensor, route: Tensor | None = None
) -> Tensor:
    """Write `add_steer` into ``residual`` and return it.

    Raises
    ------
    RuntimeError
        As `add_steer`; also where a gradient would be needed, or rows of residual share memory.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, residual, bank, params)):
        raise RuntimeError("add_steer_ overwrites its input and has no gradient; use add_steer")
    serving("add_steer_", x)(x, residual, bank, params, route)
    return residual


@overload
def add_steer_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, bank: Tensor, params: Tensor,
    route: Tensor | None = None, weight_offset: float = 0.0,
    *, return_scores: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def add_steer_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, bank: Tensor, params: Tensor,
    route: Tensor | None = None, weight_offset: float = 0.0,
    *, return_scores: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
def add_steer_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, bank: Tensor, params: Tensor,
    route: Tensor | None = None, weight_offset: float = 0.0,
    *, return_scores: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Add, steer, and normalize the steered row: what a pre-norm block does between two writers.

    Parameters
    ----------
    x, residual, bank, params, route, return_scores
        As for `add_steer`.
    weight, eps, weight_offset
        As for `rms_norm`.

    Returns
    -------
    normed, h : Tensor
        Both contiguous, in the shape and dtype of x; h has the bits of `add_steer`. The norm reads
        h in float32, before it is rounded.
    scores : Tensor
        With ``return_scores``, as `add_steer` returns them.

    Raises
    ------
    RuntimeError
        As `add_steer`.
    """
    op = "add_steer_rms_norm_scores" if return_scores else "add_steer_rms_norm"
    serve = edit_for(op, x, residual, weight, bank, params)
    result: tuple[Tensor, Tensor] = serve(
        x, residual, weight, eps, bank, params, route, weight_offset
    )
    return result


def scores(h: Tensor, bank: Tensor, route: Tensor | None = None) -> Tensor:
    """Project every token on the read vectors: ``v_j . h``.

    Returns
    -------
    Tensor
        float32 [tokens, slots]; 0 where the route is -1.
    """
    return serving("scores", h)(h, bank, route)


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """Root-mean-square norm, ``x / sqrt(mean(x^2) + eps) * (weight + weight_offset)``.

    Parameters
    ----------
    x
        [..., hidden].
    weight
        [hidden], in any dtype that x may have.
    eps
        Added to the mean square.
    weight_offset
        1 for Gemma, whose norms multiply by (1 + weight).

    Notes
    -----
    Zhang and Sennrich 2019. Computed in float32 and rounded once; Hugging Face rounds the
    normalized row to the model's dtype before the weight, so half-precision bits differ from it.
    """
    return serving("rms_norm", x)(x, weight, eps, weight_offset)


def moments_(
    count: Tensor, mean: Tensor, m2: Tensor, activations: Tensor, index: Tensor, group: Tensor
) -> None:
    """Fold a batch of activations into running moments, in place.

    Parameters
    ----------
    count
        int64 [groups, positions].
    mean, m2
        float64 [groups, positions, hidden], contiguous: mean and sum of squared deviations.
    activations
        [batch, tokens, hidden]; rows that are not named below are not read.
    index
        int32 [batch, tokens]: the position slot that a token feeds, -1 for none.
    group
        int32 [batch]: the group of a sequence, -1 for none.

    Notes
    -----
    States merge by Chan, Golub and LeVeque 1979. The order of summation is fixed by the shapes.
    """
    serving("moments_", activations)(count, mean, m2, activations, index, group)

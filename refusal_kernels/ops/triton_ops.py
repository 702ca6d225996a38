"""The ops in Triton: for GPUs without a CUDA build, and on a CPU in Triton's interpreter.

Each op is a ``triton_op``, so a compiler sees the kernel inside it.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from refusal_kernels.ops import autograd
from refusal_kernels.ops import triton_kernels as kernels


def plan(hidden: int, slots: int = 1) -> dict[str, int]:
    """Channels per step (a whole row where it fits) and warps: 16 to 32 floats a thread.

    Both set the order of a row's sums, so they must not follow from the number of rows: a row
    has the same bits alone and in any batch. Chosen by registers, not by a clock: with these
    no variant spills on sm_80, sm_90a or sm_100 (``tools/compile_triton.py``).
    """
    slots = triton.next_power_of_2(slots)
    block = max(16, min(triton.next_power_of_2(hidden), 8192 // slots))
    return {"BLOCK": block, "num_warps": 8 if block * slots >= 2048 else 4}


# Channels of a program, rows of a step, and steps in flight: 8 loads of 16 bytes a thread in
# half precision. The sums in float32 are then of 8 values.
MOMENTS = {"BLOCK": 128, "ROWS": 8, "STEPS": 8}


def plan_moments(rows: int, slots: int, hidden: int) -> tuple[int, int]:
    """Blocks of channels, and splits of a slot's rows: a thousand programs where rows allow.

    From the shapes alone: the splits set the order of summation, which no device may change.
    The workspace is then at most the size of mean and m2, and 2 MB.
    """
    blocks = triton.cdiv(hidden, MOMENTS["BLOCK"])
    useful = triton.cdiv(rows, MOMENTS["ROWS"] * MOMENTS["STEPS"])
    return blocks, min(triton.cdiv(1024, slots * blocks), useful)


def _rows(t: Tensor) -> Tensor:
    """[tokens, hidden] with contiguous channels; a view where the strides allow one."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _has_rows(t: Tensor) -> bool:
    """Whether `_rows` gives a view; from the strides, for what is traced has no address."""
    try:
        return t.view(-1, t.shape[-1]).stride(-1) == 1
    except (RuntimeError, ValueError):  # the latter from a tensor that is traced
        return False


def _launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **meta: Any) -> None:
    # Triton launches on the current device, which need not be the tensor's
    on = torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()
    with on:
        if kernels.INTERPRETED:
            kernel[grid](*args, **meta)
        else:
            torch.library.wrap_triton(kernel)[grid](*args, **meta)


def _check(x: Tensor, bank: Tensor, params: Tensor | None, route: Tensor | None) -> None:
    if bank.dtype != torch.float32 or bank.dim() != 4 or bank.shape[3] != x.shape[-1]:
        raise RuntimeError(
            f"bank is {bank.dtype} {list(bank.shape)}; "
            f"expected float32 [programs, 2, slots, {x.shape[-1]}]"
        )
    tokens, slots = x.shape[:-1].numel(), bank.shape[2]
    _check_is("params", params, torch.float32, (bank.shape[0], slots, 5))
    _check_is("route", route, torch.int32, (tokens,))


def _check_is(name: str, t: Tensor | None, dtype: torch.dtype, shape: Sequence[int]) -> None:
    if t is not None and (t.dtype != dtype or t.shape != torch.Size(shape)):
        raise RuntimeError(
            f"{name} is {t.dtype} {list(t.shape)}; "
            f"expected {str(dtype).removeprefix('torch.')} {list(shape)}"
        )


def _check_weight(weight: Tensor, hidden: int) -> None:
    if weight.shape != (hidden,):
        raise RuntimeError(f"weight has shape {list(weight.shape)}; expected [{hidden}]")


def _steer(
    x: Tensor, residual: Tensor | None, out: Tensor, bank: Tensor, params: Tensor,
    route: Tensor | None,
    *, scores: Tensor | None = None, normed: Tensor | None = None, h: Tensor | None = None,
    weight: Tensor | None = None, eps: float = 0.0, weight_offset: float = 0.0,
    adjoint: bool = False,
) -> None:  # fmt: skip
    """Launch `steer_kernel`; out is [tokens, hidden], what is None is not touched.

    The adjoint reads scores and h, where x and residual are gradients; else scores and normed
    are written.
    """
    _check(x, bank, params, route)
    programs, _, slots, hidden = bank.shape
    _check_is("grad_h" if adjoint else "residual", residual, x.dtype, x.shape)
    _check_is("h", h, x.dtype, x.shape)
    _check_is("scores", scores, torch.float32, (x.shape[:-1].numel(), slots))
    if weight is not None:
        _check_weight(weight, hidden)
    if x.numel() == 0:
        if scores is not None and not adjoint:
            scores.zero_()
        return
    rows = _rows(x)
    others, saved = (rows if t is None else _rows(t) for t in (residual, h))
    meta = plan(hidden, max(1, slots))
    _launch(
        kernels.steer_kernel, (rows.shape[0],), x, rows, others, saved, out,
        normed if normed is not None else out,
        scores.contiguous() if scores is not None else params,
        weight.contiguous() if weight is not None else rows,
        bank.contiguous(), params.contiguous(), route.contiguous() if route is not None else rows,
        rows.stride(0), others.stride(0), saved.stride(0), out.stride(0), hidden, slots,
        programs if slots else 0,  # without slots every row is the plain add
        eps, weight_offset,
        HAS_RESIDUAL=residual is not None, HAS_ROUTE=route is not None,
        HAS_NORM=weight is not None, HAS_SCORES=scores is not None, ADJOINT=adjoint,
        WHOLE=meta["BLOCK"] >= hidden, SLOTS=triton.next_power_of_2(max(1, slots)), **meta,
    )  # fmt: skip


def _like(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a new tensor for a result like x, and its view as rows."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, out.view(-1, x.shape[-1]) if out.numel() else out


def _scores_of(x: Tensor, bank: Tensor) -> Tensor:
    shape = (x.shape[:-1].numel(), bank.shape[2])  # [tokens, slots]
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def add_steer(
    x: Tensor, residual: Tensor | None, bank: Tensor, params: Tensor, route: Tensor | None = None
) -> Tensor:
    """Serve `refusal_kernels.ops.add_steer`."""
    h, out = _like(x)
    _steer(x, residual, out, bank, params, route)
    return h


def add_steer_scores(
    x: Tensor, residual: Tensor | None, bank: Tensor, params: Tensor, route: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Serve `refusal_kernels.ops.add_steer_scores`."""
    (h, out), scores = _like(x), _scores_of(x, bank)
    _steer(x, residual, out, bank, params, route, scores=scores)
    return h, scores


def add_steer_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, bank: Tensor,
    params: Tensor, route: Tensor | None = None, weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Serve `refusal_kernels.ops.add_steer_rms_norm`."""
    (h, out), normed = _like(x), _like(x)[0]
    norm: dict[str, Any] = {"weight": weight, "eps": eps, "weight_offset": weight_offset}
    _steer(x, residual, out, bank, params, route, normed=normed, **norm)
    return normed, h


def add_steer_rms_norm_scores(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, bank: Tensor,
    params: Tensor, route: Tensor | None = None, weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Serve `refusal_kernels.ops.add_steer_rms_norm_scores`."""
    (h, out), normed, scores = _like(x), _like(x)[0], _scores_of(x, bank)
    norm: dict[str, Any] = {"weight": weight, "eps": eps, "weight_offset": weight_offset}
    _steer(x, residual, out, bank, params, route, scores=scores, normed=normed, **norm)
    return normed, h, scores


def add_steer_backward(
    grad: Tensor, scores: Tensor, bank: Tensor, params: Tensor, route: Tensor | None = None
) -> Tensor:
    """Serve the gradient of `refusal_kernels.ops.add_steer` for x (and for residual)."""
    grad_s, out = _like(grad)
    _steer(grad, None, out, bank, params, route, scores=scores, adjoint=True)
    return grad_s


def add_steer_rms_norm_backward(
    grad_normed: Tensor, grad_h: Tensor | None, h: Tensor, scores: Tensor, weight: Tensor,
    eps: float, bank: Tensor, params: Tensor, route: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor:  # fmt: skip
    """Serve the gradient of `refusal_kernels.ops.add_steer_rms_norm` for x."""
    grad_s, out = _like(grad_normed)
    norm: dict[str, Any] = {"weight": weight, "eps": eps, "weight_offset": weight_offset, "h": h}
    _steer(grad_normed, grad_h, out, bank, params, route, scores=scores, adjoint=True, **norm)
    return grad_s


def add_steer_(
    x: Tensor, residual: Tensor, bank: Tensor, params: Tensor, route: Tensor | None = None
) -> None:
    """Serve `refusal_kernels.ops.add_steer_`."""
    if any(s == 0 and n > 1 for s, n in zip(residual.stride(), residual.shape, strict=True)):
        raise RuntimeError("residual is expanded (several rows share memory)")
    rows = _rows(residual) if residual.numel() else residual
    _steer(x, residual, rows, bank, params, route)
    if not _has_rows(residual):  # they are copies
        residual.copy_(rows.view(residual.shape))


def scores(h: Tensor, bank: Tensor, route: Tensor | None = None) -> Tensor:
    """Serve `refusal_kernels.ops.scores`."""
    _check(h, bank, None, route)
    programs, _, slots, hidden = bank.shape
    out = _scores_of(h, bank)
    if out.numel() == 0 or hidden == 0:
        return out.zero_()
    rows = _rows(h)
    _launch(
        kernels.scores_kernel, (rows.shape[0],), h, rows, bank.contiguous(),
        route.contiguous() if route is not None else rows, out,
        rows.stride(0), hidden, slots, programs, HAS_ROUTE=route is not None,
        SLOTS=triton.next_power_of_2(slots), **plan(hidden, slots),
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """Serve `refusal_kernels.ops.rms_norm`."""
    hidden = x.shape[-1]
    _check_weight(weight, hidden)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return out
    rows = _rows(x)
    _launch(
        kernels.rms_norm_kernel, (rows.shape[0],), x, rows, weight.contiguous(), out,
        rows.stride(0), hidden, eps, weight_offset, **plan(hidden),
    )  # fmt: skip
    return out


def moments_(
    count: Tensor, mean: Tensor, m2: Tensor, activations: Tensor, index: Tensor, group: Tensor
) -> None:
    """Serve `refusal_kernels.ops.moments_`."""
    groups, positions, hidden = mean.shape
    batch, tokens = index.shape
    _check_is("count", count, torch.int64, (groups, positions))
    _check_is("mean", mean, torch.float64, mean.shape)
    _check_is("m2", m2, torch.float64, mean.shape)
    if not all(t.is_contiguous() for t in (count, mean, m2)):
        raise RuntimeError("count, mean and m2 are updated in place; expected contiguous ones")
    if index.numel() >= 2**31:
        raise RuntimeError(f"index names {index.numel()} rows; expected less than 2^31")
    if activations.shape != (batch, tokens, hidden) or group.shape != (batch,):
        raise RuntimeError(
            f"activations is {list(activations.shape)}, group {list(group.shape)}; "
            f"expected [{batch}, {tokens}, {hidden}] and [{batch}]"
        )
    if activations.numel() == 0 or mean.numel() == 0:
        return
    source = activations if activations.stride(2) == 1 else activations.contiguous()
    slots = groups * positions
    read = (index >= 0) & (index < positions) & (group >= 0).unsqueeze(-1)
    slot = torch.where(read, group.unsqueeze(-1) * positions + index, slots).flatten()
    by_slot, order = torch.sort(slot, stable=True)
    # where each slot's rows begin: no host synchronization, unlike bincount
    edges = torch.arange(slots + 1, device=slot.device, dtype=by_slot.dtype)
    offsets = torch.searchsorted(by_slot.contiguous(), edges)
    blocks, splits = plan_moments(batch * tokens, slots, hidden)
    partial = mean.new_empty((2, slots, splits, hidden))  # mean and m2 of every split
    _launch(
        kernels.moments_kernel, (slots, blocks, splits), activations, source, order, offsets,
        partial, source.stride(0), source.stride(1), tokens, hidden, slots, splits, **MOMENTS,
    )  # fmt: skip
    _launch(
        kernels.merge_moments_kernel, (slots, blocks), activations, partial, offsets,
        count, mean, m2, hidden, slots, splits, BLOCK=MOMENTS["BLOCK"], ROWS=MOMENTS["ROWS"],
    )  # fmt: skip
    count.add_(offsets.diff().view_as(count))


KERNELS: dict[str, Callable[..., Any]] = {
    op.__name__: op
    for op in (
        add_steer, add_steer_, add_steer_scores, add_steer_backward, add_steer_rms_norm,
        add_steer_rms_norm_scores, add_steer_rms_norm_backward, scores, rms_norm, moments_,
    )
}  # fmt: skip
_MUTATES = {"add_steer_": {"residual"}, "moments_": {"count", "mean", "m2"}}
OPS: dict[str, Callable[..., Any]] = {
    name: torch.library.triton_op(
        f"refusal_kernels_triton::{name}", kernel, mutates_args=_MUTATES.get(name, {})
    )
    for name, kernel in KERNELS.items()
}  # the registered ops, with gradients
autograd.register("refusal_kernels_triton", tuple(KERNELS))
OPS.update({op: OPS[public] for op, public in autograd.INFERENCE.items()})

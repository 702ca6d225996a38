"""The ops in Triton: for GPUs without a CUDA build, and on a CPU in Triton's interpreter.

Each op is a ``triton_op``, so a compiler sees the kernel inside it.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from refusal_kernels.ops import autograd

Table = dict[str, Callable[..., Any]]
OPS: Table = {}  # the registered ops, with gradients
KERNELS: Table = {}  # the functions below them

try:
    import triton

    from refusal_kernels.ops import triton_kernels as kernels
except ImportError:
    triton = None


def why_not(device: str, dtype: torch.dtype) -> str | None:
    """Return the reason why Triton can not serve such a call, or None."""
    if triton is None:
        return "triton is not installed"
    if device == "cpu" and not kernels.INTERPRETED:
        return "runs on a GPU; on a CPU only in Triton's interpreter (TRITON_INTERPRET=1)"
    if device not in ("cpu", "cuda"):
        return f"takes CUDA tensors, not {device}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None


if triton is not None:

    def plan(hidden: int, slots: int = 1) -> dict[str, int]:
        """Channels per step (a whole row where it fits) and warps: 16 to 32 floats a thread.

        Chosen by registers, not by a clock: with these no variant spills on sm_80, sm_90a or sm_100
        (``tools/compile_triton.py``).
        """
        slots = triton.next_power_of_2(slots)
        block = max(16, min(triton.next_power_of_2(hidden), 8192 // slots))
        return {"BLOCK": block, "num_warps": 8 if block * slots >= 2048 else 4}

    def _rows(t: Tensor) -> Tensor:
        """[tokens, hidden] with contiguous channels; a view where the strides allow one."""
        rows = t.reshape(-1, t.shape[-1])
        return rows if rows.stride(-1) == 1 else rows.contiguous()

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
        expected = (bank.shape[0], bank.shape[2], 5)
        if params is not None and (params.dtype != torch.float32 or params.shape != expected):
            raise RuntimeError(
                f"params is {params.dtype} {list(params.shape)}; expected float32 {list(expected)}"
            )
        tokens = x.shape[:-1].numel()
        if route is not None and (route.dtype != torch.int32 or route.shape != (tokens,)):
            raise RuntimeError(
                f"route is {route.dtype} {list(route.shape)}; expected int32 [{tokens}]"
            )

    def _steer(
        x: Tensor,
        residual: Tensor | None,
        out: Tensor,
        bank: Tensor,
        params: Tensor,
        route: Tensor | None,
        normed: Tensor | None = None,
        weight: Tensor | None = None,
        eps: float = 0.0,
        weight_offset: float = 0.0,
    ) -> None:
        _check(x, bank, params, route)
        if weight is not None and weight.shape != (x.shape[-1],):
            raise RuntimeError(f"weight has shape {list(weight.shape)}; expected [{x.shape[-1]}]")
        if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
            raise RuntimeError(
                f"residual must have the shape and dtype of x; got {list(residual.shape)} "
                f"for an x of {list(x.shape)}"
            )
        if x.numel() == 0:
            return
        rows, others = _rows(x), _rows(x if residual is None else residual)
        programs, _, slots, hidden = bank.shape
        meta = plan(hidden, max(1, slots))
        _launch(
            kernels.steer_kernel,
            (rows.shape[0],),
            x,
            rows,
            others,
            out,
            normed if normed is not None else out,
            weight.contiguous() if weight is not None else rows,
            bank.contiguous(),
            params.contiguous(),
            route if route is not None else rows,
            rows.stride(0),
            others.stride(0),
            out.stride(0),
            hidden,
            slots,
            programs if slots else 0,  # without slots every row is the plain add
            eps,
            weight_offset,
            HAS_RESIDUAL=residual is not None,
            HAS_ROUTE=route is not None,
            HAS_NORM=normed is not None,
            WHOLE=meta["BLOCK"] >= hidden,
            SLOTS=triton.next_power_of_2(max(1, slots)),
            **meta,
        )

    def add_steer(
        x: Tensor,
        residual: Tensor | None,
        bank: Tensor,
        params: Tensor,
        route: Tensor | None = None,
    ) -> Tensor:
        """Serve `refusal_kernels.ops.add_steer`."""
        h = torch.empty_like(x, memory_format=torch.contiguous_format)
        _steer(x, residual, h.view(-1, x.shape[-1]) if h.numel() else h, bank, params, route)
        return h

    def add_steer_rms_norm(
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        bank: Tensor,
        params: Tensor,
        route: Tensor | None = None,
        weight_offset: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Serve `refusal_kernels.ops.add_steer_rms_norm`."""
        h = torch.empty_like(x, memory_format=torch.contiguous_format)
        normed = torch.empty_like(h)
        out = h.view(-1, x.shape[-1]) if h.numel() else h
        _steer(x, residual, out, bank, params, route, normed, weight, eps, weight_offset)
        return normed, h

    def add_steer_(
        x: Tensor, residual: Tensor, bank: Tensor, params: Tensor, route: Tensor | None = None
    ) -> None:
        """Serve `refusal_kernels.ops.add_steer_`."""
        if any(s == 0 and n > 1 for s, n in zip(residual.stride(), residual.shape, strict=True)):
            raise RuntimeError("residual is expanded (several rows share memory)")
        rows = _rows(residual) if residual.numel() else residual
        _steer(x, residual, rows, bank, params, route)
        if rows.data_ptr() != residual.data_ptr():  # the strides allowed no view
            residual.copy_(rows.view(residual.shape))

    def scores(h: Tensor, bank: Tensor, route: Tensor | None = None) -> Tensor:
        """Serve `refusal_kernels.ops.scores`."""
        _check(h, bank, None, route)
        programs, _, slots, hidden = bank.shape
        out = torch.empty(
            (h.shape[:-1].numel(), slots), dtype=torch.float32, device=h.device
        )  # [tokens, slots]
        if out.numel() == 0 or hidden == 0:
            return out.zero_()
        rows = _rows(h)
        _launch(
            kernels.scores_kernel,
            (rows.shape[0],),
            h,
            rows,
            bank.contiguous(),
            route if route is not None else rows,
            out,
            rows.stride(0),
            hidden,
            slots,
            programs,
            HAS_ROUTE=route is not None,
            SLOTS=triton.next_power_of_2(slots),
            **plan(hidden, slots),
        )
        return out

    def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
        """Serve `refusal_kernels.ops.rms_norm`."""
        hidden = x.shape[-1]
        if weight.shape != (hidden,):
            raise RuntimeError(f"weight has shape {list(weight.shape)}; expected [{hidden}]")
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        if x.numel() == 0:
            return out
        rows = _rows(x)
        _launch(
            kernels.rms_norm_kernel,
            (rows.shape[0],),
            x,
            rows,
            weight.contiguous(),
            out,
            rows.stride(0),
            hidden,
            eps,
            weight_offset,
            **plan(hidden),
        )
        return out

    def moments_(
        count: Tensor, mean: Tensor, m2: Tensor, activations: Tensor, index: Tensor, group: Tensor
    ) -> None:
        """Serve `refusal_kernels.ops.moments_`."""
        groups, positions, hidden = mean.shape
        batch, tokens = index.shape
        if activations.shape != (batch, tokens, hidden) or group.shape != (batch,):
            raise RuntimeError(
                f"activations is {list(activations.shape)}, group {list(group.shape)}; "
                f"expected [{batch}, {tokens}, {hidden}] and [{batch}]"
            )
        if activations.numel() == 0:
            return
        source = activations if activations.stride(2) == 1 else activations.contiguous()
        slots = groups * positions
        read = (index >= 0) & (group >= 0).unsqueeze(-1)
        slot = torch.where(read, group.unsqueeze(-1) * positions + index, slots).flatten()
        by_slot, order = torch.sort(slot, stable=True)
        # where each slot's rows begin: no host synchronisation, unlike bincount
        edges = torch.arange(slots + 1, device=slot.device, dtype=by_slot.dtype)
        offsets = torch.searchsorted(by_slot.contiguous(), edges)
        block = min(triton.next_power_of_2(hidden), 128)
        _launch(
            kernels.moments_kernel,
            (slots, triton.cdiv(hidden, block)),
            activations,
            source,
            order,
            offsets,
            count,
            mean,
            m2,
            source.stride(0),
            source.stride(1),
            tokens,
            hidden,
            BLOCK=block,
            SPLIT=32,
        )
        count.add_(offsets.diff().view_as(count))

    KERNELS.update(
        add_steer=add_steer, add_steer_=add_steer_, add_steer_rms_norm=add_steer_rms_norm,
        scores=scores, rms_norm=rms_norm, moments_=moments_,
    )  # fmt: skip
    _MUTATES = {"add_steer_": {"residual"}, "moments_": {"count", "mean", "m2"}}
    for _name, _kernel in KERNELS.items():
        OPS[_name] = torch.library.triton_op(
            f"refusal_kernels_triton::{_name}", _kernel, mutates_args=_MUTATES.get(_name, {})
        )
    autograd.register("refusal_kernels_triton", tuple(KERNELS))
    OPS.update({op: OPS[public] for op, public in autograd.INFERENCE.items()})

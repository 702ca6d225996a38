"""The ops in Triton: for GPUs without a CUDA build, and on a CPU in Triton's interpreter.

One program instance per row; a row is read in blocks, once for the dot products and, from L1 or L2,
once more for the write. Each op is a ``triton_op``, so a compiler sees the kernel inside it.
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
    import triton.language as tl

    INTERPRETED = bool(triton.knobs.runtime.interpret)
    # the interpreter cuts float32 to bfloat16 where a GPU rounds to nearest even
    TRUNCATES: tl.constexpr = tl.constexpr(INTERPRETED)
except ImportError:
    triton = None


def why_not(device: str, dtype: torch.dtype) -> str | None:
    """Return the reason why Triton can not serve such a call, or None."""
    if triton is None:
        return "triton is not installed"
    if device == "cpu" and not INTERPRETED:
        return "runs on a GPU; on a CPU only in Triton's interpreter (TRITON_INTERPRET=1)"
    if device not in ("cpu", "cuda"):
        return f"takes CUDA tensors, not {device}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None


if triton is not None:

    @triton.jit
    def _load_sum(
        x_row, residual_row, columns, mask, HAS_RESIDUAL: tl.constexpr
    ):  # -> float32 [BLOCK]
        s = tl.load(x_row + columns, mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            s += tl.load(residual_row + columns, mask=mask, other=0.0).to(tl.float32)
        return s

    @triton.jit
    def _store(pointer, value, mask):
        if TRUNCATES and pointer.dtype.element_ty == tl.bfloat16:
            bits = value.to(tl.int32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            value = tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)

    @triton.jit
    def _vectors(pointer, slot_mask, columns, mask):  # -> float32 [SLOTS, BLOCK]
        return tl.load(
            pointer + columns[None, :], mask=slot_mask[:, None] & mask[None, :], other=0.0
        )

    @triton.jit
    def steer_kernel(
        x,
        residual,
        out,
        normed,
        weight,
        bank,
        params,
        route,
        x_stride,
        residual_stride,
        out_stride,
        hidden,
        slots,
        programs,
        eps,
        weight_offset,
        HAS_RESIDUAL: tl.constexpr,
        HAS_ROUTE: tl.constexpr,
        HAS_NORM: tl.constexpr,
        WHOLE: tl.constexpr,
        SLOTS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One row of add_steer or add_steer_rms_norm.

        SLOTS is slots rounded up to a power of two. With WHOLE the row is one block and stays in
        registers; otherwise each pass reads it again, from L1 or L2.
        """
        row = tl.program_id(0).to(tl.int64)  # rows * hidden may exceed 2^31
        x_row = x + row * x_stride
        residual_row = residual + row * residual_stride
        out_row = out + row * out_stride
        program = tl.full((), 0, tl.int64)
        if HAS_ROUTE:
            program = tl.load(route + row).to(tl.int64)
        steered = (program >= 0) & (program < programs)
        program = tl.where(steered, program, 0)

        slot = tl.arange(0, SLOTS)
        slot_mask = slot < slots
        read = bank + program * 2 * slots * hidden + slot[:, None].to(tl.int64) * hidden
        write = read + slots.to(tl.int64) * hidden

        columns = tl.arange(0, BLOCK)
        mask = columns < hidden
        s = _load_sum(x_row, residual_row, columns, mask, HAS_RESIDUAL)
        t = tl.sum(_vectors(read, slot_mask, columns, mask) * s[None, :], axis=1)
        if not WHOLE:
            for start in range(BLOCK, hidden, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                mask = columns < hidden
                s = _load_sum(x_row, residual_row, columns, mask, HAS_RESIDUAL)
                t += tl.sum(_vectors(read, slot_mask, columns, mask) * s[None, :], axis=1)

        p = params + (program * slots + slot) * 5
        a = tl.load(p, mask=slot_mask, other=0.0)
        c = tl.load(p + 1, mask=slot_mask, other=0.0)
        b = tl.load(p + 2, mask=slot_mask, other=0.0)
        low = tl.load(p + 3, mask=slot_mask, other=0.0)
        high = tl.load(p + 4, mask=slot_mask, other=0.0)
        clamped = tl.where(t < low, low, t)  # comparisons, not minimum: a NaN stays a NaN
        clamped = tl.where(clamped > high, high, clamped)
        phi = a * t + c * clamped + b

        squares = tl.zeros([BLOCK], tl.float32)
        if WHOLE:
            u = _vectors(write, slot_mask, columns, mask)
            h = tl.where(steered, s + tl.sum(u * phi[:, None], axis=0), s)
            _store(out_row + columns, h, mask)
            if HAS_NORM:
                scale = 1.0 / tl.sqrt_rn(tl.sum(h * h) / hidden + eps)
                gain = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
                _store(normed + row * hidden + columns, h * scale * (gain + weight_offset), mask)
        else:
            for start in range(0, hidden, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                mask = columns < hidden
                s = _load_sum(x_row, residual_row, columns, mask, HAS_RESIDUAL)
                u = _vectors(write, slot_mask, columns, mask)
                h = tl.where(steered, s + tl.sum(u * phi[:, None], axis=0), s)
                if HAS_NORM:
                    squares += h * h
                else:  # with the norm h is written in the last pass: out may be residual
                    _store(out_row + columns, h, mask)
            if HAS_NORM:
                scale = 1.0 / tl.sqrt_rn(tl.sum(squares) / hidden + eps)
                for start in range(0, hidden, BLOCK):
                    columns = start + tl.arange(0, BLOCK)
                    mask = columns < hidden
                    s = _load_sum(x_row, residual_row, columns, mask, HAS_RESIDUAL)
                    u = _vectors(write, slot_mask, columns, mask)
                    h = tl.where(steered, s + tl.sum(u * phi[:, None], axis=0), s)
                    _store(out_row + columns, h, mask)
                    gain = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
                    _store(
                        normed + row * hidden + columns, h * scale * (gain + weight_offset), mask
                    )

    @triton.jit
    def scores_kernel(
        h,
        bank,
        route,
        out,
        h_stride,
        hidden,
        slots,
        programs,
        HAS_ROUTE: tl.constexpr,
        SLOTS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One row of scores."""
        row = tl.program_id(0).to(tl.int64)
        program = tl.full((), 0, tl.int64)
        if HAS_ROUTE:
            program = tl.load(route + row).to(tl.int64)
        steered = (program >= 0) & (program < programs)
        program = tl.where(steered, program, 0)
        slot = tl.arange(0, SLOTS)
        slot_mask = slot < slots
        read = bank + program * 2 * slots * hidden + slot[:, None].to(tl.int64) * hidden
        t = tl.zeros([SLOTS], tl.float32)
        for start in range(0, hidden, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = columns < hidden
            s = tl.load(h + row * h_stride + columns, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(read + columns[None, :], mask=slot_mask[:, None] & mask[None, :], other=0.0)
            t += tl.sum(v * s[None, :], axis=1)
        tl.store(out + row * slots + slot, tl.where(steered, t, 0.0), mask=slot_mask)

    @triton.jit
    def rms_norm_kernel(x, weight, out, x_stride, hidden, eps, weight_offset, BLOCK: tl.constexpr):
        """One row of rms_norm."""
        row = tl.program_id(0).to(tl.int64)
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, hidden, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            v = tl.load(x + row * x_stride + columns, mask=columns < hidden, other=0.0)
            squares += v.to(tl.float32) * v.to(tl.float32)
        scale = 1.0 / tl.sqrt_rn(tl.sum(squares) / hidden + eps)
        for start in range(0, hidden, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = columns < hidden
            v = tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
            gain = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32) + weight_offset
            _store(out + row * hidden + columns, v * scale * gain, mask)

    @triton.jit
    def moments_kernel(
        activations,
        order,
        offsets,
        count,
        mean,
        m2,
        batch_stride,
        token_stride,
        tokens,
        hidden,
        BLOCK: tl.constexpr,
        SPLIT: tl.constexpr,
    ):
        """One slot and one block of channels: float32 inside a split of rows, float64 outside.

        ``order`` lists the rows by slot and ``offsets`` says where each slot's begin, so the order
        of summation is fixed. Values are shifted by the slot's first row against cancellation.
        """
        slot = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = columns < hidden
        begin = tl.load(offsets + slot)
        end = tl.load(offsets + slot + 1)
        if begin < end:
            row = tl.load(order + begin)
            source = activations + (row // tokens) * batch_stride + (row % tokens) * token_stride
            shift = tl.load(source + columns, mask=mask, other=0.0).to(tl.float32)
            first = tl.zeros([BLOCK], tl.float64)
            second = tl.zeros([BLOCK], tl.float64)
            for split in range(begin, end, SPLIT):
                part_first = tl.zeros([BLOCK], tl.float32)
                part_second = tl.zeros([BLOCK], tl.float32)
                for k in range(split, min(split + SPLIT, end)):
                    row = tl.load(order + k)
                    source = (
                        activations + (row // tokens) * batch_stride + (row % tokens) * token_stride
                    )
                    v = tl.load(source + columns, mask=mask, other=0.0).to(tl.float32)
                    d = v - shift
                    part_first += d
                    part_second += d * d
                first += part_first.to(tl.float64)
                second += part_second.to(tl.float64)

            n = (end - begin).to(tl.float64)
            before = tl.load(count + slot).to(tl.float64)
            after = before + n
            state = slot * hidden + columns
            old = tl.load(mean + state, mask=mask, other=0.0)
            delta = shift.to(tl.float64) + first / n - old
            grown = second - first * first / n + delta * delta * (before * n / after)
            tl.store(mean + state, old + delta * (n / after), mask=mask)
            tl.store(m2 + state, tl.load(m2 + state, mask=mask, other=0.0) + grown, mask=mask)

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
            if INTERPRETED:
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
            steer_kernel,
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
            scores_kernel,
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
            rms_norm_kernel,
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
            moments_kernel,
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

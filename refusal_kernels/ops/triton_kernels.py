"""Triton's kernels: one program instance per row, or per slot and block of channels.

A row is read in blocks. Where it fits one block it stays in registers; otherwise each pass reads it
again, from L1 or L2. The launchers stand in `refusal_kernels.ops.triton`.
"""

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
# the interpreter cuts float32 to bfloat16 where a GPU rounds to nearest even
TRUNCATES: tl.constexpr = tl.constexpr(INTERPRETED)


@triton.jit
def _load_sum(x_row, residual_row, columns, mask, HAS_RESIDUAL: tl.constexpr):  # -> float32 [BLOCK]
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
    return tl.load(pointer + columns[None, :], mask=slot_mask[:, None] & mask[None, :], other=0.0)


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
                _store(normed + row * hidden + columns, h * scale * (gain + weight_offset), mask)


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
        t += tl.sum(_vectors(read, slot_mask, columns, mask) * s[None, :], axis=1)
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

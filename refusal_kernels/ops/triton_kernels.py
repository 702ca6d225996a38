"""Triton's kernels: one program instance per row; for moments one per slot, channels and rows.

A row is read in blocks. Where it fits one block it stays in registers; otherwise each pass reads it
again, from L1 or L2. The launchers stand in `refusal_kernels.ops.triton_ops`.
"""

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
# the interpreter cuts float32 to bfloat16 where a GPU rounds to nearest even
TRUNCATES: tl.constexpr = tl.constexpr(INTERPRETED)


@triton.jit
def _load(row, columns, mask):  # -> float32 [BLOCK]
    return tl.load(row + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _program(route, row, programs, HAS_ROUTE: tl.constexpr):  # -> whether it steers, which one
    program = tl.full((), 0, tl.int64)
    if HAS_ROUTE:
        program = tl.load(route + row).to(tl.int64)
    steered = (program >= 0) & (program < programs)
    return steered, tl.where(steered, program, 0)


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
def _load_sum(
    x_row, residual_row, h_row, weight, weight_offset, scale, pull, columns, mask,
    HAS_RESIDUAL: tl.constexpr, THROUGH_NORM: tl.constexpr, REAL: tl.constexpr,
):  # -> REAL [BLOCK]  # fmt: skip
    """What the edit acts on: s, or in the adjoint the gradient of h."""
    s = _load(x_row, columns, mask).to(REAL)
    if THROUGH_NORM:
        gained = s * (_load(weight, columns, mask) + weight_offset)
        s = scale * (gained - _load(h_row, columns, mask) * pull)
    if HAS_RESIDUAL:
        s += _load(residual_row, columns, mask)
    return s


@triton.jit
def _edited(s, write, push, steered, slot_mask, columns, mask):  # -> [BLOCK], of the type of s
    u = _vectors(write, slot_mask, columns, mask).to(s.dtype)
    return tl.where(steered, s + tl.sum(u * push[:, None], axis=0), s)


@triton.jit
def steer_kernel(
    x, residual, h, out, normed, scores, weight, bank, numbers, route,
    x_stride, residual_stride, h_stride, out_stride, hidden, slots, programs, eps, weight_offset,
    HAS_RESIDUAL: tl.constexpr, HAS_ROUTE: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_SCORES: tl.constexpr, ADJOINT: tl.constexpr, WHOLE: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of the edit, with or without the norm behind it, or of the adjoint of either.

    The edit adds multiples of the write vectors by what the read vectors see. Its adjoint is the
    same with the two exchanged; how far a slot answers follows there from the score that the edit
    saved. The adjoint of the norm comes before that of the edit: x and residual are then the
    gradients of normed and h, and h is read.

    SLOTS is slots rounded up to a power of two. With WHOLE the row is one block: every loop runs
    once, and the compiler unrolls it and merges the equal loads, so the row stays in registers.
    For that nothing is stored before the last pass.
    """
    row = tl.program_id(0).to(tl.int64)  # rows * hidden may exceed 2^31
    x_row = x + row * x_stride
    residual_row = residual + row * residual_stride
    h_row = h + row * h_stride
    out_row = out + row * out_stride
    normed_row = normed + row * hidden
    steered, program = _program(route, row, programs, HAS_ROUTE)
    THROUGH_NORM: tl.constexpr = HAS_NORM and ADJOINT
    end = BLOCK if WHOLE else hidden

    slot = tl.arange(0, SLOTS)
    slot_mask = slot < slots
    read = bank + (program * 2 * slots + slot[:, None]) * hidden  # program is int64
    write = bank + ((program * 2 + 1) * slots + slot[:, None]) * hidden
    if ADJOINT:
        read, write = write, read

    # Where nearly all of a float32 row lies along v, the rounding of s or of v.s to float32
    # would be most of what is left of it.
    REAL: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float32 else tl.float32
    scale = 0.0
    pull = 0.0
    if THROUGH_NORM:
        squares = tl.zeros([BLOCK], tl.float32)
        products = tl.zeros([BLOCK], tl.float32)
        for start in range(0, end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = columns < hidden
            gained = _load(x_row, columns, mask) * (_load(weight, columns, mask) + weight_offset)
            saved = _load(h_row, columns, mask)
            squares += saved * saved
            products += gained * saved
        scale = 1.0 / tl.sqrt_rn(tl.sum(squares) / hidden + eps)
        pull = scale * scale * (tl.sum(products) / hidden)

    t = tl.zeros([SLOTS], REAL)
    for start in range(0, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < hidden
        s = _load_sum(
            x_row, residual_row, h_row, weight, weight_offset, scale, pull, columns, mask,
            HAS_RESIDUAL, THROUGH_NORM, REAL,
        )  # fmt: skip
        v = _vectors(read, slot_mask, columns, mask).to(REAL)
        t += tl.sum(v * s[None, :], axis=1)

    p = numbers + (program * slots + slot) * 5
    a = tl.load(p, mask=slot_mask, other=0.0)
    c = tl.load(p + 1, mask=slot_mask, other=0.0)
    low = tl.load(p + 3, mask=slot_mask, other=0.0)
    high = tl.load(p + 4, mask=slot_mask, other=0.0)
    score = scores + row * slots + slot
    if ADJOINT:
        seen = tl.load(score, mask=slot_mask, other=0.0)
        push = tl.where((seen < low) | (seen > high), a, a + c) * t
    else:
        b = tl.load(p + 2, mask=slot_mask, other=0.0)
        clamped = tl.where(t < low, low, t)  # comparisons, not minimum: a NaN stays a NaN
        clamped = tl.where(clamped > high, high, clamped)
        push = a * t + c * clamped + b

    if HAS_NORM and not ADJOINT:
        squares = tl.zeros([BLOCK], REAL)
        for start in range(0, end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = columns < hidden
            s = _load_sum(
                x_row, residual_row, h_row, weight, weight_offset, scale, pull, columns, mask,
                HAS_RESIDUAL, THROUGH_NORM, REAL,
            )  # fmt: skip
            edited = _edited(s, write, push, steered, slot_mask, columns, mask)
            squares += edited * edited
        scale = 1.0 / tl.sqrt_rn((tl.sum(squares) / hidden + eps).to(tl.float32))

    for start in range(0, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < hidden
        s = _load_sum(
            x_row, residual_row, h_row, weight, weight_offset, scale, pull, columns, mask,
            HAS_RESIDUAL, THROUGH_NORM, REAL,
        )  # fmt: skip
        edited = _edited(s, write, push, steered, slot_mask, columns, mask)
        if HAS_NORM and not ADJOINT:
            gain = _load(weight, columns, mask) + weight_offset
            _store(normed_row + columns, edited * scale * gain, mask)
        _store(out_row + columns, edited, mask)
    if HAS_SCORES and not ADJOINT:
        tl.store(score, tl.where(steered, t.to(tl.float32), 0.0), mask=slot_mask)


@triton.jit
def scores_kernel(
    h, bank, route, out, h_stride, hidden, slots, programs, HAS_ROUTE: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of scores."""
    row = tl.program_id(0).to(tl.int64)
    steered, program = _program(route, row, programs, HAS_ROUTE)
    slot = tl.arange(0, SLOTS)
    slot_mask = slot < slots
    read = bank + (program * 2 * slots + slot[:, None]) * hidden
    t = tl.zeros([SLOTS], tl.float32)
    for start in range(0, hidden, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < hidden
        s = _load(h + row * h_stride, columns, mask)
        t += tl.sum(_vectors(read, slot_mask, columns, mask) * s[None, :], axis=1)
    tl.store(out + row * slots + slot, tl.where(steered, t, 0.0), mask=slot_mask)


@triton.jit
def rms_norm_kernel(x, weight, out, x_stride, hidden, eps, weight_offset, BLOCK: tl.constexpr):
    """One row of rms_norm."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, hidden, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        v = _load(x + row * x_stride, columns, columns < hidden)
        squares += v * v
    scale = 1.0 / tl.sqrt_rn(tl.sum(squares) / hidden + eps)
    for start in range(0, hidden, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < hidden
        v = _load(x + row * x_stride, columns, mask)
        gain = _load(weight, columns, mask) + weight_offset
        _store(out + row * hidden + columns, v * scale * gain, mask)


@triton.jit
def _rows_of(offsets, slot, splits, ROWS: tl.constexpr):  # -> first, past the last, rows a split
    begin = tl.load(offsets + slot)
    end = tl.load(offsets + slot + 1)
    return begin, end, tl.cdiv(tl.cdiv(end - begin, splits), ROWS) * ROWS


@triton.jit
def _source(row, tokens, batch_stride, token_stride):  # -> int64, in elements
    row = row.to(tl.int32)  # a division in 64 bits would branch, and keep loads from overlapping
    return (row // tokens).to(tl.int64) * batch_stride + (row % tokens).to(tl.int64) * token_stride


@triton.jit
def _sum_rows(tile, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # [ROWS, BLOCK] -> [BLOCK]
    """Add halves to halves, ROWS = 8: the order of tl.sum would depend on the alignment."""
    tl.static_assert(ROWS == 8)
    upper, lower = tl.split(tl.permute(tl.reshape(tile, [2, 4, BLOCK]), (1, 2, 0)))
    upper, lower = tl.split(tl.permute(tl.reshape(upper + lower, [2, 2, BLOCK]), (1, 2, 0)))
    upper, lower = tl.split(tl.permute(upper + lower, (1, 0)))
    return upper + lower


@triton.jit
def moments_kernel(
    activations, order, offsets, partial, batch_stride, token_stride, tokens, hidden, slots, splits,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations over one split of a slot's rows, in a block of channels.

    ``order`` lists the rows by slot and ``offsets`` says where each slot's begin. A step takes
    ROWS rows; STEPS of them are loaded at once and added in float32, the rest is float64. Values
    are shifted by the split's first row against cancellation.
    """
    slot = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < hidden
    split = tl.program_id(2).to(tl.int64)
    begin, end, share = _rows_of(offsets, slot, splits, ROWS)
    begin += split * share
    end = tl.minimum(begin + share, end)
    if begin < end:
        first_row = _source(tl.load(order + begin), tokens, batch_stride, token_stride)
        shift = _load(activations + first_row, columns, mask)
        total = tl.zeros([ROWS, BLOCK], tl.float64)
        squares = tl.zeros([ROWS, BLOCK], tl.float64)
        for start in range(begin, end, ROWS * STEPS):
            part_total = tl.zeros([ROWS, BLOCK], tl.float32)
            part_squares = tl.zeros([ROWS, BLOCK], tl.float32)
            for step in tl.static_range(STEPS):
                place = start + step * ROWS + tl.arange(0, ROWS)
                row = tl.load(order + place, mask=place < end, other=0)
                source = activations + _source(row, tokens, batch_stride, token_stride)
                named = (place < end)[:, None] & mask[None, :]  # other rows may hold NaN
                v = _load(source[:, None], columns[None, :], named)
                d = tl.where(named, v - shift[None, :], 0.0)
                part_total += d
                part_squares += d * d
            total += part_total.to(tl.float64)
            squares += part_squares.to(tl.float64)

        n = (end - begin).to(tl.float64)
        first = _sum_rows(total, ROWS, BLOCK)
        second = _sum_rows(squares, ROWS, BLOCK)
        out = partial + (slot * splits + split) * hidden + columns
        tl.store(out, shift.to(tl.float64) + first / n, mask=mask)
        out = partial + ((slot + slots) * splits + split) * hidden + columns
        tl.store(out, second - first * first / n, mask=mask)


@triton.jit
def merge_moments_kernel(
    partial, offsets, count, mean, m2, hidden, slots, splits, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Fold the splits of one slot into its mean and m2, one after another (Chan)."""
    slot = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < hidden
    begin, end, share = _rows_of(offsets, slot, splits, ROWS)
    if begin < end:  # a slot without rows stays as it is, bit for bit
        state = slot * hidden + columns
        center = tl.load(mean + state, mask=mask, other=0.0)
        squares = tl.load(m2 + state, mask=mask, other=0.0)
        before = tl.load(count + slot).to(tl.float64)
        from_mean = partial + slot * splits * hidden + columns
        from_squares = partial + (slot + slots) * splits * hidden + columns
        for start in tl.range(begin, end, share, loop_unroll_factor=4):
            n = tl.minimum(share, end - start).to(tl.float64)
            after = before + n
            delta = tl.load(from_mean, mask=mask, other=0.0) - center
            squares += tl.load(from_squares, mask=mask, other=0.0)
            squares += delta * delta * (before * n / after)
            center += delta * (n / after)
            before = after
            from_mean += hidden
            from_squares += hidden
        tl.store(mean + state, center, mask=mask)
        tl.store(m2 + state, squares, mask=mask)

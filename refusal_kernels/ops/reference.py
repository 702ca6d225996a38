"""The ops in plain PyTorch: what they mean, and the fall-back wherever no kernel serves.

A steering program is a list of slots, each with a read vector ``v``, a write vector ``u`` and five
numbers. With ``s = x + residual``, in float32 (float64 where x is float64)::

    h = s + sum_j phi_j(v_j . s) * u_j        phi(t) = a*t + c*clamp(t, low, high) + b

Every dot product of a program reads the same ``s``. The result is rounded to the dtype of x once.
"""

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rows(x: Tensor) -> Tensor:
    """[tokens, hidden] in the computing dtype, contiguous: the strides must not change a sum."""
    return _wide(x).reshape(-1, x.shape[-1]).contiguous()


def _sum(x: Tensor, residual: Tensor | None) -> Tensor:
    """S = x + residual as [tokens, hidden].

    They are added before the reshape. After it Inductor would take the residual for the bias of the
    matrix product that made x, and copy it first.
    """
    return _rows(x) if residual is None else _rows(_wide(x) + _wide(residual))


def _programs(
    bank: Tensor, params: Tensor, route: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Read and write vectors [tokens or 1, slots, hidden], params [tokens or 1, slots, 5]."""
    bank, params = bank.to(dtype), params.to(dtype)
    if route is None:
        return bank[:1, 0], bank[:1, 1], params[:1]
    program = route.clamp(min=0).long()
    return bank[program, 0], bank[program, 1], params[program]


def _dot(rows: Tensor, vectors: Tensor) -> Tensor:
    """[tokens, hidden] . [tokens or 1, slots, hidden] -> [tokens, slots].

    A product and a sum, not a matrix product: its result for a row does not depend on the others.
    """
    return (rows.unsqueeze(1) * vectors).sum(-1)


def _program_of(rows: Tensor, route: Tensor | None) -> Tensor:
    if route is None:
        return torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    return route.clamp(min=0).long()


def _plain(route: Tensor | None) -> Tensor | None:
    return None if route is None else (route < 0).unsqueeze(-1)


def add_steer(
    x: Tensor, residual: Tensor | None, bank: Tensor, params: Tensor, route: Tensor | None = None
) -> Tensor:
    """``h = s + sum_j phi_j(v_j . s) u_j`` with ``s = x + residual`` (``s = x`` without one)."""
    return add_steer_scores(x, residual, bank, params, route)[0]


def add_steer_scores(
    x: Tensor, residual: Tensor | None, bank: Tensor, params: Tensor, route: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(h, t): `add_steer`, and what it read, ``t_j = v_j . s``; 0 where the route is -1."""
    rows, t = _steered_rows(x, residual, bank, params, route)
    return rows.to(x.dtype).reshape(x.shape), t


def _steered_rows(
    x: Tensor, residual: Tensor | None, bank: Tensor, params: Tensor, route: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return h before it is rounded, [tokens, hidden], and the scores, [tokens, slots]."""
    rows = _sum(x, residual)
    read, write, p = _programs(bank, params, route, rows.dtype)
    a, c, b, low, high = p.unbind(-1)  # [tokens or 1, slots]
    t = _dot(rows, read)
    phi = a * t + c * torch.minimum(torch.maximum(t, low), high) + b
    h = rows + (phi.unsqueeze(-1) * write).sum(1)
    if (plain := _plain(route)) is not None:
        h, t = torch.where(plain, rows, h), t.masked_fill(plain, 0.0)
    return h, t


def add_steer_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, bank: Tensor, params: Tensor,
    route: Tensor | None = None, weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(`rms_norm` of h, h), where h is that of `add_steer`; the norm reads h before rounding."""
    args = (x, residual, weight, eps, bank, params, route, weight_offset)
    normed, h, _ = add_steer_rms_norm_scores(*args)
    return normed, h


def add_steer_rms_norm_scores(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, bank: Tensor, params: Tensor,
    route: Tensor | None = None, weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(normed, h, t): `add_steer_rms_norm` and the scores of `add_steer_scores`."""
    rows, t = _steered_rows(x, residual, bank, params, route)
    # before the norm: of a view of what it gives Inductor makes strides that ATen copies
    h = rows.reshape(x.shape)
    return _normed(h, weight, eps, weight_offset).to(x.dtype), h.to(x.dtype), t


def add_steer_(
    x: Tensor, residual: Tensor, bank: Tensor, params: Tensor, route: Tensor | None = None
) -> None:
    """`add_steer`, written into ``residual``."""
    residual.copy_(add_steer(x, residual, bank, params, route))


def scores(h: Tensor, bank: Tensor, route: Tensor | None = None) -> Tensor:
    """``v_j . h`` for every token: [tokens, slots], 0 where the route is -1."""
    rows = _rows(h)
    read = bank[:1, 0] if route is None else bank[route.clamp(min=0).long(), 0]
    out = _dot(rows, read.to(rows.dtype))
    if (plain := _plain(route)) is not None:
        out = out.masked_fill(plain, 0.0)
    return out.float() if h.dtype != torch.float64 else out


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * (weight + weight_offset)``, rounded once at the end."""
    return _normed(_wide(x), weight, eps, weight_offset).to(x.dtype)


def _normed(wide: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide * scale * (weight.to(wide.dtype) + weight_offset)


def moments_(
    count: Tensor, mean: Tensor, m2: Tensor, activations: Tensor, index: Tensor, group: Tensor
) -> None:
    """Fold the rows that ``index`` and ``group`` name into the running moments."""
    groups, positions, hidden = mean.shape
    # the slot [groups * positions] of every row; the spare last one takes what is not read
    read = (index >= 0) & (group >= 0).unsqueeze(-1)
    slot = torch.where(read, group.unsqueeze(-1) * positions + index, groups * positions)
    slot = slot.reshape(-1).long()
    rows = activations.double().reshape(-1, hidden)
    rows = rows.masked_fill((slot == groups * positions).unsqueeze(-1), 0.0)

    n = torch.zeros(groups * positions + 1, dtype=torch.float64, device=mean.device)
    n = n.index_add(0, slot, torch.ones_like(slot, dtype=torch.float64))
    shape = (groups * positions + 1, hidden)
    total = torch.zeros(shape, dtype=torch.float64, device=mean.device).index_add(0, slot, rows)
    batch_mean = total / n.clamp(min=1).unsqueeze(-1)
    deviation = (rows - batch_mean[slot]).pow(2)
    batch_m2 = torch.zeros_like(total).index_add(0, slot, deviation)

    n = n[:-1].reshape(groups, positions, 1)
    batch_mean = batch_mean[:-1].reshape(mean.shape)
    batch_m2 = batch_m2[:-1].reshape(mean.shape)
    before = count.double().unsqueeze(-1)
    after = (before + n).clamp(min=1)
    seen = n > 0  # a slot without rows stays as it is, bit for bit
    delta = batch_mean - mean
    m2.copy_(torch.where(seen, m2 + batch_m2 + delta.pow(2) * (before * n / after), m2))
    mean.copy_(torch.where(seen, mean + delta * (n / after), mean))
    count.add_(n.squeeze(-1).long())


# --- gradients -----------------------------------------------------------------------------------


def add_steer_backward(
    grad: Tensor, scores: Tensor, bank: Tensor, params: Tensor, route: Tensor | None = None
) -> Tensor:
    """Gradient of s, from that of h and the scores that the forward pass read.

    The edit is its own adjoint with the roles of the vectors exchanged::

        g + sum_j phi_j'(t_j) (u_j . g) v_j        phi'(t) = a + c [low <= t <= high]
    """
    g = _rows(grad)
    read, write, p = _programs(bank, params, route, g.dtype)
    push = _push(scores, _dot(g, write), p, route)
    return (g + (push.unsqueeze(-1) * read).sum(1)).to(grad.dtype).reshape(grad.shape)


def _push(t: Tensor, gu: Tensor, params: Tensor, route: Tensor | None) -> Tensor:
    """``phi_j'(t_j) (u_j . g)``, [tokens, slots], from the scores and ``gu = u_j . g``."""
    a, c, _, low, high = params.unbind(-1)
    push = (a + c * ~((t < low) | (t > high))) * gu
    return push if (plain := _plain(route)) is None else push.masked_fill(plain, 0.0)


def add_steer_rms_norm_backward(
    grad_normed: Tensor, grad_h: Tensor | None, h: Tensor, scores: Tensor, weight: Tensor,
    eps: float, bank: Tensor, params: Tensor, route: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor:  # fmt: skip
    """Gradient of s: the norm's adjoint, plus ``grad_h``, then the edit's; rounded once."""
    g = grad_of_h(grad_normed, grad_h, h, weight, eps, weight_offset)
    return add_steer_backward(g, scores, bank, params, route).to(h.dtype).reshape(h.shape)


def grad_of_h(
    grad_normed: Tensor, grad_h: Tensor | None, h: Tensor,
    weight: Tensor, eps: float, weight_offset: float,
) -> Tensor:  # fmt: skip
    """All of the gradient of h, through the norm and beside it: [tokens, hidden], not rounded."""
    g, _ = rms_norm_backward(_rows(grad_normed), _rows(h), weight, eps, weight_offset)
    return g if grad_h is None else g + _rows(grad_h)


def program_backward(
    grad: Tensor, x: Tensor, residual: Tensor | None,
    bank: Tensor, params: Tensor, route: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of bank and params, from that of h; here x and residual are needed again."""
    rows, g = _sum(x, residual), _rows(grad)
    read, write, p = _programs(bank, params, route, rows.dtype)
    a, c, b, low, high = p.unbind(-1)
    t = _dot(rows, read)
    below, above = t < low, t > high
    gu = _dot(g, write)  # [tokens, slots]
    clamped = torch.minimum(torch.maximum(t, low), high)
    phi = a * t + c * clamped + b
    if (plain := _plain(route)) is not None:
        gu, phi = gu.masked_fill(plain, 0.0), phi.masked_fill(plain, 0.0)
    push = _push(t, gu, p, route)
    per_params = torch.stack(
        [t * gu, clamped * gu, gu, c * below * gu, c * (above & ~below) * gu], dim=-1
    )
    per_bank = torch.stack(
        [push.unsqueeze(-1) * rows.unsqueeze(1), phi.unsqueeze(-1) * g.unsqueeze(1)], dim=1
    )  # [tokens, 2, slots, hidden]
    program = _program_of(rows, route)
    grad_bank = torch.zeros_like(bank, dtype=rows.dtype).index_add(0, program, per_bank)
    grad_params = torch.zeros_like(params, dtype=rows.dtype).index_add(0, program, per_params)
    return grad_bank.to(bank.dtype), grad_params.to(params.dtype)


def scores_backward(
    grad: Tensor, h: Tensor, bank: Tensor, route: Tensor | None, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of h and bank."""
    rows, g = _rows(h), grad.to(_wide(h).dtype)
    if (plain := _plain(route)) is not None:
        g = g.masked_fill(plain, 0.0)
    program = _program_of(rows, route)
    grad_h = (g.unsqueeze(-1) * bank[program, 0]).sum(1).to(h.dtype).reshape(h.shape)
    if not needs[1]:
        return grad_h, None
    grad_bank = torch.zeros_like(bank)
    grad_bank[:, 0] = grad_bank[:, 0].index_add(
        0, program, (g.unsqueeze(-1) * rows.unsqueeze(1)).to(bank.dtype)
    )
    return grad_h, grad_bank


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    wide, g = _wide(x), _wide(grad)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = wide * scale
    gained = g * (weight.to(wide.dtype) + weight_offset)
    grad_x = scale * (gained - normed * (gained * normed).mean(-1, keepdim=True))
    grad_weight = (g * normed).reshape(-1, x.shape[-1]).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)

"""Steering programs, and what they mean in float64: the yardstick of the op tests."""

import math

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = math.inf


def rows(tokens, hidden, dtype=torch.float32):
    return torch.randn(tokens, hidden).to(dtype)


def unit(hidden):
    v = torch.randn(hidden, dtype=torch.float64)
    return (v / v.norm()).float()


def program(*slots):
    """[(v, u, (a, c, b, low, high)), ...] -> bank [1, 2, slots, hidden], params [1, slots, 5]."""
    bank = torch.stack([torch.stack([s[0] for s in slots]), torch.stack([s[1] for s in slots])])
    return bank.unsqueeze(0).contiguous(), torch.tensor([[s[2] for s in slots]])


def ablation(hidden, strength=1.0):
    r = unit(hidden)
    return r, *program((r, r, (-strength, 0.0, 0.0, -INF, INF)))


def exact(x, residual, bank, params, route=None):
    """The formula in float64, one token at a time."""
    s = x.double() if residual is None else x.double() + residual.double()
    s = s.reshape(-1, x.shape[-1])
    h = s.clone()
    for i in range(len(s)):
        p = 0 if route is None else int(route[i])
        if p < 0:
            continue
        for v, u, (a, c, b, low, high) in zip(
            bank[p, 0].double(), bank[p, 1].double(), params[p].tolist(), strict=True
        ):
            t = float(v @ s[i])
            h[i] += (a * t + c * min(max(t, low), high) + b) * u
    return h.reshape(x.shape)


def eager(x, residual, r):
    """What a careful user writes in PyTorch, in the model's dtype."""
    s = x + residual
    return s - (s @ r.to(s.dtype)).unsqueeze(-1) * r.to(s.dtype)


def worst(actual, expected):
    return (actual.double() - expected).abs().max().item() if actual.numel() else 0.0


PROGRAMS = {
    "add": (0.0, 0.0, 2.5, -INF, INF),
    "set": (-1.0, 0.0, 3.0, -INF, INF),
    "clamp": (-1.0, 1.0, 0.0, -0.5, 0.25),
    "positive part": (-1.0, 1.0, 0.0, -INF, 0.0),
    "half": (-0.5, 0.0, 0.0, -INF, INF),
}


def programs_named(hidden, *names):
    """One program of one oblique slot for each name."""
    each = [program((unit(hidden), unit(hidden), PROGRAMS[name])) for name in names]
    return tuple(torch.cat(parts) for parts in zip(*each, strict=True))


def random_program(hidden, programs=2, slots=2, dtype=torch.float32):
    """Oblique slots that clamp: nothing about them is a projection."""
    bank = torch.randn(programs, 2, slots, hidden, dtype=dtype) / math.sqrt(hidden)
    params = torch.randn(programs, slots, 5, dtype=dtype)
    params[..., 3], params[..., 4] = -0.7, 0.6
    return bank, params


def state(groups, positions, hidden):
    """Count, mean and m2 of nothing yet."""
    return (
        torch.zeros(groups, positions, dtype=torch.int64),
        torch.zeros(groups, positions, hidden, dtype=torch.float64),
        torch.zeros(groups, positions, hidden, dtype=torch.float64),
    )


def poison(*shapes_and_dtypes):
    """Leave NaN where the next outputs of these shapes will probably be allocated."""
    for shape, dtype in shapes_and_dtypes:
        torch.full(shape, math.nan, dtype=dtype)

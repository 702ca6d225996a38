"""What is timed: for every op, the ways to get it done, by name.

A provider is a function of one set of operands that returns the call to time. It raises `Missing`
or ImportError where it is not there; whatever else it raises is a failure. Both are reported.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cases import Operands
from torch import Tensor
from torch.nn import functional

from refusal_kernels import ops

EPS = 1e-6
Call = Callable[[], object]
Provider = Callable[[Operands], Call]


class Missing(Exception):
    """A provider can't serve here, for the reason given."""


# --- the package's backends ----------------------------------------------------------------------

ARGUMENTS: dict[str, Callable[[Operands], tuple[Any, ...]]] = {
    "add_steer": lambda o: (o.x, o.residual, o.bank, o.params),
    "add_steer_": lambda o: (o.x, o.residual.clone(), o.bank, o.params),
    "add_steer_rms_norm": lambda o: (o.x, o.residual, o.weight, EPS, o.bank, o.params),
    "rms_norm": lambda o: (o.x, o.weight, EPS),
    "scores": lambda o: (o.x, o.bank),
    "moments_": lambda o: o.moments(),
    "add_steer_backward": lambda o: (
        o.x,
        o.scores(),
        o.bank,
        o.params,
    ),  # x stands for the gradient
}


def public(op: str, o: Operands) -> Call:
    """Return the call that a user writes: ``ops.add_steer(...)``."""
    function = getattr(ops, op, None) or getattr(torch.ops.refusal_kernels, op, None)
    if function is None:
        raise Missing(f"this build has no {op}")
    return partial(function, *ARGUMENTS[op](o))


def backend(name: str, op: str, o: Operands) -> Call:
    """Return the op of one backend, as a patch calls it: chosen once, without the choice's cost."""
    device, table = o.x.device.type, ops.BACKENDS[name].ops
    if why := ops.BACKENDS[name].why_not(device, o.x.dtype):
        raise Missing(why)
    if name == "triton" and device == "cpu":
        raise Missing("runs in Triton's interpreter here, whose time says nothing")
    function = table.get(f"{op}_inference", table.get(op))
    if function is None:
        raise Missing(f"the backend has no {op}")
    return partial(function, *ARGUMENTS[op](o))


# --- what they replace ---------------------------------------------------------------------------


def copy(o: Operands) -> Call:
    """Return the ceiling: a copy that moves as many bytes as the op must, half in and half out."""
    elements = o.case.floor_bytes // 2 // o.x.itemsize
    source = torch.randn(elements, dtype=o.x.dtype, device=o.x.device)
    return partial(torch.empty_like(source).copy_, source)


def _three_op_form(x: Tensor, residual: Tensor, r: Tensor) -> Tensor:
    s = x + residual
    return s - (s @ r).unsqueeze(-1) * r


def _addcmul(x: Tensor, residual: Tensor, r: Tensor) -> Tensor:
    s = x + residual
    return torch.addcmul(s, (s @ r).unsqueeze(-1), r, value=-1.0)


def _norm(h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return functional.rms_norm(h, h.shape[-1:], weight, EPS), h


# --- the exact maths, for torch.compile: in float32, rounded once, as the kernels do it ----------


def _ablated(s: Tensor, r: Tensor) -> Tensor:
    return s - (s * r).sum(-1, keepdim=True) * r


def _exact_add_steer(x: Tensor, residual: Tensor, r: Tensor) -> Tensor:
    return _ablated(x.float() + residual.float(), r).to(x.dtype)


def _exact_add_steer_(x: Tensor, residual: Tensor, r: Tensor) -> Tensor:
    return residual.copy_(_exact_add_steer(x, residual, r))


def _exact_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (wide * scale * weight.float()).to(x.dtype)


def _exact_add_steer_rms_norm(
    x: Tensor, residual: Tensor, r: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    h = _ablated(x.float() + residual.float(), r)
    normed = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * weight.float()
    return normed.to(x.dtype), h.to(x.dtype)


def _exact_scores(x: Tensor, r: Tensor) -> Tensor:
    return (x.float() * r).sum(-1, keepdim=True)


def _exact_backward(grad: Tensor, r: Tensor) -> Tensor:
    return _ablated(grad.float(), r).to(grad.dtype)


def compiled(
    maths: Callable[..., object], arguments: Callable[[Operands], tuple[Tensor, ...]]
) -> Provider:
    """Compile for every shape apart; the call goes through Dynamo's guards, as a user's does."""
    function = torch.compile(maths, fullgraph=True, dynamic=False)
    return lambda o: partial(function, *arguments(o))


# --- other people's fused add + RMSNorm ----------------------------------------------------------


def _liger(o: Operands) -> Call:
    fused = importlib.import_module("liger_kernel.ops.fused_add_rms_norm")
    # offset 0, Llama's rounding, and not in place: new tensors, like ours
    arguments = (o.x, o.residual, o.weight, EPS, 0.0, "llama", False)
    return partial(fused.LigerFusedAddRMSNormFunction.apply, *arguments)


def _other(module: str, function: str, o: Operands) -> Call:
    """Return vLLM's or flashinfer's op; both write the norm into x, the sum into residual."""
    fused = getattr(importlib.import_module(module), function)
    return partial(fused, o.x.clone(), o.residual.clone(), o.weight, EPS)


UNSTEERED: dict[str, Provider] = {
    "Liger (no steering)": _liger,
    "vLLM, in place (no steering)": partial(_other, "vllm._custom_ops", "fused_add_rms_norm"),
    "flashinfer, in place (no steering)": partial(_other, "flashinfer.norm", "fused_add_rmsnorm"),
}

# --- the table -----------------------------------------------------------------------------------

OTHERS: dict[str, dict[str, Provider]] = {
    "add_steer": {
        "torch.add": lambda o: partial(torch.add, o.x, o.residual),
        "eager three-op form": lambda o: partial(_three_op_form, o.x, o.residual, o.rounded),
        "eager with addcmul": lambda o: partial(_addcmul, o.x, o.residual, o.rounded),
        "torch.compile": compiled(_exact_add_steer, lambda o: (o.x, o.residual, o.unit)),
    },
    "add_steer_": {
        "torch.add, in place": lambda o: partial(o.residual.clone().add_, o.x),
        "torch.compile": compiled(_exact_add_steer_, lambda o: (o.x, o.residual.clone(), o.unit)),
    },
    "add_steer_rms_norm": {
        "torch.add + rms_norm": lambda o: lambda: _norm(torch.add(o.x, o.residual), o.weight),
        "eager three-op form": lambda o: (
            lambda: _norm(_three_op_form(o.x, o.residual, o.rounded), o.weight)
        ),
        "torch.compile": compiled(
            _exact_add_steer_rms_norm, lambda o: (o.x, o.residual, o.unit, o.weight)
        ),
        **UNSTEERED,
    },
    "rms_norm": {
        "torch rms_norm": lambda o: lambda: _norm(o.x, o.weight),
        "torch.compile": compiled(_exact_rms_norm, lambda o: (o.x, o.weight)),
    },
    "scores": {
        "matmul": lambda o: partial(torch.matmul, o.x, o.rounded),
        "torch.compile": compiled(_exact_scores, lambda o: (o.x, o.unit)),
    },
    "moments_": {"double().sum": lambda o: lambda: o.activations().double().sum((0, 1))},
    "add_steer_backward": {
        "eager three-op form": lambda o: lambda: o.x - (o.x @ o.rounded).unsqueeze(-1) * o.rounded,
        "torch.compile": compiled(_exact_backward, lambda o: (o.x, o.unit)),
    },
}


def providers(op: str) -> dict[str, Provider]:
    """Return every provider of one op: the ceiling, what it replaces, the backends."""
    backends: dict[str, Provider] = {name: partial(backend, name, op) for name in ops.BACKENDS}
    if op == "add_steer_backward":  # no public function; the dispatcher picks by device
        backends = {"dispatcher": partial(public, op), **backends}
    return {"copy": copy, **OTHERS[op], **backends}


def serving(op: str, device: str, dtype: torch.dtype) -> str:
    """Return which of `providers` is what the package serves by itself."""
    if op == "add_steer_backward":
        return "dispatcher"
    return ops.explain(device=device, dtype=dtype).chosen

"""What the dispatcher needs beside the kernels: fake implementations, gradients, the fall-back.

The schemas stand in ``csrc/ops.cpp`` and the CPU kernels are registered there. Here every op gets
a fake implementation (shapes only), a gradient, and the reference for devices without a kernel.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import refusal_kernels._C  # noqa: F401  (it registers the schemas and the CPU kernels)
except ImportError as error:
    raise ImportError(
        "the compiled extension of refusal_kernels is missing or does not load "
        f"({error}); build it with: pip install --no-build-isolation -e ."
    ) from error
from refusal_kernels.ops import reference

PUBLIC = ("add_steer", "add_steer_", "add_steer_rms_norm", "scores", "rms_norm", "moments_")
# The two that stand in every layer of a patched model exist without a gradient too: the same
# kernel, registered twice, because the Python autograd layer costs 4 us a call even where no
# gradient is wanted.
INFERENCE = {f"{op}_inference": op for op in ("add_steer", "add_steer_rms_norm")}
OPS = (*PUBLIC, *INFERENCE)


def _fake_like_x(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_two_like_x(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return _fake_like_x(x), _fake_like_x(x)


def _fake_scores(h: Tensor, bank: Tensor, route: Tensor | None = None) -> Tensor:
    return h.new_empty((h.shape[:-1].numel(), bank.shape[2]), dtype=torch.float32)


def _fake_nothing(*_: Any, **__: Any) -> None:
    return None


FAKES: dict[str, Callable[..., Any]] = {
    "add_steer": _fake_like_x,
    "add_steer_": _fake_nothing,
    "add_steer_rms_norm": _fake_two_like_x,
    "scores": _fake_scores,
    "rms_norm": _fake_like_x,
    "moments_": _fake_nothing,
}


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(i for i in inputs if isinstance(i, Tensor)))
    ctx.tensor_at = [isinstance(i, Tensor) for i in inputs]
    ctx.others = [i for i in inputs if not isinstance(i, Tensor)]


def _saved(ctx: Any) -> list[Any]:
    tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
    return [next(tensors) if tensor else next(others) for tensor in ctx.tensor_at]


def _add_steer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, residual, bank, params, route = _saved(ctx)
    needs = ctx.needs_input_grad
    grad_s, grad_bank, grad_params = reference.add_steer_backward(
        grad, x, residual, bank, params, route, (needs[0] or needs[1], needs[2], needs[3])
    )
    return grad_s, grad_s if residual is not None else None, grad_bank, grad_params, None


def _add_steer_rms_norm_backward(
    ctx: Any, grad_normed: Tensor, grad_h: Tensor
) -> tuple[Tensor | None, ...]:
    x, residual, weight, eps, bank, params, route, weight_offset = _saved(ctx)
    needs = ctx.needs_input_grad
    grad_s, grad_weight, grad_bank, grad_params = reference.add_steer_rms_norm_backward(
        grad_normed,
        grad_h,
        x,
        residual,
        weight,
        eps,
        bank,
        params,
        route,
        weight_offset,
        (needs[0] or needs[1], needs[4], needs[5]),
    )
    grad_residual = grad_s if residual is not None else None
    return grad_s, grad_residual, grad_weight, None, grad_bank, grad_params, None, None


def _scores_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    h, bank, route = _saved(ctx)
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
    return (*reference.scores_backward(grad, h, bank, route, needs), None)


def _rms_norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, eps, weight_offset = _saved(ctx)
    return (*reference.rms_norm_backward(grad, x, weight, eps, weight_offset), None, None)


BACKWARDS: dict[str, Callable[..., Any]] = {
    "add_steer": _add_steer_backward,
    "add_steer_rms_norm": _add_steer_rms_norm_backward,
    "scores": _scores_backward,
    "rms_norm": _rms_norm_backward,
}


def register(namespace: str, ops: tuple[str, ...] = OPS) -> None:
    """Give the ops of one namespace their fake implementations and gradients."""
    for op in ops:
        torch.library.register_fake(f"{namespace}::{op}", FAKES[INFERENCE.get(op, op)])
        if op in BACKWARDS:
            torch.library.register_autograd(
                f"{namespace}::{op}", BACKWARDS[op], setup_context=_save
            )


def register_kernels(key: str, kernels: dict[str, Callable[..., Any]]) -> None:
    """Serve the public ops of one dispatch key (``CUDA``, ...) with Python callables."""
    for op in OPS:
        torch.library.impl(f"refusal_kernels::{op}", key, kernels[INFERENCE.get(op, op)])


register("refusal_kernels")

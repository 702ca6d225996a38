"""What the dispatcher needs beside the kernels: fake implementations, gradients, the fall-back.

The schemas stand in ``csrc/schemas.h`` and the CPU kernels are registered there. Here every op gets
a fake implementation (shapes only), a gradient, and the reference for devices without a kernel.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext

try:
    import refusal_kernels._C  # noqa: F401  (it registers the schemas and the CPU kernels)
except ImportError as error:
    raise ImportError(
        "the compiled extension of refusal_kernels is missing or does not load "
        f"({error}); build it with: pip install --no-build-isolation -e ."
    ) from error
from refusal_kernels.ops import inductor, reference

# The edits that stand in every layer of a patched model exist in two more forms. `_scores` also
# returns what the edit read. `_inference` is the same kernel registered without a gradient, because
# the Python autograd layer costs 4 us a call even where no gradient is wanted.
EDITS = ("add_steer", "add_steer_rms_norm")
SCORED = {op: f"{op}_scores" for op in EDITS}
INFERENCE = {f"{op}_inference": op for op in EDITS}
FORWARD = {op: inference for inference, op in INFERENCE.items()}
PUBLIC = (
    *EDITS,
    *SCORED.values(),
    *(f"{op}_backward" for op in EDITS),
    "add_steer_",
    "scores",
    "rms_norm",
    "moments_",
)
OPS = (*PUBLIC, *INFERENCE)


def _fake_like_x(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_two_like_x(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return _fake_like_x(x), _fake_like_x(x)


def _fake_scores(h: Tensor, bank: Tensor, route: Tensor | None = None) -> Tensor:
    # math.prod: Size.numel() would make a constant of a size that a compiler keeps open
    return h.new_empty((math.prod(h.shape[:-1]), bank.shape[2]), dtype=torch.float32)


def _fake_scored(x: Tensor, residual: Tensor | None, bank: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _fake_like_x(x), _fake_scores(x, bank)


def _fake_normed_scored(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, bank: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return _fake_like_x(x), _fake_like_x(x), _fake_scores(x, bank)


def _fake_nothing(*_: Any, **__: Any) -> None:
    return None


FAKES: dict[str, Callable[..., Any]] = dict.fromkeys(PUBLIC, _fake_like_x) | {
    "add_steer_": _fake_nothing,
    "add_steer_scores": _fake_scored,
    "add_steer_rms_norm": _fake_two_like_x,
    "add_steer_rms_norm_scores": _fake_normed_scored,
    "scores": _fake_scores,
    "moments_": _fake_nothing,
}


def _save(ctx: Any, values: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*(v for v in values if isinstance(v, Tensor)))
    ctx.tensor_at = [isinstance(v, Tensor) for v in values]
    ctx.others = [v for v in values if not isinstance(v, Tensor)]


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save(ctx, inputs)


def _saved(ctx: Any) -> list[Any]:
    tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
    return [next(tensors) if tensor else next(others) for tensor in ctx.tensor_at]


class _Edit:
    """The gradient of `add_steer_scores` and `add_steer_rms_norm_scores`.

    With frozen vectors, as in training a model under an edit, the backward pass needs the incoming
    gradient and the scores alone (and h after a norm, which the caller holds anyway): neither x nor
    the residual is kept. The scores themselves are telemetry and carry no gradient; `scores` does.
    """

    def __init__(self, namespace: str, normed: bool) -> None:
        self.ops = getattr(torch.ops, namespace)
        self.normed = normed

    def setup(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[-1])
        norm, h = None, None
        if self.normed:
            x, residual, weight, eps, bank, params, route, offset = inputs
            norm, h = (weight, eps, offset), output[1]
        else:
            x, residual, bank, params, route = inputs
        program = slice(4, 6) if self.normed else slice(2, 4)  # bank and params
        ctx.program_wanted = any(ctx.needs_input_grad[program])
        kept = (x, residual) if ctx.program_wanted else (None, None)
        ctx.has_residual = residual is not None
        _save(ctx, (*kept, *(norm or (None,) * 3), h, output[-1], bank, params, route))

    def backward(
        self, ctx: Any, grad_normed: Tensor | None, grad_h: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of s, residual, weight, bank and params."""
        x, residual, weight, eps, offset, h, scores, *program = _saved(ctx)
        if grad_normed is None and grad_h is None:
            return (None,) * 5
        grad_weight: Tensor | None = None
        grad_bank: Tensor | None = None
        grad_params: Tensor | None = None
        if grad_normed is None:
            grad_s = self.ops.add_steer_backward(grad_h, scores, *program)
        else:
            norm = (weight, eps, *program, offset)
            grad_s = self.ops.add_steer_rms_norm_backward(grad_normed, grad_h, h, scores, *norm)
            if ctx.needs_input_grad[2]:
                _, grad_weight = reference.rms_norm_backward(grad_normed, h, weight, eps, offset)
        if ctx.program_wanted:
            through = grad_h
            if grad_normed is not None:
                through = reference.grad_of_h(grad_normed, grad_h, h, weight, eps, offset)
            assert through is not None
            grad_bank, grad_params = reference.program_backward(through, x, residual, *program)
        return grad_s, grad_s if ctx.has_residual else None, grad_weight, grad_bank, grad_params

    def add(self, ctx: Any, grad_h: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        grads = self.backward(ctx, None, grad_h)
        return *grads[:2], *grads[3:], None

    def norm(
        self, ctx: Any, grad_normed: Tensor | None, grad_h: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        grads = self.backward(ctx, grad_normed, grad_h)
        return *grads[:3], None, *grads[3:], None, None


def _scores_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    h, bank, route = _saved(ctx)
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
    return (*reference.scores_backward(grad, h, bank, route, needs), None)


def _rms_norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, eps, weight_offset = _saved(ctx)
    return (*reference.rms_norm_backward(grad, x, weight, eps, weight_offset), None, None)


def _no_second_derivative(*_: Any) -> None:
    raise RuntimeError("the fused edits have no second derivative; use use_backend('reference')")


def _through_scored(namespace: str, op: str) -> Callable[..., Any]:
    """Serve an edit's Autograd key: by its `_scores` form where a gradient is wanted."""
    kernel = getattr(getattr(torch.ops, namespace), op).default
    scored = getattr(getattr(torch.ops, namespace), SCORED[op]).default

    def call(*args: Any) -> Any:
        wanted = any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if wanted and torch.is_grad_enabled():
            *outputs, _ = scored(*args)
            return outputs[0] if len(outputs) == 1 else tuple(outputs)
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*args)

    return call


_KEPT: list[torch.library.Library] = []  # what one registers lasts as long as it does


def _fake_inference(op: str) -> Callable[..., Any]:
    """The first that a compiler sees of the edits, and so where Inductor is told about them."""
    fake = FAKES[INFERENCE[op]]

    def seen(*args: Any, **kwargs: Any) -> Any:
        if TracingContext.try_get() is not None:
            inductor.register()
        return fake(*args, **kwargs)

    return seen


def register(namespace: str, ops: tuple[str, ...] = OPS) -> None:
    """Give the ops of one namespace their fake implementations and gradients."""
    for op in ops:
        fake = _fake_inference(op) if op in INFERENCE else FAKES[op]
        torch.library.register_fake(f"{namespace}::{op}", fake)
    add, norm = _Edit(namespace, normed=False), _Edit(namespace, normed=True)
    for op, backward, setup in (
        ("add_steer_scores", add.add, add.setup),
        ("add_steer_rms_norm_scores", norm.norm, norm.setup),
        ("add_steer_backward", _no_second_derivative, None),
        ("add_steer_rms_norm_backward", _no_second_derivative, None),
        ("scores", _scores_backward, _save_inputs),
        ("rms_norm", _rms_norm_backward, _save_inputs),
    ):
        torch.library.register_autograd(f"{namespace}::{op}", backward, setup_context=setup)
    # triton_op has given its own ops an Autograd kernel, which older releases of PyTorch replace
    # only where they are told to
    library = torch.library.Library(namespace, "FRAGMENT")
    _KEPT.append(library)
    for op in EDITS:
        library.impl(op, _through_scored(namespace, op), "Autograd", allow_override=True)


def register_kernels(key: str, kernels: dict[str, Callable[..., Any]]) -> None:
    """Serve the public ops of one dispatch key (``CUDA``, ...) with Python callables."""
    for op in OPS:
        torch.library.impl(f"refusal_kernels::{op}", key, kernels[INFERENCE.get(op, op)])


register("refusal_kernels")

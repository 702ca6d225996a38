"""The start-up check: a forward pass through the loaded model, with every site watched.

Unknown code fails silently: an add that no site sees leaves the model unsteered, and nothing else
shows it. So one pass of dummy tokens is run eagerly, and it is demanded that every site is called
exactly once, in order; that each adds to the very tensor that the site before returned, so that
nothing else writes to the stream; and that a projection leaves nothing along its direction.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from refusal_kernels.errors import InputError
from refusal_kernels.vllm.bank import PLAIN
from refusal_kernels.vllm.worker import WorkerState

logger = logging.getLogger("vllm.refusal_kernels")
TOKENS = 8
# |h.r| / |h| after a projection in float32, rounded to the dtype of h: each of the `hidden` channels
# is off by at most eps/2 of itself, so the component along r, of norm 1, by at most eps/2 of |h|.
# Twice that is left for the dot product that measures it.
ROUNDING = 1.0


class Watch:
    """What the sites did in one forward pass."""

    def __init__(self, state: WorkerState, direction: Tensor) -> None:
        self.places = state.bank.places
        self.direction = direction
        self.calls: list[str] = []
        self.faults: list[str] = []
        self.left: dict[str, float] = {}
        self._stream: Tensor | None = None

    def seen(self, number: int, site: nn.Module, args: Any, output: Any) -> None:
        """A forward hook of a site."""
        place = self.places[number]
        residual = args[1]
        h = output[1] if isinstance(output, tuple) else output
        expected = self.places[len(self.calls)].name if len(self.calls) < len(self.places) else "no"
        if place.name != expected:
            self.faults.append(f"{place.name} was called where {expected} was expected")
        self.calls.append(place.name)
        if self._stream is not None and not _same(residual, self._stream):
            self.faults.append(f"what {place.name} adds to is not what the site before it returned")
        self._stream = h.clone()
        rows = h.reshape(-1, h.shape[-1]).float()
        along = (rows @ self.direction).abs() / rows.norm(dim=-1).clamp(min=1e-30)
        self.left[place.name] = float(along.max())


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits; a NaN equals itself."""
    if a.numel() != b.numel() or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def check(runner: Any, state: WorkerState) -> None:
    """Run the check.

    Raises
    ------
    InputError
        With what the model does that its family's entry does not say.
    """
    watch = watched_pass(runner, state)
    faults = list(watch.faults)
    if missing := [p.name for p in state.bank.places if p.name not in watch.calls]:
        faults.insert(0, f"never called: {', '.join(missing)}")
    limit = ROUNDING * torch.finfo(runner.model_config.dtype).eps
    worst = max(watch.left, key=lambda name: watch.left[name], default=None)
    if worst is not None and not watch.left[worst] <= limit:
        faults.append(f"|h.r| / |h| is {watch.left[worst]:.3g} after {worst}; expected {limit:.3g}")
    if faults:
        name = type(runner.get_model()).__name__
        raise InputError(f"{name} can not be steered: {'; '.join(faults[:4])}")
    logger.info(
        "refusal_kernels: %d of %d places called, each once; |h.r| / |h| at most %.2g",
        *(len(watch.calls), len(state.bank.places), max(watch.left.values(), default=0.0)),
    )


def watched_pass(runner: Any, state: WorkerState) -> Watch:
    """Ablate a random direction from dummy tokens, in an eager pass, and watch every site."""
    bank = state.bank
    r = torch.randn(bank.vectors.shape[-1], generator=torch.Generator().manual_seed(0))
    r = (r.double() / r.double().norm()).float().to(bank.vectors.device)
    watch = Watch(state, r)
    kept = bank.vectors[0].clone(), bank.params[:, 0].clone()
    hooks = [
        site.register_forward_hook(functools.partial(watch.seen, number))
        for number, site in enumerate(state.sites)
    ]
    try:
        bank.vectors[0].zero_()
        bank.params[:, 0].zero_()
        bank.vectors[0, :, 0] = r
        bank.params[:, 0, 0] = torch.tensor([-1.0, 0.0, 0.0, 0.0, 0.0], device=r.device)
        bank.route.zero_()
        with eager(runner.get_model()), torch.inference_mode():
            runner._dummy_run(TOKENS, **dummy_settings(runner))
    finally:
        for hook in hooks:
            hook.remove()
        bank.vectors[0].copy_(kept[0])
        bank.params[:, 0].copy_(kept[1])
        bank.route.fill_(PLAIN)
        bank.unroute()
    return watch


def dummy_settings(runner: Any) -> dict[str, Any]:
    """Return how a runner's dummy pass is asked for, without a CUDA graph."""
    from vllm.config import CUDAGraphMode

    return {"cudagraph_runtime_mode": CUDAGraphMode.NONE, "skip_eplb": True}


@contextlib.contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Call the parts of a model that vLLM has compiled by their own forward."""
    compiled = [m for m in model.modules() if getattr(m, "do_not_compile", True) is False]
    for module in compiled:
        module.do_not_compile = True
    try:
        yield
    finally:
        for module in compiled:
            module.do_not_compile = False


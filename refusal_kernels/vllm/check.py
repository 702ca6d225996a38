"""The start-up check: dummy passes through the loaded model, before any request.

A residual add that no site replaces, or a compiled graph from another engine's cache, would leave
the model unsteered without an error. Two things are checked.

- An eager pass: every site is called once, in order. The first steers the embedding, each later one
  adds to the tensor that the one before it returned, and the last one's output is returned by the
  model: nothing else writes to the stream. After a projection nothing is left along its direction.
- A compiled model agrees with its eager code when token k is pushed far along a direction at place
  k alone. A graph without that site returns another row.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode
from vllm.distributed import get_pp_group

from refusal_kernels.errors import InputError
from refusal_kernels.vllm.bank import PLAIN, Bank
from refusal_kernels.vllm.families import ADD, NORM, START
from refusal_kernels.vllm.worker import WorkerState

logger = logging.getLogger("vllm.refusal_kernels")
TOKENS = 8
# A bound on |h.r| / |h| after a projection, in eps of h's dtype. Rounding changes every channel by
# at most eps/2 of itself, so the component along r by at most eps/2 of |h|; another eps/2 covers
# the float32 sums of the projection and of the measurement.
ROUNDINGS = 1.0
# Larger than a residual stream, whose largest channels are some thousands; spread over all channels
# it is within float16.
PUSH = 1e4
# Distances of two rows as directions. Eager and compiled rows differ by roundings, far less than
# NEAR; rows with and without the push are about sqrt(2) apart.
NEAR, FAR = 0.1, 0.5
FILL = 0x3F  # 0.75 in bfloat16 and float32, 1.8 in float16, 1.9 in float8_e4m3


def check(runner: Any, state: WorkerState) -> None:
    """Run the check.

    Raises
    ------
    InputError
        If the model's code is not as `refusal_kernels.vllm.families` describes it.
    """
    if not state.sites:
        return
    model = runner.get_model()
    with lent(state.bank), filled(runner.kv_caches):
        r = _direction(state.bank)
        watch = _watched_pass(runner, state, r)
        faults = watch.all_faults(ROUNDINGS * torch.finfo(runner.model_config.dtype).eps)
        if not faults and any(_compiled(model)):
            faults = _compiled_faults(runner, state.bank, r)
    if faults:
        raise InputError(f"{type(model).__name__} cannot be steered: {'; '.join(faults[:4])}")
    logger.info(
        "refusal_kernels: all %d places called, each once; |h.r| / |h| at most %.2g",
        *(len(watch.calls), max(watch.left.values())),
    )


class Watch:
    """A record of one eager pass."""

    def __init__(self, bank: Bank, direction: Tensor) -> None:
        self.places = bank.places
        self.direction = direction
        self.calls: list[str] = []
        self.faults: list[str] = []
        self.left: dict[str, float] = {}  # |h.r| / |h|, by place
        self._stream: Tensor | None = None
        self._returned: tuple[Tensor, ...] = ()

    def record(self, number: int, _: nn.Module, args: Any, output: Any) -> None:
        """Record a call: a forward hook of a site, or of the norm that holds it."""
        name, residual = self.places[number].name, args[1]
        h = output[1] if isinstance(output, tuple) else output
        position = len(self.calls)
        if position >= len(self.places) or self.places[position].name != name:
            self.faults.append(f"{name} was called as number {position + 1}")
        if self._stream is not None and not _same(residual, self._stream):
            self.faults.append(f"{name} adds to another tensor than the place before it returned")
        self.calls.append(name)
        self._stream = h.clone()
        outputs = output if isinstance(output, tuple) else (output,)
        self._returned = tuple(t.clone() for t in outputs)
        rows = h.reshape(-1, h.shape[-1]).float()
        along = (rows @ self.direction).abs() / rows.norm(dim=-1).clamp(min=1e-30)
        self.left[name] = float(along.max())

    def record_end(self, output: Any) -> None:
        """Record what the model, or its last layer, returns after the last site."""
        tensors = list(output.values()) if isinstance(output, dict) else output
        tensors = tensors if isinstance(tensors, list | tuple) else [tensors]
        if not any(_same(t, returned) for t in tensors for returned in self._returned):
            self.faults.append(f"the output of {self.places[-1].name} is not the model's output")

    def all_faults(self, limit: float) -> list[str]:
        """Return all faults; `limit` is the most that may be left along the direction."""
        missing = [p.name for p in self.places if p.name not in self.calls]
        faults = [f"never called: {', '.join(missing)}"] if missing else []
        faults += self.faults
        for name, left in self.left.items():
            if not left <= limit:
                faults.append(f"|h.r| / |h| is {left:.3g} after {name}; expected {limit:.3g}")
        return faults


def _same(a: Tensor | None, b: Tensor) -> bool:
    """Whether two tensors hold the same bits; a NaN equals itself."""
    if a is None or a.numel() != b.numel() or a.dtype != b.dtype:
        return False
    first, second = (t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(first, second)


def _watched_pass(runner: Any, state: WorkerState, r: Tensor) -> Watch:
    """Ablate r from dummy tokens in an eager pass, with every site watched."""
    bank = state.bank
    watch = Watch(bank, r)
    hooks = [  # with unfused norms the site is inside the norm, whose output has the stream
        (place.module if place.kind == NORM else site).register_forward_hook(
            functools.partial(watch.record, number)
        )
        for number, (place, site) in enumerate(zip(bank.places, state.sites, strict=True))
    ]
    last = bank.places[-1]
    if last.kind == ADD:
        hooks.append(
            last.module.register_forward_hook(lambda _, __, output: watch.record_end(output))
        )
    if get_pp_group().is_first_rank and bank.places[0].kind != START:
        watch.faults.append("the embedding is not steered")
    bank.vectors[0, :, 0] = r
    bank.params[:, 0, 0, 0] = -1.0
    bank.route.zero_()
    try:
        with _eager(runner.get_model()):
            output = _output(runner, TOKENS)
        if last.kind != ADD:
            watch.record_end(getattr(output, "tensors", output))
    finally:
        for hook in hooks:
            hook.remove()
    return watch


def _compiled_faults(runner: Any, bank: Bank, r: Tensor) -> list[str]:
    """Compare the compiled model with its eager code, at each place alone."""
    rows, faults = bank.vectors.shape[0], []
    for first in range(0, len(bank.places), rows):
        places = bank.places[first : first + rows]
        bank.vectors.zero_()
        bank.params.zero_()
        bank.vectors[: len(places), :, 0] = r
        bank.route.fill_(PLAIN)
        for k in range(len(places)):
            bank.params[first + k, k, 0] = torch.tensor([0.0, 0.0, PUSH, 0.0, 0.0])
            bank.route[k] = k
        compiled = _outputs(runner, len(places))
        with _eager(runner.get_model()):
            expected = _outputs(runner, len(places))
            bank.route.fill_(PLAIN)
            plain = _outputs(runner, len(places))
        for place, row, wanted, without in zip(places, compiled, expected, plain, strict=True):
            if _distance(without, wanted) < FAR:
                continue  # attention spreads the push over all rows: there is no difference to see
            if not _distance(row, wanted) < NEAR:
                faults.append(f"the compiled graph does not steer at {place.name}")
    return faults


def _distance(a: Tensor, b: Tensor) -> float:
    """Distance of two rows as directions: 0 for the same, sqrt(2) for unrelated ones."""
    return float((a / a.norm() - b / b.norm()).norm())


def _outputs(runner: Any, tokens: int) -> Tensor:
    """Run dummy tokens; return this rank's output, float32 [tokens, hidden]."""
    output = _output(runner, tokens)
    if not isinstance(output, Tensor):  # a pipeline stage: (hidden, residual), or their sum
        output = sum(output.tensors.values())
    return output.reshape(-1, output.shape[-1])[:tokens].float().clone()


def _output(runner: Any, tokens: int) -> Any:
    """Run dummy tokens; return the output of this rank's model."""
    outputs: list[Any] = []
    hook = runner.get_model().register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        with torch.inference_mode():
            # V2 ignores arguments that it does not know; a profiling run uses no CUDA graph
            mode = (
                {"is_profile": True}
                if runner.vllm_config.use_v2_model_runner
                else {"cudagraph_runtime_mode": CUDAGraphMode.NONE, "force_attention": True}
            )
            runner._dummy_run(tokens, skip_eplb=True, **mode)
    finally:
        hook.remove()
    output = outputs[-1]
    return output[0] if isinstance(output, tuple) else output  # the others are for a drafter


def _direction(bank: Bank) -> Tensor:
    r = torch.randn(bank.vectors.shape[-1], generator=torch.Generator().manual_seed(0))
    return (r.double() / r.double().norm()).float().to(bank.vectors.device)


@contextlib.contextmanager
def lent(bank: Bank) -> Iterator[None]:
    """Zero the bank's tensors for the time of a ``with``, and restore them after it."""
    before = bank.vectors.clone(), bank.params.clone()
    bank.vectors.zero_()
    bank.params.zero_()
    try:
        yield
    finally:
        bank.vectors.copy_(before[0])
        bank.params.copy_(before[1])
        bank.route.fill_(PLAIN)
        bank.routed = False


@contextlib.contextmanager
def filled(caches: Any) -> Iterator[None]:
    """Fill the KV cache with a byte that makes positive numbers below 2 in any format.

    Dummy tokens only read it, and of an empty cache attention would make zeros. Layers may share a
    storage, which is filled once. vLLM has set its random seed: nothing is drawn here.
    """
    tensors = [cache for cache in caches if isinstance(cache, Tensor)]
    shared = {cache.untyped_storage().data_ptr(): cache.untyped_storage() for cache in tensors}
    storages = [  # contiguous, whatever the caches' strides
        torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        for storage in shared.values()
    ]
    for storage in storages:
        storage.fill_(FILL)
    try:
        yield
    finally:
        for storage in storages:
            storage.zero_()


def _compiled(model: nn.Module) -> Iterator[Any]:
    """Yield the parts of a model that vLLM compiles."""
    return (m for m in model.modules() if getattr(m, "do_not_compile", True) is False)


@contextlib.contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Run the compiled parts of a model eagerly."""
    compiled = list(_compiled(model))
    for module in compiled:
        module.do_not_compile = True
    try:
        yield
    finally:
        for module in compiled:
            module.do_not_compile = False

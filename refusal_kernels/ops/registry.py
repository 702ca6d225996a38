"""Which backend serves a call, and why the others were passed over.

A backend is a table of callables and one predicate. The choice depends on the device and the dtype
alone, so a patch makes it once; it can be overridden by `use_backend` and by the environment
variable ``REFUSAL_KERNELS_BACKEND``.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from refusal_kernels import _C
from refusal_kernels.errors import InputError
from refusal_kernels.ops import autograd, reference

ENVIRONMENT_VARIABLE = "REFUSAL_KERNELS_BACKEND"
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """A set of ops and the calls that it can serve.

    Attributes
    ----------
    name
        ``cpu``, ``cuda``, ``triton`` or ``reference``.
    ops
        Op name to callable.
    why_not
        (device type, dtype) to the reason why such a call can not be served, or None.
    """

    name: str
    ops: MappingProxyType[str, Callable[..., Any]]
    why_not: Callable[[str, torch.dtype], str | None]


def _dtype_why_not(dtype: torch.dtype) -> str | None:
    if dtype in HALF_AND_SINGLE:
        return None
    return f"takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"


def _cpu_why_not(device: str, dtype: torch.dtype) -> str | None:
    if device != "cpu":
        return f"takes CPU tensors, not {device}"
    return _dtype_why_not(dtype)


def _cuda_why_not(device: str, dtype: torch.dtype) -> str | None:
    if not _C.cuda_architectures():
        return "this build has no CUDA kernels"
    if device != "cuda":
        return f"takes CUDA tensors, not {device}"
    return _dtype_why_not(dtype)


# registering Triton's ops takes over a second: not where none of them could run
if torch.backends.cuda.is_built() or os.environ.get("TRITON_INTERPRET"):
    from refusal_kernels.ops.triton_ops import KERNELS as TRITON_KERNELS
    from refusal_kernels.ops.triton_ops import OPS as TRITON_OPS
    from refusal_kernels.ops.triton_ops import why_not as triton_why_not
else:
    TRITON_OPS = TRITON_KERNELS = {}

    def triton_why_not(device: str, dtype: torch.dtype) -> str | None:
        """Return the reason why Triton can not serve a call."""
        return "runs on a GPU; on a CPU only in Triton's interpreter (TRITON_INTERPRET=1)"


_COMPILED = {op: getattr(torch.ops.refusal_kernels, op).default for op in autograd.OPS}
_REFERENCE = {op: getattr(reference, autograd.INFERENCE.get(op, op)) for op in autograd.OPS}

# In order of preference.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", MappingProxyType(_COMPILED), _cpu_why_not),
        Backend("cuda", MappingProxyType(_COMPILED), _cuda_why_not),
        Backend("triton", MappingProxyType(TRITON_OPS), triton_why_not),
        Backend("reference", MappingProxyType(_REFERENCE), lambda device, dtype: None),
    )
}

# The public ops on devices without compiled kernels.
autograd.register_kernels("CompositeExplicitAutograd", _REFERENCE)
if TRITON_OPS and not _C.cuda_architectures():
    autograd.register_kernels("CUDA", TRITON_KERNELS)

_forced: ContextVar[str | None] = ContextVar("refusal_kernels_backend", default=None)


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise InputError(f"{source}: no backend '{name}'; there are: {', '.join(BACKENDS)}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every op inside the ``with`` by one backend; a call that it can't serve raises.

    Parameters
    ----------
    name
        ``cpu``, ``cuda``, ``triton`` or ``reference``.

    Raises
    ------
    InputError
        If there is no such backend.
    """
    token = _forced.set(_check_name(name, "use_backend"))
    try:
        yield
    finally:
        _forced.reset(token)


@dataclass(frozen=True)
class Explanation:
    """The backend that serves a call, and the reason why each other one does not."""

    chosen: str
    passed_over: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.chosen}: serves the call"]
        return "\n".join(lines + [f"{name}: {why}" for name, why in self.passed_over.items()])


def explain(
    x: torch.Tensor | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Explanation:
    """Say which backend serves a call, and why each other one was passed over.

    Parameters
    ----------
    x
        The tensor of the call; or give ``device`` and ``dtype`` instead.

    Raises
    ------
    InputError
        If a backend was asked for by name and can not serve the call.
    """
    if x is not None:
        device, dtype = x.device, x.dtype
    device_type = torch.device(device).type
    forced, source = _forced.get(), "use_backend"
    if forced is None and (value := os.environ.get(ENVIRONMENT_VARIABLE)):
        forced, source = _check_name(value, ENVIRONMENT_VARIABLE), ENVIRONMENT_VARIABLE

    chosen, passed_over = None, {}
    for backend in BACKENDS.values():
        why = backend.why_not(device_type, dtype)
        if why is None and forced not in (None, backend.name):
            why = f"{source} asks for {forced}"
        if why is None and chosen is not None:
            why = f"{chosen} comes first"
        if why is None:
            chosen = backend.name
        else:
            passed_over[backend.name] = why
    if chosen is None:
        assert forced is not None  # the reference takes everything
        raise InputError(f"{source} asks for the backend '{forced}': {passed_over[forced]}")
    return Explanation(chosen, passed_over)


# What os.environ holds: asked for a name that is not there, it raises and catches a KeyError, which
# costs half a microsecond a call.
_environment: dict[Any, Any] = os.environ._data  # type: ignore[attr-defined]
_variable = os.environ.encodekey(ENVIRONMENT_VARIABLE)


def constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function whose result a compiled graph keeps as it was when the graph was traced.

    This is `torch.compiler.assume_constant_result` without its import of torch._dynamo, which
    takes two seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.lru_cache(maxsize=1024)
def _found(op: str, device: str, dtype: torch.dtype, forced: Any, variable: Any) -> Any:
    """`explain` once for every way to ask: looking costs 4 us, a third of a small call."""
    found = BACKENDS[explain(device=device, dtype=dtype).chosen].ops[op]
    # what an overload's own call hands on to, for a quarter of a microsecond
    return found._op if isinstance(found, torch._ops.OpOverload) else found


@constant
def backend_name(device_type: str, dtype: torch.dtype) -> str:
    """Name the backend that serves a call; a compiled graph keeps what held when it was traced."""
    return explain(device=device_type, dtype=dtype).chosen


def op_for(op: str, x: torch.Tensor) -> Callable[..., Any]:
    """Return the callable that serves ``op`` for tensors like x."""
    return BACKENDS[backend_name(x.device.type, x.dtype)].ops[op]


def serving(op: str, x: torch.Tensor) -> Callable[..., Any]:
    """Return `op_for` for one call: found anew for each, so what finding costs counts."""
    if torch.compiler.is_dynamo_compiling():
        return op_for(op, x)
    device = "cpu" if x.is_cpu else x.device.type  # a flag costs a quarter of a name
    return _found(op, device, x.dtype, _forced.get(), _environment.get(_variable))


def edit_for(op: str, *tensors: torch.Tensor | None) -> Callable[..., Any]:
    """Return the callable for an edit of tensors[0]: without the autograd layer where none asks."""
    x = tensors[0]
    assert x is not None
    if torch.is_grad_enabled():
        for tensor in tensors:  # any() of a generator takes a third of a microsecond longer
            if tensor is not None and tensor.requires_grad:
                return serving(op, x)
    return serving(autograd.FORWARD.get(op, op), x)

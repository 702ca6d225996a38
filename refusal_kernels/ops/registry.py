"""Which backend serves a call, and why the others were passed over.

A backend is a table of callables and one predicate. The choice depends on the device and the dtype
alone, so a patch makes it once; it can be overridden by `use_backend` and by the environment
variable ``REFUSAL_KERNELS_BACKEND``.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from refusal_kernels import _C
from refusal_kernels.errors import InputError
from refusal_kernels.ops import autograd, reference

ENVIRONMENT_VARIABLE = "REFUSAL_KERNELS_BACKEND"


@dataclass(frozen=True)
class Backend:
    """A set of ops and the calls that it can serve; its fields as `register_backend` takes them."""

    name: str
    ops: Mapping[str, Callable[..., Any]]
    why_not: Callable[[str, torch.dtype], str | None]


# registering Triton's ops takes over a second: not where none of them could run
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
TRITON_OPS: Mapping[str, Callable[..., Any]] = {}
INTERPRETED = False
if TRITON_INSTALLED and (torch.backends.cuda.is_built() or os.environ.get("TRITON_INTERPRET")):
    from refusal_kernels.ops.triton_kernels import INTERPRETED
    from refusal_kernels.ops.triton_ops import KERNELS as TRITON_KERNELS
    from refusal_kernels.ops.triton_ops import OPS as TRITON_OPS


def _why_not(devices: Sequence[str], device: str, dtype: torch.dtype) -> str | None:
    if device not in devices:
        return f"takes {devices[-1].upper()} tensors, not {device}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None


def _cuda_why_not(device: str, dtype: torch.dtype) -> str | None:
    if not _C.cuda_architectures():
        return "this build has no CUDA kernels"
    return _why_not(("cuda",), device, dtype)


def _triton_why_not(device: str, dtype: torch.dtype) -> str | None:
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if not TRITON_OPS or (device == "cpu" and not INTERPRETED):
        return "runs on a GPU; on a CPU only in Triton's interpreter (TRITON_INTERPRET=1)"
    return _why_not(("cpu", "cuda"), device, dtype)


_COMPILED = {op: getattr(torch.ops.refusal_kernels, op).default for op in autograd.OPS}
_REFERENCE = {op: getattr(reference, autograd.INFERENCE.get(op, op)) for op in autograd.OPS}

BACKENDS: dict[str, Backend] = {}
"""By name, in order of preference; the reference, which serves every call, is the last."""


def register_backend(
    name: str,
    ops: Mapping[str, Callable[..., Any]],
    why_not: Callable[[str, torch.dtype], str | None],
) -> Backend:
    """Add a backend: it serves what none of those before it does, and whatever `use_backend` asks.

    Parameters
    ----------
    name
        Its name for `use_backend` and ``REFUSAL_KERNELS_BACKEND``.
    ops
        Op name to callable, for every name in `autograd.OPS`. Each is an op of PyTorch, or an
        annotated function with the arguments, defaults and results of the op
        ``torch.ops.refusal_kernels.NAME``.
    why_not
        (device type, dtype) to the reason why such a call cannot be served, or None.

    Raises
    ------
    InputError
        If the name is taken, or an op is missing, unknown or of another schema.
    """
    if name in BACKENDS:
        raise InputError(f"there is a backend '{name}' already; expected another name")
    if unlike := sorted(set(ops) ^ set(autograd.OPS)):
        what = "has no op" if unlike[0] in autograd.OPS else "has an unknown op"
        raise InputError(f"the backend '{name}' {what} {unlike[0]}")
    for op, call in ops.items():
        expected = _schema(getattr(torch.ops.refusal_kernels, op).default)
        if (given := _schema(call)) != expected:
            raise InputError(f"{op} of the backend '{name}' is {given}; expected {expected}")
    last = BACKENDS.pop("reference", None)
    backend = BACKENDS[name] = Backend(name, dict(ops), why_not)
    if last is not None:
        BACKENDS["reference"] = last
    _serving.cache_clear()
    return backend


def _schema(call: Callable[..., Any]) -> str:
    """Return the arguments and results of an op; what it writes to does not show in a function."""
    if not isinstance(call, torch._ops.OpOverload):
        call = getattr(call, "_opoverload", call)  # of a triton_op
    if isinstance(call, torch._ops.OpOverload):
        schema = call._schema
    else:
        text = torch.library.infer_schema(call, mutates_args=())
        schema = torch._C.parse_schema("op" + text)
    arguments = ", ".join(
        f"{a.type} {a.name}" + (f"={a.default_value}" if a.has_default_value() else "")
        for a in schema.arguments
    )
    return f"({arguments}) -> ({', '.join(str(r.type) for r in schema.returns)})"


_forced: ContextVar[str | None] = ContextVar("refusal_kernels_backend", default=None)


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise InputError(f"{source}: no backend '{name}'; there are: {', '.join(BACKENDS)}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every op inside the ``with`` by one backend; a call that it cannot serve raises.

    Parameters
    ----------
    name
        A name in `BACKENDS`.

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
        If a backend was asked for by name and cannot serve the call.
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
def _serving(op: str, device: str, dtype: torch.dtype, forced: Any, variable: Any) -> Any:
    """`explain` once for every way to ask: looking costs 4 us, a third of a small call."""
    call = BACKENDS[explain(device=device, dtype=dtype).chosen].ops[op]
    # what an overload's own call hands on to, for a quarter of a microsecond
    return call._op if isinstance(call, torch._ops.OpOverload) else call


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
    return _serving(op, device, x.dtype, _forced.get(), _environment.get(_variable))


def edit_for(op: str, *tensors: torch.Tensor | None) -> Callable[..., Any]:
    """Return the callable for an edit of tensors[0]: without the autograd layer where none asks."""
    x = tensors[0]
    assert x is not None
    if torch.is_grad_enabled():
        for tensor in tensors:  # any() of a generator takes a third of a microsecond longer
            if tensor is not None and tensor.requires_grad:
                return serving(op, x)
    return serving(autograd.FORWARD.get(op, op), x)


register_backend("cpu", _COMPILED, functools.partial(_why_not, ("cpu",)))
register_backend("cuda", _COMPILED, _cuda_why_not)
if TRITON_OPS:
    register_backend("triton", TRITON_OPS, _triton_why_not)
else:  # listed without ops, so that `doctor` can say why
    BACKENDS["triton"] = Backend("triton", {}, _triton_why_not)
register_backend("reference", _REFERENCE, lambda device, dtype: None)

# The public ops on devices without compiled kernels.
autograd.register_kernels("CompositeExplicitAutograd", _REFERENCE)
if TRITON_OPS and not _C.cuda_architectures():
    autograd.register_kernels("CUDA", TRITON_KERNELS)

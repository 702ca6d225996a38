"""Linking a norm to the add before it: the op that adds and steers also returns the normed row.

The site leaves the pair (h, normed) on the link; the norm takes ``normed`` if what it is called
with *is* that h, and otherwise computes. So a link is a hint: a wrong one costs time, never truth.
"""

from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from refusal_kernels import ops
from refusal_kernels.ops.registry import constant

OURS = ("refusal_kernels.", "transformers.")  # whose hooks write to no stream in place
EPSILONS = ("variance_epsilon", "eps", "epsilon", "norm_eps")


class Link:
    """A norm and the pair that the add before it left."""

    def __init__(self, norm: nn.Module, eps: float, offset: float) -> None:
        self.norm = norm  # an RMSNorm; its weight is read at every call, where it is then
        self.eps, self.offset = eps, offset  # as in `ops.rms_norm`
        # the modules, beside the norm, whose hooks may see h before the norm does
        self.between: tuple[nn.Module, ...] = ()
        # (h, normed, `version` of h)
        self.pending: tuple[Tensor, Tensor, int | None] | None = None

    def take(self, x: Tensor) -> Tensor | None:
        """Return the norm of x if the add before has left it, and forget it."""
        pending, self.pending = self.pending, None
        if pending is None or pending[0] is not x:
            return None
        # written to in between, it would be the same tensor with other numbers
        written = self.hooked() if pending[2] is None else pending[2] != x._version
        return None if written else pending[1]

    @constant
    def hooked(self) -> bool:
        """Whether a module that sees h before the norm does has hooks that might write to it.

        Asked once for a compiled graph, which would look at every one of the modules at every call;
        and which by PyTorch's default does not see a hook that comes later anyway.
        """
        return _hooked((self.norm, *self.between))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pending": None}


def version(x: Tensor) -> int | None:
    """How often a tensor has been written to; None where PyTorch does not count that."""
    if torch.compiler.is_compiling() or x.is_inference():
        return None
    return x._version


def is_plain(weight: Any, x: Tensor | None = None) -> TypeGuard[Tensor]:
    """Whether a kernel can read a weight (no DTensor, nor quantized), here together with x."""
    if type(weight) is not nn.Parameter and type(weight) is not Tensor:
        return False
    # of two dtypes a norm may return either
    return x is None or (weight.device == x.device and weight.dtype is x.dtype)


def _hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether any module carries hooks that might write to what they see."""
    for module in modules:
        if module._forward_pre_hooks or module._forward_hooks:
            hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
            for hook in hooks:
                if not (getattr(hook, "__module__", None) or "").startswith(OURS):
                    return True
    return False


class _Linked:
    """What a linked norm does; stands before the norm's own class."""

    rk_link: Link
    weight: Tensor

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        link = self.rk_link
        normed = link.take(hidden_states)
        # a reentrant gradient checkpoint runs the add without gradients, this norm with them
        if normed is not None and not torch.is_grad_enabled():
            return normed
        weight: Any = self.weight
        free = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if args or kwargs or not free or not is_plain(weight, hidden_states):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        return ops.rms_norm(hidden_states, weight, link.eps, link.offset)


def _reduce(self: Any, protocol: Any) -> Any:  # for copy.deepcopy and pickle
    return _rebuild, (type(self).__mro__[2],), self.__dict__.copy()


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    return nn.Module.__new__(linked_class(cls))


_LINKED: dict[type, type] = {}


def unlinked_class(cls: type) -> type | None:
    """Return the class that a linked one was made of; None for any other."""
    return next((plain for plain, linked in _LINKED.items() if linked is cls), None)


def linked_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of a norm's class that takes what its link holds."""
    if cls not in _LINKED:
        body = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__reduce_ex__": _reduce}
        _LINKED[cls] = type(f"Linked{cls.__name__}", (_Linked, cls), body)
    return _LINKED[cls]


def link_of(norm: Any, hidden: int) -> Link | None:
    """Return a link if this module is an RMSNorm over the hidden size, as a trial shows; or None.

    The trial is the module's own forward on two random rows, against ``ops.rms_norm`` with weight
    and with 1 + weight (Gemma).
    """
    if not isinstance(norm, nn.Module):
        return None
    weight = getattr(norm, "weight", None)
    eps = next((getattr(norm, e) for e in EPSILONS if hasattr(norm, e)), None)
    parameters = [*norm._parameters.values(), *norm._buffers.values()]
    if (
        not is_plain(weight)
        or weight.shape != (hidden,)
        or weight.is_meta
        or not isinstance(eps, float)
        or sum(p is not None for p in parameters) != 1  # a bias
        or any(norm._modules.values())
        or "forward" in norm.__dict__  # accelerate's or the kernels library's
    ):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, hidden, generator=generator).to(weight)
    tolerance = 8 * torch.finfo(x.dtype).eps
    with torch.no_grad():
        try:
            want = type(norm).forward(norm, x).double()
        except Exception:  # it takes more than the stream
            return None
        if want.shape != x.shape:
            return None
        for offset in (0.0, 1.0):
            gain = weight.double() + offset
            scale = (x.double().pow(2).mean(-1, keepdim=True) + eps).rsqrt()
            error = (want - x.double() * scale * gain).abs().max()
            if error <= tolerance * want.abs().max():
                return Link(norm, eps, offset)
    return None

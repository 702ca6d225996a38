"""Follow a forward pass: which parameters write what is added to the residual stream.

A tensor is *clean given W*, a set of parameters, if removing a direction r from those parameters,
each along one axis, removes r from every row of the tensor and changes nothing else about it. A
parameter whose axis is the last one of a view is clean given itself; a product ``a @ b`` is clean
as b is; sums, rows picked, and rows scaled by what does not depend on W keep it; anything else
(a norm, a gain per channel, a gate) ends it. What a steered site returns is clean given nothing.

The rules are checked op by op as the model runs, below all of its Python, so no layout, family or
kind of expert is known here.
"""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from refusal_kernels.patching.places import base_class
from refusal_kernels.patching.site import Site
from refusal_kernels.weights.dims import (
    TURNS,
    index_spares_last,
    last_stays,
    touches_last,
    view_axes,
)

Source = tuple[str, int]
"""A parameter's name and the axis of it that lies along the stream."""

_NONE: frozenset[Any] = frozenset()

# The rows stay the rows: only how they are arranged changes, or their dtype.
_ROWS = frozenset(
    """view _unsafe_view reshape unsqueeze squeeze expand clone _to_copy detach alias lift_fresh
    repeat""".split()
)
# Acts along one dimension, or several, which must not be the last.
_ALONG = frozenset(
    """select slice split split_with_sizes unbind cat stack sum mean index_select
    narrow""".split()
)
_VIEWS = (_ROWS | _ALONG | TURNS | {"index"}) - {"sum", "mean", "cat", "stack"}
_PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "matmul": (0, 1), "_grouped_mm": (0, 1)} | {
    "addmm": (1, 2),
    "baddbmm": (1, 2),
}
_ZEROS = frozenset("zeros zeros_like new_zeros empty empty_like new_empty".split())
_SHAPED = _ZEROS | frozenset("ones_like new_ones full_like new_full".split())  # read no numbers
_INTO = {"index_add": 3, "index_put": 2, "index_copy": 3, "scatter_add": 3, "copy": 1}


@dataclass(frozen=True)
class Value:
    """What is known of a tensor.

    Attributes
    ----------
    writes
        It is clean given these; None if that is not so.
    depends
        The parameters that it was computed from since the last site, by name.
    axes
        Of a view of a parameter: for every dimension the parameter's axis, or None.
    why
        What ended it being clean.
    """

    writes: frozenset[Source] | None = None
    depends: frozenset[str] = _NONE
    axes: tuple[int | None, ...] | None = None
    why: str = ""


@dataclass(frozen=True)
class Written:
    """What reached a steered site: both terms of the sum."""

    name: str
    branch: Value
    stream: Value


class Flow(TorchDispatchMode):
    """Follows tensors while a patched model runs; parameters may be on the meta device.

    With parameters on meta no weight takes memory: what is computed from one is drawn at random, in
    the right shape, so that experts are chosen and masks are made as in a real pass.

    Parameters
    ----------
    model
        The patched model, in eval mode.
    hidden
        The width of the stream.

    Attributes
    ----------
    sites : list of Written
        In the order in which they ran.
    touched : set of str
        The parameters that took part.
    leaks : dict of str to str
        For every parameter that was also used in another way, where.
    """

    def __init__(self, model: nn.Module, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.sites: list[Written] = []
        self.touched: set[str] = set()
        self.leaks: dict[str, str] = {}
        self._head = getattr(model, "get_output_embeddings", lambda: None)()
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._values: MutableMapping[Tensor, Value] = WeakTensorKeyDictionary()
        self._storages: dict[int, list[TensorWeakRef]] = {}
        self._where: list[tuple[str, nn.Module]] = []
        self._hooks: list[Any] = []
        self._inside_a_site = False
        self._model = model
        for name, parameter in model.named_parameters():
            axes = tuple(range(parameter.ndim))
            self._note(parameter, self._parameter(name, axes, parameter.shape))
        for name, buffer in model.named_buffers():
            self._note(buffer, Value(why=f"{name}, which is no parameter"))

    def __enter__(self) -> "Flow":
        for name, module in self._model.named_modules():
            enter = module.register_forward_pre_hook(self._entering(name), prepend=True)
            leave = module.register_forward_hook(self._leaving, always_call=True)
            self._hooks += [enter, leave]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()
        self._values.clear()
        self._storages.clear()

    def _entering(self, name: str) -> Callable[..., None]:
        return lambda module, args: self._where.append((name, module))

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._where and self._where[-1][1] is module:
            self._where.pop()

    # --- the sites

    @contextmanager
    def through(self, sites: Sequence[Site]) -> Iterator[None]:
        """Note what reaches these sites, while inside, whatever serves them."""
        flow = self

        class Followed(Site):
            def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
                return flow._at_site(super().__call__, self.name, x, residual)

        for site in sites:
            site.__class__ = Followed
        try:
            yield
        finally:
            for site in sites:
                site.__class__ = Site

    def _at_site(
        self, call: Callable[..., Tensor], name: str, x: Tensor, residual: Tensor | None
    ) -> Tensor:
        if self._inside_a_site:  # several streams side by side: the site calls itself
            return call(x, residual)
        stream = Value(_NONE) if residual is None else self.value(residual)
        self.sites.append(Written(name, self.value(x), stream))
        self._inside_a_site = True
        try:
            h = call(x, residual)
        finally:
            self._inside_a_site = False
        self._note(h, Value(_NONE))
        return h

    # --- what is known

    def value(self, tensor: Any) -> Value:
        """Return what is known of an argument; of what was never seen, nothing."""
        return self._values.get(tensor, Value()) if isinstance(tensor, Tensor) else Value()

    def _note(self, tensor: Tensor, value: Value) -> None:
        self._values[tensor] = value
        if not tensor.is_meta:
            memory = tensor.untyped_storage().data_ptr()
            self._storages.setdefault(memory, []).append(TensorWeakRef(tensor))

    def _parameter(self, name: str, axes: tuple[int | None, ...], shape: Sequence[int]) -> Value:
        """Return the value of a view of a parameter."""
        axis = axes[-1] if axes else None
        whole = axis is not None and self._shapes[name][axis] == shape[-1] == self.hidden
        writes = frozenset({(name, axis)}) if whole else None
        return Value(writes, frozenset({name}), axes)  # type: ignore[arg-type]

    def _rows(self, tensor: Any) -> bool:
        """Whether the last dimension is the stream's, or several streams side by side."""
        return isinstance(tensor, Tensor) and tensor.ndim > 0 and not tensor.shape[-1] % self.hidden

    # --- the ops

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        result = self._run(func, name, args, kwargs)
        if self._inside_a_site:
            return result
        in_place = func._schema.is_mutable
        inputs = [t for t in _tensors((args, kwargs))]
        known = [self.value(t) for t in inputs]
        for value in known:
            if value.axes is not None:
                self.touched |= value.depends
        for out in _tensors(result):
            made = self._outcome(name.rstrip("_"), args, kwargs, out)
            if made is None:
                depends = _NONE.union(*(v.depends for v in known))
                made = Value(None, depends, None, self._why(name, known))
            if made.axes is None and name not in _SHAPED:
                for value in known:
                    carried = (value.writes or _NONE) <= (made.writes or _NONE)
                    if not carried or (value.axes is not None and not value.writes):
                        self._leak(value)
            if in_place:
                self._overwritten(out, made)
            self._note(out, made)
        return result

    def _run(self, func: Any, name: str, args: tuple, kwargs: dict) -> Any:
        tensors = list(_tensors((args, kwargs)))
        if not any(t.is_meta for t in tensors):
            return func(*args, **kwargs)
        if func._schema.is_mutable:  # its numbers do not matter
            return kwargs.get("out", args[0])
        if name == "_to_copy":  # to where the rows are: there is nothing to move
            kwargs = {key: value for key, value in kwargs.items() if key != "device"}

        if name == "_grouped_mm":  # on meta it takes bfloat16 alone
            rows, experts = args[:2]
            return torch.randn((*rows.shape[:-1], experts.shape[-1])).to(rows.dtype)

        def meta(value: Any) -> Any:
            return value.to("meta") if isinstance(value, Tensor) else value

        result = func(*tree_map(meta, args), **tree_map(meta, kwargs))
        if name in _VIEWS and all(t.is_meta for t in tensors if t.is_floating_point()):
            return result

        def drawn(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if not value.is_floating_point():
                return torch.zeros(value.shape, dtype=value.dtype)
            return torch.randn(value.shape, dtype=torch.float32).to(value.dtype)

        return tree_map(drawn, result)

    def _outcome(self, name: str, args: tuple, kwargs: dict, out: Tensor) -> Value | None:
        """Return what is known of a result; None where the op ends all knowledge."""
        if name in _SHAPED:
            return Value(_NONE if name in _ZEROS and self._rows(out) else None)
        if name in _PRODUCTS or name == "linear":
            return self._product(name, args)
        several = args and isinstance(args[0], list | tuple) and args[0]
        first = self.value(args[0][0] if several else args[0] if args else None)
        if name in _VIEWS and first.axes is not None:
            (parameter,) = first.depends
            axes = view_axes(name, args, first.axes, out)
            return self._parameter(parameter, axes, out.shape) if axes else None
        if not self._rows(out) or not out.is_floating_point():
            return None
        if name == "embedding":
            return Value(first.writes, first.depends)
        if name in ("add", "sub") and isinstance(args[1], Tensor):
            return self._union(args[0], args[1])
        if name == "add" and args[1] == 0:
            return Value(first.writes, first.depends, None, first.why)
        if name in ("mul", "div"):
            return self._scaled(name, args)
        if name in _INTO:
            return self._union(args[0], args[_INTO[name]]) if _into_rows(name, args) else None
        if name == "where":
            return self._picked(args)
        if name == "masked_fill":
            zero = not isinstance(args[2], Tensor) and args[2] == 0
            return self._scaled("mul", (args[0], args[1])) if zero else None
        if name in ("cat", "stack") and not touches_last(name, args, kwargs):
            return self._union(*args[0])
        keeps = (
            name in _ROWS
            or name == "neg"
            or (name in TURNS and last_stays(name, args))
            or (name in _ALONG - {"cat", "stack"} and not touches_last(name, args, kwargs))
            or (name == "index" and index_spares_last(args))
        )
        if keeps and self._rows(args[0]):
            return Value(first.writes, first.depends, None, first.why)
        return None

    def _product(self, name: str, args: tuple) -> Value | None:
        if name == "linear":
            weight = self.value(args[1])
            if weight.axes is None:
                return None
            (parameter,) = weight.depends
            axes = (weight.axes[1], weight.axes[0])
            right = self._parameter(parameter, axes, args[1].shape[::-1])
            left, bias = self.value(args[0]), args[2] if len(args) > 2 else None
        else:
            a, b = _PRODUCTS[name]
            left, right, bias = self.value(args[a]), self.value(args[b]), args[0] if a else None
        if right.writes is None or left.depends & _names(right.writes):
            return None
        depends, writes = left.depends | right.depends, right.writes
        if bias is not None:
            own = self.value(bias)
            if own.writes is None:
                return None
            depends, writes = depends | own.depends, writes | own.writes
        return Value(writes, depends)

    def _union(self, *tensors: Any) -> Value | None:
        values = [self.value(t) for t in tensors]
        if not all(
            self._rows(t) and v.writes is not None for t, v in zip(tensors, values, strict=True)
        ):
            return None
        return Value(
            _NONE.union(*(v.writes or _NONE for v in values)),
            _NONE.union(*(v.depends for v in values)),
        )

    def _scaled(self, name: str, args: tuple) -> Value | None:
        """Rows times a number each, which must not depend on what wrote them."""
        pairs = [(args[0], args[1]), (args[1], args[0])][: 1 if name == "div" else 2]
        for rows, factor in pairs:
            value = self.value(rows)
            if value.writes is None or not self._rows(rows):
                continue
            if not isinstance(factor, Tensor):
                return Value(value.writes, value.depends)
            depends = self.value(factor).depends
            if _same_along_rows(factor) and not depends & _names(value.writes):
                return Value(value.writes, value.depends | depends)
        return None

    def _picked(self, args: tuple) -> Value | None:
        made = self._union(args[1], args[2])
        depends = self.value(args[0]).depends
        if made is None or not _same_along_rows(args[0]) or depends & _names(made.writes):
            return None
        return Value(made.writes, made.depends | depends)

    def _overwritten(self, out: Tensor, made: Value) -> None:
        """Let whatever shares memory with a tensor written in place know of it."""
        memory = out.untyped_storage().data_ptr()
        for reference in self._storages.pop(memory, ()):
            tensor = reference()
            if tensor is None or tensor.untyped_storage().data_ptr() != memory:
                continue
            value = self.value(tensor)
            both = value.writes is not None and made.writes is not None and self._rows(tensor)
            writes = (value.writes or _NONE) | (made.writes or _NONE) if both else None
            merged = Value(writes, value.depends | made.depends, None, value.why or made.why)
            self._note(tensor, merged)

    # --- words

    def _leak(self, value: Value) -> None:
        names = _names(value.writes) if value.axes is None else value.depends
        if self._where and self._where[-1][1] is self._head:
            return  # a tied head is untied
        for name in names:
            self.leaks.setdefault(name, self._place())

    def _place(self) -> str:
        if not self._where or not self._where[-1][0]:
            return "the model's own forward"
        name, module = self._where[-1]
        return f"{name} ({base_class(module).__name__})"

    def _why(self, name: str, known: list[Value]) -> str:
        """Return the first thing that ended what was clean, of all that came together here."""
        clean = [v for v in known if v.writes is not None and v.axes is None]
        earlier = [v.why for v in known if v.writes is None and v.why]
        if earlier and (not clean or name.strip("_") in ("add", "cat", *_INTO)):
            return earlier[0]  # a sum is as its worst term
        return f"{self._place()}, {name.strip('_')}" if clean else ""


def _names(writes: frozenset[Source] | None) -> frozenset[str]:
    return frozenset(name for name, _ in writes or ())


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _into_rows(name: str, args: tuple) -> bool:
    """Whether an op puts whole rows into a tensor."""
    if name == "copy":
        return True
    if name == "index_put":
        return index_spares_last(args)
    spared = args[1] % args[0].ndim != args[0].ndim - 1
    return spared and (name != "scatter_add" or _same_along_rows(args[2]))


def _same_along_rows(factor: Any) -> bool:
    """Whether a factor is one number per row."""
    return factor.ndim == 0 or factor.shape[-1] == 1 or factor.stride(-1) == 0

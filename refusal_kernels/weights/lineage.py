"""Track which parameters each tensor of a forward pass is clean given.

A tensor is *clean given W*, a set of parameters, if removing a direction r from those parameters,
each along one axis, removes r from every row of the tensor and changes nothing else about it. A
parameter whose axis is the last one of a view is clean given itself; a product ``a @ b`` is clean
as b is; sums, rows picked, and rows scaled by what does not depend on W keep it; anything else
(a norm, a gain per channel, a gate) ends it.
"""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from refusal_kernels.weights.aten_dims import (
    TURNS,
    index_spares_last,
    last_stays,
    touches_last,
    view_axes,
)

WriterAxis = tuple[str, int]
"""A parameter's name and the axis of it that lies along the stream."""

NOTHING: frozenset[Any] = frozenset()

# These keep every row; they change the arrangement or the dtype.
_ROWS = frozenset(
    """view _unsafe_view reshape unsqueeze squeeze expand clone _to_copy detach alias lift_fresh
    repeat""".split()
)
# These act along dimensions that must not include the last.
_ALONG = frozenset(
    """select slice split split_with_sizes unbind cat stack sum mean index_select
    narrow""".split()
)
VIEWS = (_ROWS | _ALONG | TURNS | {"index"}) - {"sum", "mean", "cat", "stack"}
_PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "matmul": (0, 1), "_grouped_mm": (0, 1)} | {
    "addmm": (1, 2),
    "baddbmm": (1, 2),
}
_ZEROS = frozenset("zeros zeros_like new_zeros empty empty_like new_empty".split())
SHAPED = _ZEROS | frozenset("ones_like new_ones full_like new_full".split())  # read no numbers
INTO = {"index_add": 3, "index_put": 2, "index_copy": 3, "scatter_add": 3, "copy": 1}


@dataclass(frozen=True)
class Lineage:
    """What is known of a tensor."""

    writes: frozenset[WriterAxis] | None = None  # it is clean given these; None: it is not clean
    depends: frozenset[str] = NOTHING  # the parameters it was computed from since the last site
    axes: tuple[int | None, ...] | None = None  # of a parameter's view: the axis of each dimension
    why: str = ""  # the operation that ended it being clean


class Lineages:
    """The lineage of every tensor of a forward pass, and how an op makes new ones."""

    def __init__(self, model: nn.Module, hidden: int) -> None:
        self.hidden = hidden
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._known: MutableMapping[Tensor, Lineage] = WeakTensorKeyDictionary()
        self._storages: dict[int, list[TensorWeakRef]] = {}
        for name, parameter in model.named_parameters():
            axes = tuple(range(parameter.ndim))
            self.note(parameter, self._parameter(name, axes, parameter.shape))
        for name, buffer in model.named_buffers():
            self.note(buffer, Lineage(why=f"{name}, which is no parameter"))

    def clear(self) -> None:
        """Forget every tensor."""
        self._known.clear()
        self._storages.clear()

    def lineage(self, tensor: Any) -> Lineage:
        """Return what is known of an argument; nothing if it is unknown."""
        return self._known.get(tensor, Lineage()) if isinstance(tensor, Tensor) else Lineage()

    def note(self, tensor: Tensor, value: Lineage) -> None:
        """Keep what is known of a tensor."""
        self._known[tensor] = value
        if not tensor.is_meta:
            memory = tensor.untyped_storage().data_ptr()
            self._storages.setdefault(memory, []).append(TensorWeakRef(tensor))

    def _parameter(self, name: str, axes: tuple[int | None, ...], shape: Sequence[int]) -> Lineage:
        """Return the value of a view of a parameter."""
        axis = axes[-1] if axes else None
        whole = axis is not None and self._shapes[name][axis] == shape[-1] == self.hidden
        writes = frozenset({(name, axis)}) if whole else None
        return Lineage(writes, frozenset({name}), axes)  # type: ignore[arg-type]

    def is_rows(self, tensor: Any) -> bool:
        """Whether the last dimension is the stream's, or several streams side by side."""
        return isinstance(tensor, Tensor) and tensor.ndim > 0 and not tensor.shape[-1] % self.hidden

    def outcome(self, name: str, args: tuple, kwargs: dict, out: Tensor) -> Lineage | None:
        """Return what is known of a result; None where the op ends all knowledge."""
        if name in SHAPED:
            return Lineage(NOTHING if name in _ZEROS and self.is_rows(out) else None)
        if name in _PRODUCTS or name == "linear":
            return self._product(name, args)
        several = args and isinstance(args[0], list | tuple) and args[0]
        first = self.lineage(args[0][0] if several else args[0] if args else None)
        if name in VIEWS and first.axes is not None:
            (parameter,) = first.depends
            axes = view_axes(name, args, first.axes, out)
            return self._parameter(parameter, axes, out.shape) if axes else None
        if not self.is_rows(out) or not out.is_floating_point():
            return None
        if name == "embedding":
            return Lineage(first.writes, first.depends)
        if name in ("add", "sub") and isinstance(args[1], Tensor):
            return self._union(args[0], args[1])
        if name == "add" and args[1] == 0:
            return Lineage(first.writes, first.depends, None, first.why)
        if name in ("mul", "div"):
            return self._scaled(name, args)
        if name in INTO:
            return self._union(args[0], args[INTO[name]]) if _into_rows(name, args) else None
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
        if keeps and self.is_rows(args[0]):
            return Lineage(first.writes, first.depends, None, first.why)
        return None

    def _product(self, name: str, args: tuple) -> Lineage | None:
        if name == "linear":
            weight = self.lineage(args[1])
            if weight.axes is None:
                return None
            (parameter,) = weight.depends
            axes = (weight.axes[1], weight.axes[0])
            right = self._parameter(parameter, axes, args[1].shape[::-1])
            left, bias = self.lineage(args[0]), args[2] if len(args) > 2 else None
        else:
            a, b = _PRODUCTS[name]
            left, right, bias = self.lineage(args[a]), self.lineage(args[b]), args[0] if a else None
        if right.writes is None or left.depends & writer_names(right.writes):
            return None
        depends, writes = left.depends | right.depends, right.writes
        if bias is not None:
            added = self.lineage(bias)
            if added.writes is None:
                return None
            depends, writes = depends | added.depends, writes | added.writes
        return Lineage(writes, depends)

    def _union(self, *tensors: Any) -> Lineage | None:
        values = [self.lineage(t) for t in tensors]
        if not all(
            self.is_rows(t) and v.writes is not None for t, v in zip(tensors, values, strict=True)
        ):
            return None
        return Lineage(
            NOTHING.union(*(v.writes or NOTHING for v in values)),
            NOTHING.union(*(v.depends for v in values)),
        )

    def _scaled(self, name: str, args: tuple) -> Lineage | None:
        """Rows times a number each, which must not depend on what wrote them."""
        pairs = [(args[0], args[1]), (args[1], args[0])][: 1 if name == "div" else 2]
        for rows, factor in pairs:
            value = self.lineage(rows)
            if value.writes is None or not self.is_rows(rows):
                continue
            if not isinstance(factor, Tensor):
                return Lineage(value.writes, value.depends)
            depends = self.lineage(factor).depends
            if _same_along_rows(factor) and not depends & writer_names(value.writes):
                return Lineage(value.writes, value.depends | depends)
        return None

    def _picked(self, args: tuple) -> Lineage | None:
        made = self._union(args[1], args[2])
        depends = self.lineage(args[0]).depends
        if made is None or not _same_along_rows(args[0]) or depends & writer_names(made.writes):
            return None
        return Lineage(made.writes, made.depends | depends)

    def overwrite(self, out: Tensor, made: Lineage) -> None:
        """Update all tensors that share memory with a tensor written in place."""
        memory = out.untyped_storage().data_ptr()
        for reference in self._storages.pop(memory, ()):
            tensor = reference()
            if tensor is None or tensor.untyped_storage().data_ptr() != memory:
                continue
            value = self.lineage(tensor)
            both = value.writes is not None and made.writes is not None and self.is_rows(tensor)
            writes = (value.writes or NOTHING) | (made.writes or NOTHING) if both else None
            merged = Lineage(writes, value.depends | made.depends, None, value.why or made.why)
            self.note(tensor, merged)


def writer_names(writes: frozenset[WriterAxis] | None) -> frozenset[str]:
    """Return the names of the parameters."""
    return frozenset(name for name, _ in writes or ())


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

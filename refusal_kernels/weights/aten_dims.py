"""Which dimensions the ops that arrange a tensor act along: names and arguments are aten's."""

import torch
from torch import Tensor

TURNS = frozenset("t transpose permute".split())
_SAME_AXES = frozenset(
    """clone _to_copy detach alias lift_fresh slice split split_with_sizes narrow
    index_select""".split()
)


def acts_along(name: str, args: tuple, kwargs: dict) -> tuple[list[int], int]:
    """Return the dimensions that an op acts along, and how many there are."""
    tensor = args[0][0] if isinstance(args[0], list | tuple) else args[0]
    place = 2 if name in ("split", "split_with_sizes") else 1
    given = args[place] if len(args) > place else kwargs.get("dim", 0)
    count = tensor.ndim + (name == "stack")
    if name in ("sum", "mean") and (len(args) < 2 or not given):
        return list(range(count)), count
    return [d % count for d in (given if isinstance(given, list | tuple) else [given])], count


def touches_last(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether an op acts along the last dimension."""
    dims, count = acts_along(name, args, kwargs)
    return count - 1 in dims


def order(name: str, args: tuple) -> list[int]:
    """Return where each dimension of a turned tensor comes from."""
    count = args[0].ndim
    dims = list(range(count))
    if name == "t":
        return dims[::-1]
    if name == "permute":
        return [d % count for d in args[1]]
    a, b = args[1] % count, args[2] % count
    dims[a], dims[b] = dims[b], dims[a]
    return dims


def last_stays(name: str, args: tuple) -> bool:
    """Whether a turned tensor's last dimension was the last before."""
    return order(name, args)[-1] == args[0].ndim - 1


def index_spares_last(args: tuple) -> bool:
    """Whether indexing by tensors picks whole rows."""
    used = [1 if i is None or i.dtype not in (torch.bool, torch.uint8) else i.ndim for i in args[1]]
    return sum(used) < args[0].ndim or (sum(used) == args[0].ndim and args[1][-1] is None)


def view_axes(
    name: str, args: tuple, axes: tuple[int | None, ...], out: Tensor
) -> tuple[int | None, ...] | None:
    """Return which axis of a parameter each dimension of a new view of it is."""
    tensor = args[0]
    if name in TURNS:
        return tuple(axes[d] for d in order(name, args))
    if name == "index_select" and touches_last(name, args, {}):
        return (None,) * out.ndim
    if name in _SAME_AXES:
        return axes
    if name in ("select", "unbind"):
        dims, _ = acts_along(name, args, {})
        return tuple(axis for d, axis in enumerate(axes) if d != dims[0])
    if name == "index" and not index_spares_last(args):
        return (None,) * out.ndim
    # the last dimension is the same one if it is as long as before
    same = tensor.ndim > 0 and out.ndim > 0 and out.shape[-1] == tensor.shape[-1]
    return (None,) * (out.ndim - 1) + ((axes[-1],) if same else (None,)) if out.ndim else ()

"""`patch`: interventions meet the places of a model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from refusal_kernels.errors import InputError
from refusal_kernels.hf.model import decoder_layers, hidden_size, tokens_first
from refusal_kernels.interventions import Intervention
from refusal_kernels.patching.handle import PatchHandle, copied, is_patched
from refusal_kernels.patching.places import FUSED, HOOK, Place, places
from refusal_kernels.patching.route import Route, TokensFirst
from refusal_kernels.patching.site import Site, SiteProgram


def patch(
    model: Any,
    *interventions: Intervention | Sequence[Intervention],
    fuse_norms: bool = True,
    fused: bool = False,
) -> PatchHandle:
    """Steer a Hugging Face causal language model in place, until the handle is removed.

    An intervention without further settings acts on what enters the first block and at every
    residual add, so on everything that is ever written into the stream. With ``block_input=l`` it
    acts at the input of block l alone: at the add that ends block l - 1, or on what enters block 0.

    Parameters
    ----------
    model
        A decoder-only transformers model of any family (docs/families.md).
    interventions
        One or more, which compose: those that meet at one place read the same stream and act
        together. Or sequences of them: each is a program of its own, all rows of a batch take
        program 0, and `PatchHandle.route` sends each row to one.
    fuse_norms
        Fuse the RMSNorm that reads an add into it. The stream keeps its bits; the norm is
        computed from the unrounded sum, so that logits differ from the model's own in the last
        place. Without it, strength 0 gives the unpatched model's logits bit for bit. Where a
        gradient may be wanted (outside torch.no_grad and inference_mode) no norm is fused.
    fused
        Refuse a model where an add of a block can only be steered by a hook, exactly but at a pass
        of its own. The embedding, which is no add, is always steered by a hook.

    Returns
    -------
    PatchHandle
        With ``strength``, ``route()``, ``scores()``, ``report()``, ``watch()`` and ``remove()``;
        also a context manager.

    Raises
    ------
    InputError
        If the model has no residual stream that is understood (where the adds of a block are not
        found, its input can still be steered), a hidden size or layer does not fit, several
        directions at one place are not orthonormal, an intervention meets no place, a hook is
        needed against ``fused``, or the model is patched already. The model is untouched then.

    Examples
    --------
    >>> with rk.patch(model, rk.Ablate(direction)) as handle:  # doctest: +SKIP
    ...     model.generate(**inputs)
    ...     handle.strength = 0.5
    """
    programs = copied(_programs(interventions))
    written = places(model, norms=fuse_norms)
    _check(model, programs, written)
    kind = TokensFirst if tokens_first(decoder_layers(model)[0]) else Route
    route = kind(len(programs))
    groups: dict[tuple[tuple[int, ...], ...], SiteProgram] = {}
    met: set[int] = set()
    steered: list[tuple[Place, Site]] = []
    plain: list[Place] = []
    for place in written:
        here = [[i for i in program if _meets(i, place)] for program in programs]
        key = tuple(tuple(id(i) for i in members) for members in here)
        met.update(i for members in key for i in members)
        if not any(key):
            plain.append(place)
            continue
        if key not in groups:
            groups[key] = SiteProgram(here, route)
        path = HOOK if place.add is None else FUSED
        if fused and path == HOOK and place.block is not None:
            raise InputError(
                f"{place.name} of {type(model).__name__} can only be steered by a hook, not fused "
                "into an add; expected a family that docs/families.md calls fused, or fused=False"
            )
        site = Site(place.name, path, groups[key], _like(place.module))
        steered.append((place, site))
    for program in programs:
        for i in program:
            if id(i) not in met:
                raise InputError(f"{type(i).__name__}: no place of the model is at {_where(i)}")
    return PatchHandle(model, programs, steered, plain, route)


def _programs(given: Sequence[Any]) -> list[tuple[Intervention, ...]]:
    """Return the programs of a call: one of all interventions, or one for each sequence."""
    if given and all(isinstance(i, Intervention) for i in given):
        return [tuple(given)]
    sequences = bool(given) and all(isinstance(p, list | tuple) and p for p in given)
    if sequences and all(isinstance(i, Intervention) for p in given for i in p):
        return [tuple(p) for p in given]
    names = ", ".join(type(i).__name__ for i in given) or "nothing"
    raise InputError(
        "patch takes interventions such as Ablate(direction), or sequences of them; got " + names
    )


def _check(
    model: nn.Module, programs: tuple[tuple[Intervention, ...], ...], written: list[Place]
) -> None:
    """Refuse what cannot work, before anything is changed."""
    if is_patched(model):
        raise InputError(
            "the model is patched already: remove that patch (handle.remove(), or "
            "rk.unpatch(model)), or give all interventions to one"
        )
    layers, hidden = len(decoder_layers(model)), hidden_size(model)
    for i in (i for program in programs for i in program):
        if i.hidden != hidden:
            raise InputError(f"the direction has hidden size {i.hidden}; the model has {hidden}")
        for number in (i.block_input, *(i.layers or ())):
            if number is not None and not 0 <= number < layers:
                raise InputError(f"block {number} is not there; the model has {layers} blocks")
    for place in written:
        state = place.module.__dict__  # where accelerate wraps a forward, it leaves the class's own
        wrapped = getattr(state.get("_old_forward"), "__func__", None) is type(place.module).forward
        if place.add is not None and "forward" in state and not wrapped:
            raise InputError(
                f"layer {place.block} carries a forward of its own (kernelize, or set by hand), "
                "which a patch of its class would not reach; patch the model before that is set"
            )


def _meets(i: Intervention, place: Place) -> bool:
    """Whether an intervention acts at a place; where a block cannot be read, at its end alone."""
    if not place.unread:
        return i.meets(place.block, place.writers, place.feeds)
    inside = i.every_site or {"attn", "mlp", "add"} & set(i.sites or ())
    if inside and (i.layers is None or place.block in i.layers):
        raise InputError(
            place.unread + "; only the inputs of blocks can be steered there (block_input=..., "
            'or sites=["block_input"])'
        )
    return i.meets_input(place.feeds)


def _like(module: nn.Module) -> torch.Tensor:
    """Return an empty tensor with the dtype and device of a module's weights."""
    for p in (*module.parameters(), *module.buffers()):
        if p.is_floating_point() and p.dtype.itemsize > 1 and not p.is_meta:
            return torch.empty(0, dtype=p.dtype, device=p.device)
    return torch.empty(0)


def _where(i: Intervention) -> str:
    if i.block_input is not None:
        return f"the input of block {i.block_input}"
    layers = f"layers {list(i.layers)}" if i.layers else "all layers"
    return f"sites {i.sites or 'any'} of {layers}"

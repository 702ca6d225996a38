"""Where a model's stream is written: every add of every layer, found before anything is changed."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from refusal_kernels.errors import InputError
from refusal_kernels.hf.model import decoder, decoder_layers, hidden_size
from refusal_kernels.patching.families import NEXT, family_of
from refusal_kernels.patching.norm_links import Link, link_of
from refusal_kernels.patching.rewrite import SITES_ATTRIBUTE, Steered, steered

FUSED, HOOK = "fused", "hook"


@dataclass
class Place:
    """One place where the stream is written."""

    name: str  # "embed", or "layers.3.attn" and the like
    module: nn.Module  # whose forward adds, or whose input or output is hooked
    add: int | None  # the number of the add in the module's rewritten forward; None for a hook
    stream: str | None = None  # the parameter of that forward that is the stream, see `steered`
    # as `Intervention.meets` takes them
    block: int | None = None
    writers: frozenset[str] = frozenset()
    feeds: int | None = None
    # whether what the next module is called with is what was written, the very tensor
    passed_on: bool = True
    on_input: bool = False  # for a hook: whether it acts on the module's input, not on its output
    link: Link | None = field(default=None, repr=False)  # the norm that reads what is written here
    unread: str = ""  # why the block's adds were not found: only what it returns can be steered


def places(model: Any, *, norms: bool = True) -> list[Place]:
    """Return every place where the stream of a model is written, in the order of the forward.

    Parameters
    ----------
    norms
        Link every add to the RMSNorm that reads it.

    Raises
    ------
    InputError
        If the model has no list of layers, or a layer has no residual stream; with the class and
        the reason.
    """
    layers = decoder_layers(model)
    written: list[Place] = [_start(layers[0])]
    readers: list[list[nn.Module]] = [[]]  # for every place, who reads it, as far as is known
    pending = 0  # the place whose reader is the next layer's
    for number, layer in enumerate(layers):
        first = len(written)
        opening: list[nn.Module] = []
        after = layers[number + 1] if number + 1 < len(layers) else None
        for place, of_place, of_input in _in_layer(number, layer, after):
            opening = opening or (of_input if len(written) == first else [])
            written.append(place)
            readers.append(of_place)
        if written[pending].passed_on:
            readers[pending] += opening
        written[pending].feeds = number
        pending = len(written) - 1
    if written[pending].passed_on:
        readers[pending] += _final_norms(model, layers)
    if norms:
        hidden = hidden_size(model)
        links: dict[nn.Module, Link | None] = {}
        for place, candidates in zip(written, readers, strict=True):
            for norm in candidates[:1]:
                if norm not in links:
                    links[norm] = link_of(norm, hidden)
                place.link = links[norm]
    return written


def _start(layer: nn.Module) -> Place:
    """Return the place where the stream starts: the input of the first layer."""
    name = family_of(base_class(layer)).start
    module = getattr(layer, name) if name else layer
    return Place("embed", module, None, on_input=not name)


def _in_layer(
    number: int, layer: nn.Module, after: nn.Module | None
) -> Iterator[tuple[Place, list[nn.Module], list[nn.Module]]]:
    """Yield the places of a layer, with the modules that read each, and that read the input."""
    cls = base_class(layer)
    family = family_of(cls)
    if family.no_stream:
        raise InputError(f"{cls.__name__} has no residual stream: {family.no_stream}")
    counts: dict[str, int] = {}

    def name(writers: frozenset[str]) -> str:
        kind = "+".join(sorted(writers))
        counts[kind] = counts.get(kind, 0) + 1
        again = f".{counts[kind] - 1}" if counts[kind] > 1 else ""
        return f"layers.{number}.{kind}{again}"

    hooked = list(family.hooked)
    if family.restart and eval(family.restart[0], {"self": layer}):
        hooked.append(family.restart[1:])
    for path, writer in hooked:
        if not path.startswith(NEXT):
            module = _submodule(layer, path)
        else:
            module = layer if after is None else _submodule(after, path.removeprefix(NEXT))
        writers = frozenset({writer})
        yield Place(name(writers), module, None, None, number, writers), [], []
    if family.hooked:
        return
    for path, stream, writer in family.adders or (("", None, ""),):
        module = _submodule(layer, path)
        try:
            made: Steered = steered(base_class(module), stream)
        except InputError as error:
            yield Place(f"layers.{number}", layer, None, None, number, unread=str(error)), [], []
            return
        for k, add in enumerate(made.adds):
            if not add.live(module):
                continue
            writers = frozenset({writer}) if writer else add.writers
            place = Place(name(writers), module, k, stream, number, writers)
            place.passed_on = add.returned
            yield place, _modules(module, add.readers), _modules(module, made.input_readers)


def _submodule(layer: nn.Module, path: str) -> nn.Module:
    """Return what a family's record names."""
    try:
        return layer.get_submodule(path)
    except AttributeError:
        name = base_class(layer).__name__
        raise InputError(
            f"{name} has no submodule {path!r}, which the record of its family names"
        ) from None


def _modules(layer: nn.Module, sources: Any) -> list[nn.Module]:
    """Return the modules that stand behind sources such as ``self.input_layernorm``."""
    modules = []
    for source in sources:
        try:
            module = eval(source, {"self": layer})
        except Exception:  # an index that only the call knows
            continue
        if isinstance(module, nn.Module):
            modules.append(module)
    return modules


def _final_norms(model: Any, layers: nn.ModuleList) -> list[nn.Module]:
    """Return the norms beside the list of layers: the one that reads the last layer, if one."""
    for parent in (*decoder(model).modules(), *model.modules()):
        children = list(parent.children())
        if any(child is layers for child in children):
            after = children[next(k for k, c in enumerate(children) if c is layers) + 1 :]
            return [c for c in after if "norm" in type(c).__name__.lower()]
    return []


def base_class(module: nn.Module) -> type[nn.Module]:
    """Return a module's class, or, of a patched one, the class that it had before."""
    cls = type(module)
    return cls.__mro__[1] if SITES_ATTRIBUTE in module.__dict__ else cls


def added_between(model: nn.Module) -> str:
    """Say what a decoder adds to the stream between its blocks, in its own forward."""
    names = inspect.signature(type(decoder(model)).forward).parameters
    # "deepstack": what images give the first layers, after they have run
    adds = any("deepstack" in name for name in names)
    return "what images add between the first blocks" if adds else ""

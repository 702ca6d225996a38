"""The handle of a patched model: its dials, its report, and the way back."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from refusal_kernels.errors import InputError
from refusal_kernels.hf.model import decoder, decoder_layers
from refusal_kernels.intervention_base import LAST, Intervention
from refusal_kernels.interventions import Add
from refusal_kernels.patching.norm_links import linked_class, unlinked_class
from refusal_kernels.patching.places import Place, added_between
from refusal_kernels.patching.rewrite import SITES_ATTRIBUTE, steered, unsteered_class
from refusal_kernels.patching.route import Generating, Positions, Route
from refusal_kernels.patching.site import PlainAdd, Site, Watcher


@dataclass(frozen=True)
class SiteReport:
    """One steered site.

    Attributes
    ----------
    name
        "embed", "layers.3.attn", ...
    path
        "fused": in the residual add itself; "hook": after it, exactly but at a further pass.
    norm
        Whether the norm that reads the site is fused as well (where no gradient is wanted).
    backend
        What serves it.
    interventions
        The names of those that act there.
    """

    name: str
    path: str
    norm: bool
    backend: str
    interventions: tuple[str, ...]


@dataclass(frozen=True)
class PatchReport:
    """What a patch did.

    Attributes
    ----------
    sites
        Every site that is steered now, read off the model.
    expected
        How many sites the interventions are meant for.
    unsteered
        What else writes into the stream, between the blocks, where nothing steers it; "" for
        nothing.
    """

    sites: tuple[SiteReport, ...]
    expected: int
    unsteered: str = ""

    @property
    def claimed(self) -> int:
        """How many sites are steered now."""
        return len(self.sites)

    @property
    def details(self) -> str:
        """A line for every site: its module, backend and interventions."""
        return "\n".join(
            f"{s.name}: {s.path}{' with its norm' if s.norm else ''}, {s.backend}: "
            + ", ".join(s.interventions)
            for s in self.sites
        )

    def __str__(self) -> str:
        text = f"{self.claimed} of {self.expected} sites steered"
        if not self.sites:
            return text
        norms = sum(site.norm for site in self.sites)
        names = dict.fromkeys(name for site in self.sites for name in site.interventions)
        backends = dict.fromkeys(site.backend for site in self.sites)
        left = f"; not steered: {self.unsteered}" if self.unsteered else ""
        return (
            f"{text}, {norms} with their norm, by {', '.join(backends)}: {', '.join(names)}{left}"
        )


class PatchHandle:
    """A patched model's dials, and the way back. Made by `patch`; a context manager."""

    def __init__(
        self,
        model: nn.Module,
        programs: tuple[tuple[Intervention, ...], ...],
        steered_places: list[tuple[Place, Site]],
        plain_places: list[Place],
        route: Route,
    ) -> None:
        self._programs = programs
        self._interventions = tuple({id(i): i for p in programs for i in p}.values())
        self.sites = [site for _, site in steered_places]
        self._groups = list({id(s.program): s.program for s in self.sites}.values())
        self._route = route
        self._model = model
        layers = decoder_layers(model)
        self._layers = layers, list(layers)
        self._modules = _apply(steered_places, plain_places, self._layers[1])
        self._expected = len(self.sites)
        positions = {i.positions for i in self._interventions}
        if positions != {"all"}:
            hook = Positions(model, decoder(model), route, last=LAST in positions)
            decoder(model).register_forward_pre_hook(hook, with_kwargs=True)
            self._modules.append(decoder(model))
            for module in model.modules():
                if hasattr(type(module), "generate") and "generate" not in module.__dict__:
                    module.__dict__["generate"] = Generating(module, route)
                    self._modules.append(module)

    # --- dials

    @property
    def strength(self) -> tuple[float, ...]:
        """The strength of every intervention, in the order in which `patch` was given them.

        Setting it (to one number for all, or to one per intervention) takes effect at the next
        forward pass, also of a compiled model or a captured graph: only a small tensor on the
        device is written.
        """
        return tuple(i.strength for i in self._interventions)

    @strength.setter
    def strength(self, value: float | Sequence[float]) -> None:
        self._turn("strength", value, self._interventions)

    @property
    def coefficient(self) -> tuple[float, ...]:
        """The coefficient of every `Add`, read and set as `strength` is."""
        return tuple(add.coefficient for add in self._adds())

    @coefficient.setter
    def coefficient(self, value: float | Sequence[float]) -> None:
        self._turn("coefficient", value, self._adds())

    def _adds(self) -> list[Add]:
        adds = [i for i in self._interventions if isinstance(i, Add)]
        if not adds:
            raise InputError("no Add among the interventions, so there is no coefficient")
        return adds

    def _turn(
        self, dial: str, value: float | Sequence[float], turned: Sequence[Intervention]
    ) -> None:
        self._check_intact()
        values = tuple(value) if isinstance(value, Sequence) else (value,) * len(turned)
        if len(values) != len(turned):
            raise InputError(
                f"{len(values)} {dial}s for {len(turned)} interventions; expected one each, or one "
                "number for all"
            )
        if not all(torch.tensor(float(v)).isfinite() for v in values):
            raise InputError(f"{dial} is {value}; expected a finite number")
        for intervention, number in zip(turned, values, strict=True):
            object.__setattr__(intervention, dial, float(number))  # `patch` made a copy of each
        for program in self._groups:
            program.write_params()

    @contextlib.contextmanager
    def route(self, programs: Sequence[int | None]) -> Iterator[None]:
        """Give every row of the batch a program of its own, while inside.

        Parameters
        ----------
        programs
            For every row the number of its program (of the arguments of `patch`), or None to leave
            the row alone. A batch that is a multiple of it repeats each row in its place, as beam
            search and several returned sequences do.

        Raises
        ------
        InputError
            If a number is none of a program.
        """
        self._check_intact()
        count = len(self._programs)
        for row, program in enumerate(programs):
            if program is not None and not 0 <= program < count:
                raise InputError(
                    f"row {row} is routed to program {program}; there are {count}, from 0"
                )
        if not programs:
            raise InputError("the route is empty; expected a program or None for every row")
        numbers = [self._route.programs if p is None else p for p in programs]
        outer = self._route.rows
        device = self.sites[0].device
        self._route.rows = torch.tensor(numbers, dtype=torch.int64, device=device)
        try:
            yield
        finally:
            self._route.rows = outer

    # --- what is seen

    @property
    def keep_scores(self) -> bool:
        """Whether every forward pass leaves what its edits read, for `scores`."""
        return self.sites[0].keep_scores

    @keep_scores.setter
    def keep_scores(self, value: bool) -> None:
        for site in self.sites:
            site.keep_scores = bool(value)
            site.scores = None

    def scores(self) -> dict[str, Tensor]:
        """Return what the edits of the last forward pass read: telemetry, from that same pass.

        Returns
        -------
        dict of str to Tensor
            By site: float32 [tokens, slots] on the device, ``v . h`` before the edit; tokens are
            those of the pass, row after row, slots those of the interventions that act there, in
            order. Nothing waits for the device.

        Raises
        ------
        InputError
            If ``keep_scores`` was not set to True before the pass.
        """
        scores = {s.name: s.scores for s in self.sites if s.scores is not None}
        if not scores:
            raise InputError("no scores: set handle.keep_scores = True, then run the model")
        return scores

    @contextlib.contextmanager
    def watch(self, watcher: Watcher) -> Iterator[None]:
        """Call ``watcher(name, h)`` with the steered stream at every site, while inside."""
        for site in self.sites:
            site.watcher = watcher
        try:
            yield
        finally:
            for site in self.sites:
                site.watcher = None

    def report(self) -> PatchReport:
        """Say which sites are steered now, by which backend and by what."""
        inside = set(self._model.modules())
        steered_now = {id(s) for m in self._modules if m in inside for s in _sites_of(m)}
        rows = tuple(
            SiteReport(
                site.name,
                site.path,
                site.link is not None and "rk_link" in site.link.norm.__dict__,
                site.backend,
                tuple(type(i).__name__ for i in site.program.interventions),
            )
            for site in self.sites
            if id(site) in steered_now
        )
        return PatchReport(rows, self._expected, added_between(self._model))

    def _check_intact(self) -> None:
        """Raise if layers were exchanged under the patch: its dials would not reach them."""
        container, layers = self._layers
        now = list(container)
        if len(now) != len(layers) or any(a is not b for a, b in zip(now, layers, strict=True)):
            raise InputError(
                "the model's layers have been replaced since it was patched; remove the patch and "
                "patch the model as it is now"
            )

    # --- the way back

    def remove(self) -> None:
        """Undo the patch: classes and hooks are as before. A second call does nothing."""
        sites = {id(site) for site in self.sites}  # what is there now may be another patch's
        if any(id(site) in sites for module in self._modules for site in _sites_of(module)):
            for module in self._modules:
                _restore(module)

    def __enter__(self) -> "PatchHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _apply(
    steered_places: list[tuple[Place, Site]], plain_places: list[Place], layers: list[nn.Module]
) -> list[nn.Module]:
    """Put the sites in place; return every module that was changed."""
    changed: list[nn.Module] = []
    by_module: dict[tuple[nn.Module, str | None], dict[int, Any]] = {}
    for place, site in [*steered_places, *((p, PlainAdd()) for p in plain_places)]:
        if place.add is not None:
            by_module.setdefault((place.module, place.stream), {})[place.add] = site
        elif isinstance(site, Site):
            if place.on_input:
                place.module.register_forward_pre_hook(site.on_input, with_kwargs=True)
            else:
                place.module.register_forward_hook(site.on_output)
            changed.append(place.module)
        if isinstance(site, Site) and place.link is not None:
            site.link = place.link
            ends = [layers[k] for k in (place.block, place.feeds) if k is not None]
            place.link.between = tuple(dict.fromkeys((place.module, *ends)))
            changed.append(place.link.norm)
            if "rk_link" not in place.link.norm.__dict__:
                place.link.norm.__dict__["rk_link"] = place.link
                _become(place.link.norm, linked_class(type(place.link.norm)))
    for (module, stream), sites in by_module.items():
        if not any(isinstance(s, Site) for s in sites.values()):
            continue
        made = steered(type(module), stream)
        every = tuple(sites.get(k, PlainAdd()) for k in range(len(made.adds)))
        module.__dict__[SITES_ATTRIBUTE] = every
        _become(module, made.cls)
        changed.append(module)
    return changed


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Swap a module's class, also in what accelerate calls or has left on the instance."""
    before, module.__class__ = type(module), cls
    for name in ("_old_forward", "forward"):
        forward = module.__dict__.get(name)
        if isinstance(forward, MethodType) and forward.__func__ is before.forward:
            module.__dict__[name] = MethodType(cls.forward, module)


def _sites_of(module: nn.Module) -> Iterator[Site]:
    for site in module.__dict__.get(SITES_ATTRIBUTE, ()):
        if isinstance(site, Site):
            yield site
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        if isinstance(getattr(hook, "__self__", None), Site):
            yield hook.__self__  # type: ignore[attr-defined]


def _restore(module: nn.Module) -> None:
    """Undo whatever a patch did to one module."""
    if module.__dict__.pop(SITES_ATTRIBUTE, None) is not None:
        _become(module, _without(type(module)))
    if module.__dict__.pop("rk_link", None) is not None:
        _become(module, _without(type(module)))
    if isinstance(module.__dict__.get("generate"), Generating):
        del module.__dict__["generate"]
    for hooks, keyed in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for number, hook in list(hooks.items()):
            if isinstance(hook, Positions) or isinstance(getattr(hook, "__self__", None), Site):
                del hooks[number]
                keyed.pop(number, None)


def _without(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a generated one was made of, also where FSDP's stands before that."""
    if (original := unsteered_class(cls) or unlinked_class(cls)) is not None:
        return original
    bases = tuple(_without(b) for b in cls.__bases__)
    if bases == cls.__bases__:
        return cls
    # what __init_subclass__ has wrapped it wraps anew
    drop = {k for k, v in vars(cls).items() if hasattr(v, "__wrapped__")}
    body = {k: v for k, v in vars(cls).items() if k not in {"__dict__", "__weakref__", *drop}}
    return type(cls.__name__.replace("Steered", "").replace("Linked", ""), bases, body)


def unpatch(model: nn.Module) -> None:
    """Undo the patch of a model, with or without its handle at hand.

    A deep copy or an unpickled model carries its patch and has no handle of its own. A model that
    is not patched is left as it is.
    """
    for module in list(model.modules()):
        _restore(module)


def is_patched(model: nn.Module) -> bool:
    """Whether anything in a model is steered."""
    return any(True for module in model.modules() for _ in _sites_of(module))


def copied(programs: Sequence[Sequence[Intervention]]) -> tuple[tuple[Intervention, ...], ...]:
    """Copy interventions, each once, so that the dials of one patch do not turn another's."""
    copies: dict[int, Intervention] = {}
    for program in programs:
        for i in program:
            copies.setdefault(id(i), dataclasses.replace(i))
    return tuple(tuple(copies[id(i)] for i in program) for program in programs)

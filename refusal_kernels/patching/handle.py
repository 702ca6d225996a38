"""`patch`, and the handle that it returns."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from refusal_kernels import ops
from refusal_kernels.errors import InputError
from refusal_kernels.interventions import Intervention, compile_program
from refusal_kernels.models import decoder_layers, hidden_size
from refusal_kernels.patching.rewrite import add_names, steered_class

Watcher = Callable[[str, Tensor], None]
"""Called with a site's name and the stream there, [..., hidden]."""


class Program:
    """The interventions of one or more sites, as tensors on every device that needs them."""

    def __init__(self, interventions: Sequence[Intervention]) -> None:
        self.interventions = tuple(interventions)
        self.strengths = [i.strength for i in interventions]
        self._tensors = {torch.device("cpu"): compile_program(interventions)}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return bank and params on a device; copies share every later change of strength."""
        if device not in self._tensors:
            bank, params = self._tensors[torch.device("cpu")]
            self._tensors[device] = bank.to(device), params.to(device)
        return self._tensors[device]

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """Write new params into the tensors that the kernels read: no kernel is made anew."""
        rows = [i.params(s) for i, s in zip(self.interventions, strengths, strict=True)]
        new = torch.stack(rows).unsqueeze(0)
        for _, params in self._tensors.values():
            params.copy_(new)
        self.strengths = list(strengths)


class Site:
    """One place where the stream is steered: it stands where ``residual + x`` stood."""

    def __init__(self, name: str, program: Program, like: Tensor) -> None:
        self.name = name
        self.program = program
        self.watcher: Watcher | None = None
        self.backend = ops.explain(like).chosen
        # chosen here, once: a call of the model does not look anything up
        self._op = ops.op_for("add_steer", like)
        self._op_inference = ops.op_for("add_steer_inference", like)
        self.bank, self.params = program.on(like.device)

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Return the steered ``residual + x``."""
        if x.device != self.bank.device:  # the model was moved after it was patched
            self.bank, self.params = self.program.on(x.device)
        op = self._op if torch.is_grad_enabled() else self._op_inference
        h: Tensor = op(x, residual, self.bank, self.params, None)
        if self.watcher is not None:
            self.watcher(self.name, h)
        return h

    def embedding_hook(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Steer what an embedding writes: a forward hook."""
        return self(output, None)


@dataclass(frozen=True)
class SiteReport:
    """One steered site: its name, how it is served, and by what."""

    name: str
    path: str
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
    """

    sites: tuple[SiteReport, ...]
    expected: int

    @property
    def claimed(self) -> int:
        """How many sites are steered now."""
        return len(self.sites)

    def __str__(self) -> str:
        lines = [f"{self.claimed} of {self.expected} sites steered"]
        for s in self.sites:
            lines.append(f"  {s.name}: {s.path}, {s.backend}: {', '.join(s.interventions)}")
        return "\n".join(lines)


class PatchHandle:
    """A patched model's dials, and the way back. Made by `patch`; a context manager."""

    def __init__(
        self,
        interventions: tuple[Intervention, ...],
        layers: dict[nn.Module, tuple[Any, ...]],
        embedding: nn.Module,
        embedding_site: Site | None,
    ) -> None:
        self._interventions = interventions
        self._layers = layers
        self._classes = {layer: type(layer) for layer in layers}
        self._sites = [s for sites in layers.values() for s in sites if isinstance(s, Site)]
        self._hook = None
        self._old_forwards: dict[nn.Module, Any] = {}
        for layer, sites in layers.items():
            layer.__dict__["rk_sites"] = sites
            layer.__class__ = steered_class(type(layer))
            if "_old_forward" in layer.__dict__:  # accelerate's wrapper calls this, not the class's
                self._old_forwards[layer] = layer.__dict__["_old_forward"]
                layer.__dict__["_old_forward"] = MethodType(type(layer).forward, layer)
        if embedding_site is not None:
            self._sites.insert(0, embedding_site)
            self._hook = embedding.register_forward_hook(embedding_site.embedding_hook)
        self._expected = len(self._sites)
        self._programs = list({id(s.program): s.program for s in self._sites}.values())

    @property
    def strength(self) -> float | tuple[float, ...]:
        """How strong the edit is: one number, or one per intervention where they differ.

        Setting it (to one number, or one per intervention) takes effect at the next forward pass,
        also of a compiled model: only a small tensor on the device is written.
        """
        return self._strengths[0] if len(set(self._strengths)) == 1 else self._strengths

    @strength.setter
    def strength(self, value: float | Sequence[float]) -> None:
        count = len(self._interventions)
        values = tuple(value) if isinstance(value, Sequence) else (value,) * count
        if len(values) != count:
            raise InputError(f"{len(values)} strengths for {count} interventions")
        if not all(torch.tensor(float(v)).isfinite() for v in values):
            raise InputError(f"strength is {value}; must be finite")
        by_intervention = dict(zip(map(id, self._interventions), values, strict=True))
        for program in self._programs:
            program.set_strengths([by_intervention[id(i)] for i in program.interventions])

    @property
    def _strengths(self) -> tuple[float, ...]:
        known = {
            id(i): s
            for program in self._programs
            for i, s in zip(program.interventions, program.strengths, strict=True)
        }
        return tuple(known[id(i)] for i in self._interventions)

    def report(self) -> PatchReport:
        """Say which sites are steered now, by which backend and by what."""
        steered = [
            site
            for layer in self._layers
            for site in layer.__dict__.get("rk_sites", ())
            if isinstance(site, Site)
        ]
        if self._hook is not None:
            steered.insert(0, self._sites[0])
        rows = tuple(
            SiteReport(
                site.name,
                "hook" if site.name == "embed" else "fused",
                site.backend,
                tuple(type(i).__name__ for i in site.program.interventions),
            )
            for site in steered
        )
        return PatchReport(rows, self._expected)

    @contextlib.contextmanager
    def watch(self, watcher: Watcher) -> Iterator[None]:
        """Call ``watcher(name, h)`` with the steered stream at every site, while inside."""
        for site in self._sites:
            site.watcher = watcher
        try:
            yield
        finally:
            for site in self._sites:
                site.watcher = None

    def remove(self) -> None:
        """Undo the patch: classes and hooks are as before. A second call does nothing."""
        for layer, cls in self._classes.items():
            if layer.__dict__.pop("rk_sites", None) is not None:
                layer.__class__ = cls
                if layer in self._old_forwards:
                    layer.__dict__["_old_forward"] = self._old_forwards[layer]
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def __enter__(self) -> "PatchHandle":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


def patch(model: Any, *interventions: Intervention) -> PatchHandle:
    """Steer a Hugging Face causal language model in place, until the handle is removed.

    An intervention without a ``layer`` acts on the embedding's output and at every residual add,
    so on everything that is ever written into the stream. With ``layer=l`` it acts at the input of
    block l alone: at the add that ends block l - 1, or on the embedding for block 0.

    Parameters
    ----------
    model
        A transformers model whose layers are of a known family (Llama, Mistral, Qwen2, Qwen3).
    interventions
        One or more; those that meet at one site read the same stream and act together.

    Returns
    -------
    PatchHandle
        With ``strength``, ``report()``, ``watch()`` and ``remove()``; also a context manager.

    Raises
    ------
    InputError
        If the model's family is unknown, a hidden size or layer does not fit, several directions
        at one site are not orthonormal, or the model is patched already. The model is untouched.

    Examples
    --------
    >>> with rk.patch(model, rk.Ablate(direction)) as handle:  # doctest: +SKIP
    ...     model.generate(**inputs)
    ...     handle.strength = 0.5
    """
    if not interventions or not all(isinstance(i, Intervention) for i in interventions):
        given = ", ".join(type(i).__name__ for i in interventions) or "nothing"
        raise InputError(f"patch takes interventions such as Ablate(direction); got {given}")
    layers, hidden = decoder_layers(model), hidden_size(model)
    for i in interventions:
        if i.hidden != hidden:
            raise InputError(f"the direction has hidden size {i.hidden}; the model has {hidden}")
        if i.layer is not None and i.layer >= len(layers):
            raise InputError(f"layer {i.layer} is not there; the model has {len(layers)} layers")
    if any("rk_sites" in layer.__dict__ for layer in layers):
        raise InputError(
            "the model is patched already: remove that patch, or give all interventions to one"
        )

    for number, layer in enumerate(layers):
        if "forward" in layer.__dict__ and "_old_forward" not in layer.__dict__:
            raise InputError(
                f"layer {number} carries a forward of its own (kernelize, or set by hand), which "
                "a patch of its class would not reach; patch the model before that is set"
            )

    programs: dict[tuple[int, ...], Program] = {}

    def site(name: str, feeds: int | None, module: nn.Module) -> Site | None:
        """Return the site whose output is the input of block ``feeds`` (None: of no block)."""
        here = [i for i in interventions if i.layer is None or i.layer == feeds]
        if not here:
            return None
        key = tuple(id(i) for i in here)
        if key not in programs:
            programs[key] = Program(here)
        weight = next(p for p in module.parameters() if p.is_floating_point())
        like = torch.empty(0, dtype=weight.dtype, device=weight.device)
        return Site(name, programs[key], like)

    embedding = model.get_input_embeddings()
    embedding_site = site("embed", 0, embedding)
    steered: dict[nn.Module, tuple[Any, ...]] = {}
    for number, layer in enumerate(layers):
        names = add_names(layer)
        steered_class(type(layer))
        last = len(names) - 1
        sites = [
            site(f"layers.{number}.{name}", number + 1 if k == last else None, layer)
            for k, name in enumerate(names)
        ]
        if any(sites):
            steered[layer] = tuple(s or torch.add for s in sites)
    return PatchHandle(interventions, steered, embedding, embedding_site)

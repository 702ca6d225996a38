"""The modules at the places of a vLLM model, and how they get there.

Bank, params and route are buffers of every site, so that Dynamo makes them inputs of the graph.
They are not persistent, because no checkpoint has them.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

from refusal_kernels.errors import InputError
from refusal_kernels.ops.registry import serving
from refusal_kernels.patching.places import base_class
from refusal_kernels.patching.rewrite import SITES_ATTRIBUTE, steered
from refusal_kernels.vllm.bank import Bank
from refusal_kernels.vllm.families import ADD, NORM, EnginePlace
from refusal_kernels.vllm.monitor import Meter
from refusal_kernels.vllm.reading import SiteReader


class SteeredAdd(nn.Module):
    """The steered add, in the place of ``residual + x`` in a layer's forward."""

    bank: Tensor
    params: Tensor
    route: Tensor

    def __init__(self, bank: Bank, number: int) -> None:
        super().__init__()
        self.meter: Meter | None = None
        self.reader: SiteReader | None = None
        self.register_buffer("bank", bank.vectors, persistent=False)
        self.register_buffer("params", bank.params[number], persistent=False)
        self.register_buffer("route", bank.route, persistent=False)

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Return the steered ``residual + x``, in the shape of x."""
        tokens = x.numel() // x.shape[-1]  # the Transformers backend has a batch of one
        op = serving("add_steer_inference", x)
        steered: Tensor = op(x, residual, self.bank, self.params, self.route[:tokens])
        self._look(steered)
        return steered

    def _look(self, h: Tensor) -> None:
        if self.meter is not None:
            self.meter(h)
        if self.reader is not None:
            self.reader(h)

    def before_norm(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the arguments of vLLM's norm: (h, 0) for steered rows, (x, residual) for others.

        So unsteered requests get vLLM's bits: its norm adds in float32 and rounds twice.
        """
        steered = (self.route[: x.shape[0]] >= 0).unsqueeze(-1)
        h = self(x, residual)
        return torch.where(steered, h, x), torch.where(steered, 0.0, residual)


class SteeredAddNorm(SteeredAdd):
    """The steered add with the RMSNorm that reads it."""

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
    ) -> tuple[Tensor, Tensor]:
        """Return the normalized row and the stream, as vLLM's fused norms do."""
        op = serving("add_steer_rms_norm_inference", x)
        route = self.route[: x.shape[0]]
        normed, h = op(x, residual, weight, eps, self.bank, self.params, route, offset)
        self._look(h)
        return normed, h


class SteeredRMSNorm(RMSNorm):
    """vLLM's RMSNorm at a residual add. Its `forward` replaces those of all platforms."""

    rk_site: SteeredAdd

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """As `RMSNorm.forward`."""
        if residual is None:
            return super().forward(x)
        if isinstance(self.rk_site, SteeredAddNorm):
            return self.rk_site(x, residual, self.weight, self.variance_epsilon, 0.0)
        return super().forward(*self.rk_site.before_norm(x, residual))


class SteeredGemmaRMSNorm(GemmaRMSNorm):
    """The same for Gemma, whose norms multiply by (1 + weight)."""

    rk_site: SteeredAdd

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """As `GemmaRMSNorm.forward`."""
        if residual is None:
            return super().forward(x)
        if isinstance(self.rk_site, SteeredAddNorm):
            return self.rk_site(x, residual, self.weight, self.variance_epsilon, 1.0)
        return super().forward(*self.rk_site.before_norm(x, residual))


STEERED_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    RMSNorm: SteeredRMSNorm,
    GemmaRMSNorm: SteeredGemmaRMSNorm,
}


def claim(places: list[EnginePlace], bank: Bank, fuse_norms: bool) -> list[SteeredAdd]:
    """Put a site at every place of a loaded model; return them in the order of the forward.

    Norms and layers change their class and keep everything else: weights, hooks, names.
    """
    sites: list[SteeredAdd] = []
    for number, place in enumerate(places):
        module = place.module
        fused = place.kind == NORM and fuse_norms
        site = (SteeredAddNorm if fused else SteeredAdd)(bank, number)
        if place.kind == NORM:
            if getattr(module, "variance_size_override", None) is not None:
                raise InputError(
                    f"the norm of {place.name} normalizes by part of the channels; such a norm "
                    "cannot be steered"
                )
            module.rk_site = site
            module.__class__ = STEERED_NORMS[type(module)]
        elif place.kind == ADD:
            _put_at_add(module, place.add, site)
        else:
            module.rk_start = site
            module.register_forward_pre_hook(_steer_input, with_kwargs=True)
        sites.append(site)
    return sites


def _put_at_add(layer: nn.Module, number: int, site: SteeredAdd) -> None:
    """Put a site at an add of a layer whose forward is rewritten."""
    if not hasattr(layer, SITES_ATTRIBUTE):
        rewritten = steered(base_class(layer))
        setattr(layer, SITES_ATTRIBUTE, nn.ModuleList(nn.Identity() for _ in rewritten.adds))
        layer.__class__ = rewritten.cls
    getattr(layer, SITES_ATTRIBUTE)[number] = site


def _steer_input(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Steer the input of the first layer, the embedding: a forward pre-hook."""
    at = _hidden_states_at(type(layer))
    if "hidden_states" in kwargs:
        kwargs["hidden_states"] = layer.rk_start(kwargs["hidden_states"], None)
        return args, kwargs
    return (*args[:at], layer.rk_start(args[at], None), *args[at + 1 :]), kwargs


def _hidden_states_at(cls: type[nn.Module]) -> int:
    """Return the position of ``hidden_states`` among the arguments of a layer's forward."""
    names = list(inspect.signature(cls.forward).parameters)[1:]
    if "hidden_states" not in names:
        raise InputError(
            f"{cls.__qualname__}.forward has no parameter hidden_states; such a layer cannot be "
            "steered"
        )
    return names.index("hidden_states")

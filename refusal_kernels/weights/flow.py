"""Follow a forward pass to the parameters that write into the residual stream.

`Lineages` says which tensors are clean given which parameters. What a steered site returns is
clean given nothing.

The rules are checked op by op as the model runs, below all of its Python, so no layout, family or
kind of expert is known here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from refusal_kernels.patching.places import base_class
from refusal_kernels.patching.site import Site
from refusal_kernels.weights.lineage import (
    INTO,
    NOTHING,
    SHAPED,
    VIEWS,
    Lineage,
    Lineages,
    writer_names,
)


@dataclass(frozen=True)
class SiteInputs:
    """The lineage of both terms of the sum at a steered site."""

    name: str
    branch: Lineage
    stream: Lineage


class StreamFlow(TorchDispatchMode):
    """Follows tensors while a patched model runs, in eval mode.

    With parameters on meta no weight takes memory: what is computed from one is drawn at random, in
    the right shape, so that experts are chosen and masks are made as in a real pass.
    """

    def __init__(self, model: nn.Module, hidden: int) -> None:
        super().__init__()
        self.lineages = Lineages(model, hidden)
        self.sites: list[SiteInputs] = []  # in the order in which they ran
        self.touched: set[str] = set()  # the parameters that took part
        self.leaks: dict[str, str] = {}  # where a parameter was also used in another way
        self._head = getattr(model, "get_output_embeddings", lambda: None)()
        self._where: list[tuple[str, nn.Module]] = []
        self._hooks: list[Any] = []
        self._inside_a_site = False
        self._model = model

    def __enter__(self) -> "StreamFlow":
        for name, module in self._model.named_modules():
            enter = module.register_forward_pre_hook(
                lambda module, args, name=name: self._where.append((name, module)), prepend=True
            )
            leave = module.register_forward_hook(self._leaving, always_call=True)
            self._hooks += [enter, leave]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()
        self.lineages.clear()

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._where and self._where[-1][1] is module:
            self._where.pop()

    # --- the sites

    @contextmanager
    def through(self, sites: Sequence[Site]) -> Iterator[None]:
        """Note what reaches these sites inside the context, with any backend."""
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
        stream = Lineage(NOTHING) if residual is None else self.lineages.lineage(residual)
        self.sites.append(SiteInputs(name, self.lineages.lineage(x), stream))
        self._inside_a_site = True
        try:
            h = call(x, residual)
        finally:
            self._inside_a_site = False
        self.lineages.note(h, Lineage(NOTHING))
        return h

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
        known = [self.lineages.lineage(t) for t in inputs]
        for value in known:
            if value.axes is not None:
                self.touched |= value.depends
        for out in _tensors(result):
            made = self.lineages.outcome(name.rstrip("_"), args, kwargs, out)
            if made is None:
                depends = NOTHING.union(*(v.depends for v in known))
                made = Lineage(None, depends, None, self._why(name, known))
            if made.axes is None and name not in SHAPED:
                for value in known:
                    carried = (value.writes or NOTHING) <= (made.writes or NOTHING)
                    if not carried or (value.axes is not None and not value.writes):
                        self._leak(value)
            if in_place:
                self.lineages.overwrite(out, made)
            self.lineages.note(out, made)
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
        if name in VIEWS and all(t.is_meta for t in tensors if t.is_floating_point()):
            return result

        def drawn(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if not value.is_floating_point():
                return torch.zeros(value.shape, dtype=value.dtype)
            return torch.randn(value.shape, dtype=torch.float32).to(value.dtype)

        return tree_map(drawn, result)

    # --- words

    def _leak(self, value: Lineage) -> None:
        names = writer_names(value.writes) if value.axes is None else value.depends
        if self._where and self._where[-1][1] is self._head:
            return  # a tied head is untied
        for name in names:
            self.leaks.setdefault(name, self._place())

    def _place(self) -> str:
        if not self._where or not self._where[-1][0]:
            return "the model's own forward"
        name, module = self._where[-1]
        return f"{name} ({base_class(module).__name__})"

    def _why(self, name: str, known: list[Lineage]) -> str:
        """Return the first thing that ended what was clean, of all that came together here."""
        clean = [v for v in known if v.writes is not None and v.axes is None]
        earlier = [v.why for v in known if v.writes is None and v.why]
        if earlier and (not clean or name.strip("_") in ("add", "cat", *INTO)):
            return earlier[0]  # one term that is not clean spoils the sum
        return f"{self._place()}, {name.strip('_')}" if clean else ""


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))

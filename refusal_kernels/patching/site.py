"""Sites: where the stream is steered, and by which program."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from refusal_kernels import ops
from refusal_kernels.banks import NUMBERS, check_program, params_of, slots_of, vectors_of
from refusal_kernels.intervention_base import GENERATED, LAST, Intervention
from refusal_kernels.patching.norm_links import Link, is_plain, version
from refusal_kernels.patching.route import PHASES, Route

Watcher = Callable[[str, Tensor], None]
"""Called with a site's name and the stream there, [..., hidden]."""


class Placed:
    """What the sites of a group share: one object, of which a compiled graph checks little twice.

    ``tensors`` are bank and params, as the ops take them, and a table: for every cell its row of
    the bank.
    """

    def __init__(
        self,
        route: Route,
        idle: bool,
        tensors: tuple[Tensor, Tensor, Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.route = route
        self.idle = idle  # whether program 0 does nothing here
        self.tensors = tensors[0].to(device), tensors[1].to(device), tensors[2].to(device)
        self.device, self.dtype = device, dtype  # of the streams that it is for
        self.hidden = tensors[0].shape[-1]
        # the ops, by form: a call of the model does not look anything up
        self.serve = _ops_for(torch.empty(0, device=device, dtype=dtype))
        self._kept: tuple[Tensor | None, Tensor | None] = (None, None)

    def rows(self, cells: Tensor) -> Tensor:
        """Return what each token takes of the bank, int32 [tokens]; once for a pass."""
        table = self.tensors[2]
        if torch.compiler.is_compiling():
            return table[cells]
        of, rows = self._kept
        if of is not cells or rows is None:
            rows = table[cells]
            self._kept = cells, rows
        return rows

    def __getstate__(self) -> dict[str, Any]:  # the ops are found anew
        return {**self.__dict__, "serve": None, "_kept": (None, None)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.serve = _ops_for(torch.empty(0, device=self.device, dtype=self.dtype))


class SiteProgram:
    """What one group of sites does: for every program of the patch, the interventions that act."""

    def __init__(self, members: Sequence[Sequence[Intervention]], route: Route):
        self.members = tuple(tuple(m) for m in members)
        cells: list[int] = []
        kinds: dict[tuple[int, ...], int] = {}  # the sets of interventions that can act together
        self._sets: list[tuple[Intervention, ...]] = []
        for interventions in self.members:
            for phase in range(PHASES):
                here = tuple(i for i in interventions if _acts(i, phase))
                key = tuple(id(i) for i in here)
                if here and key not in kinds:
                    kinds[key] = len(self._sets)
                    self._sets.append(here)
                cells.append(kinds[key] if here else -1)
        cells += [-1] * PHASES  # the rows that are left alone
        with torch.inference_mode(False):  # an inference tensor could not be written to later
            slots = self._slots = max(map(slots_of, self._sets))
            bank = torch.stack([vectors_of(s, slots) for s in self._sets])
            params = bank.new_zeros(len(self._sets), slots, NUMBERS)
            table = torch.tensor(cells, dtype=torch.int32)
        for interventions in self._sets:
            check_program(interventions)
        self._route, self._idle = route, cells[0] < 0  # program 0 does nothing here
        self._tensors = bank, params, table
        self._placed: dict[tuple[torch.device, torch.dtype], Placed] = {}
        self.write_params()

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """All that act somewhere, each once."""
        return tuple({id(i): i for s in self._sets for i in s}.values())

    def on(self, device: torch.device, dtype: torch.dtype) -> Placed:
        """Return what is shared for such streams; copies of the tensors follow every change."""
        key = device, dtype
        if key not in self._placed:
            with torch.inference_mode(False):
                self._placed[key] = Placed(self._route, self._idle, self._tensors, *key)
        return self._placed[key]

    def write_params(self) -> None:
        """Write the dials into the tensors that the kernels read: no kernel is made anew."""
        new = torch.stack([params_of(s, self._slots) for s in self._sets])
        for _, params, _ in (self._tensors, *(placed.tensors for placed in self._placed.values())):
            params.copy_(new)


def _acts(intervention: Intervention, phase: int) -> bool:
    generated, last = divmod(phase, 2)
    wanted = intervention.positions
    return (
        wanted == "all"
        or (wanted == LAST and last == 1)
        or (wanted != LAST and (wanted == GENERATED) == (generated == 1))
    )


class _StandsForAnAdd:
    """What a rewritten forward calls in the place of an add."""

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        raise NotImplementedError

    def dropout_add(self, x: Tensor, residual: Tensor, prob: float, training: bool) -> Tensor:
        """Stand where `dropout_add` of BLOOM and Falcon stood."""
        return self(nn.functional.dropout(x, p=prob, training=training), residual)

    def bias_dropout_add(
        self, x: Tensor, bias: Tensor | None, residual: Tensor | None, prob: float, training: bool
    ) -> Tensor:
        """Stand where `bias_dropout_add` of GPT-NeoX-Japanese stood."""
        x = x if bias is None else x + bias
        return self(nn.functional.dropout(x, p=prob, training=training), residual)


class Site(_StandsForAnAdd):
    """One place where the stream is steered: it stands where ``residual + x`` stood."""

    def __init__(self, name: str, path: str, program: SiteProgram, like: Tensor) -> None:
        self.name = name  # "embed", or "layers.3.attn" and the like
        self.path = path  # "fused" (in the add), "hook" (after it), both exact
        self.program = program
        self.link: Link | None = None  # the norm that reads this site's output
        self.watcher: Watcher | None = None
        self.keep_scores = False
        self.scores: Tensor | None = None  # kept: what the last pass read, float32 [tokens, slots]
        self._bind(like.device, like.dtype)

    def _bind(self, device: torch.device, dtype: torch.dtype) -> None:
        """Choose what serves this site, once."""
        self.backend = ops.explain(torch.empty(0, device=device, dtype=dtype)).chosen
        self._placed = self.program.on(device, dtype)

    @property
    def device(self) -> torch.device:
        """Where the stream was when last seen."""
        return self._placed.device

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "scores": None, "watcher": None}

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Return the steered ``residual + x``."""
        if residual is not None and (x.dtype is not residual.dtype or x.shape != residual.shape):
            dtype = torch.promote_types(x.dtype, residual.dtype)
            x, residual = torch.broadcast_tensors(x.to(dtype), residual.to(dtype))
        placed = self._placed
        if x.shape[-1] != placed.hidden:  # several streams side by side
            rows = (-1, placed.hidden)
            inner = None if residual is None else residual.unflatten(-1, rows)
            return self(x.unflatten(-1, rows), inner).flatten(-2)
        if x.dtype is not placed.dtype or x.device != placed.device:
            # the model was moved after it was patched
            if torch.compiler.is_compiling():  # a pass that is not compiled places them for good
                placed = Placed(placed.route, placed.idle, placed.tensors, x.device, x.dtype)
            else:
                self._bind(x.device, x.dtype)
                placed = self._placed
        grad = torch.is_grad_enabled()
        cells = placed.route.cells(x)
        if cells is None and placed.idle:
            return x if residual is None else residual + x
        route = None if cells is None else placed.rows(cells)
        bank, params, _ = placed.tensors
        serve = placed.serve
        add, add_norm = serve["scores" if self.keep_scores else "training" if grad else "inference"]
        link = self.link
        # with gradients the model's own norm runs: a norm is in another gradient checkpoint than
        # the add of the layer before
        weight = None if link is None or grad else link.norm._parameters.get("weight")
        if link is not None and is_plain(weight, x):
            out = add_norm(x, residual, weight, link.eps, bank, params, route, link.offset)
            h = out[1]
            link.pending = (h, out[0], version(h))
        else:
            out = add(x, residual, bank, params, route)
            h = out[0] if self.keep_scores else out
        if self.keep_scores:
            self.scores = out[-1].detach()
        if self.watcher is not None:
            self.watcher(self.name, h)
        return h

    # --- as hooks

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Steer what a module returns: a forward hook."""
        if isinstance(output, tuple):
            return (self(output[0], None), *output[1:])
        return self(output, None)

    def on_input(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Steer what a module is called with: a forward pre-hook with keywords."""
        if args:
            return (self(args[0], None), *args[1:]), kwargs
        name = next(iter(kwargs)) if "hidden_states" not in kwargs else "hidden_states"
        return args, {**kwargs, name: self(kwargs[name], None)}


FORMS = {"training": "", "inference": "_inference", "scores": "_scores"}


def _ops_for(x: Tensor) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """Return what serves tensors such as x, by form: the add, and the add with the norm."""
    return {
        form: (ops.op_for("add_steer" + end, x), ops.op_for("add_steer_rms_norm" + end, x))
        for form, end in FORMS.items()
    }


class PlainAdd(_StandsForAnAdd):
    """Stands where an add is that no intervention is meant for."""

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Return ``residual + x``."""
        return x if residual is None else residual + x

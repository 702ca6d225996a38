"""Sites: where the stream is steered, by which program, token by token."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from refusal_kernels import ops
from refusal_kernels.errors import InputError
from refusal_kernels.interventions import GENERATED, LAST, Intervention, compile_program
from refusal_kernels.patching.norms import Link, is_plain, version

Watcher = Callable[[str, Tensor], None]
"""Called with a site's name and the stream there, [..., hidden]."""

# What a token may be to an intervention that acts at some positions only.
PHASES = 4  # 2 * generated + last


class Route:
    """Which program every token of a forward pass takes: the rows' programs and the positions.

    Together they are a *cell*, ``program * 4 + 2 * generated + last``, which a `Program` translates
    for its sites.

    Attributes
    ----------
    rows
        int64 [rows]: the program of each row of the batch, or None for program 0 everywhere.
    phases
        int64 [batch, tokens] of the forward pass that this thread runs, or None where no position
        matters.
    mask
        What the model around the decoder was told of the padding, until the decoder is called.
    """

    def __init__(self, programs: int) -> None:
        self.programs = programs
        self.rows: Tensor | None = None
        self._mask: Tensor | None = None
        self._latest: Tensor | None = None
        self._own = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mask": None, "_latest": None, "_own": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _own=threading.local())

    @property
    def phases(self) -> Tensor | None:
        """See above. A thread that ran no pass recomputes one, for a gradient: the latest."""
        if torch.compiler.is_compiling():
            return self._latest
        own: Tensor | None = getattr(self._own, "phases", self._latest)
        return own

    @property
    def mask(self) -> Tensor | None:
        """See above."""
        own: Tensor | None = self._mask
        return own if torch.compiler.is_compiling() else getattr(self._own, "mask", None)

    @mask.setter
    def mask(self, mask: Tensor | None) -> None:
        if torch.compiler.is_compiling():
            self._mask = mask
        else:
            self._own.mask = mask

    @property
    def plain(self) -> int:
        """The program of rows that are left alone."""
        return self.programs

    def cells(self, x: Tensor) -> Tensor | None:
        """Return the cell of every token of x, in order; None: all take program 0.

        Parameters
        ----------
        x
            [batch, tokens, hidden]; also [batch * tokens, hidden], or with several streams of each
            token, [batch, tokens, streams, hidden].

        Raises
        ------
        InputError
            If the batch is no multiple of the number of routed rows.
        """
        if self.rows is None and self._latest is None:
            return None
        count = x.shape[:-1].numel()
        cells = torch.zeros(count, dtype=torch.int64, device=x.device)
        if self.rows is not None:
            # beams and the like repeat each row of the batch in its place
            if (x.shape[0] if x.ndim > 2 else count) % self.rows.numel():
                raise InputError(
                    f"the route has {self.rows.numel()} rows, which does not divide a batch of "
                    f"{list(x.shape[:-1])}"
                )
            rows = self.rows.to(x.device)
            cells = rows.repeat_interleave(count // rows.numel(), output_size=count) * PHASES
        if self.phases is not None:
            phases = self.phases.to(x.device)
            batch, given = phases.shape
            tokens = x.shape[1] if x.ndim > 2 else count // batch
            if tokens < given:  # the cache has the others
                phases = phases[:, given - tokens :]
            elif tokens > given:  # the model has tokens of its own before those that it is given
                phases = nn.functional.pad(phases, (tokens - given, 0))
            phases = phases.reshape(-1)
            cells = cells + phases.repeat_interleave(count // phases.numel(), output_size=count)
        return cells

    def find_phases(self, x: Tensor, past: int | Tensor, mask: Tensor | None) -> None:
        """Say of every token whether it is generated, and whether it is its row's last.

        Parameters
        ----------
        x
            [batch, tokens, ...]: what the decoder is called with.
        past
            How many tokens the cache holds: with any, those of this pass are generated.
        mask
            [batch, past + tokens], 1 for tokens, 0 for padding; or None.
        """
        batch, tokens = x.shape[:2]
        place = torch.arange(tokens, device=x.device).expand(batch, tokens)
        last = torch.full((batch, 1), tokens - 1, device=x.device)
        if mask is not None and mask.ndim == 2 and mask.shape[1] >= tokens:
            here = mask[:, -tokens:].to(x.device) != 0
            last = (place * here).amax(dim=1, keepdim=True)
        generated = (past > 0).long() if isinstance(past, Tensor) else int(past > 0)
        self._latest = (place == last).long() + 2 * generated
        if not torch.compiler.is_compiling():
            self._own.phases = self._latest


class TokensFirst(Route):
    """The route of a model whose stream is [tokens, batch, hidden]."""

    def cells(self, x: Tensor) -> Tensor | None:
        """See `Route.cells`."""
        cells = super().cells(x.transpose(0, 1))
        return cells if cells is None else cells.view(x.shape[1], x.shape[0]).T.reshape(-1)


class Program:
    """What one group of sites does: for every program of the patch, the interventions that act.

    Attributes
    ----------
    members
        For every program of the patch, those of its interventions that act at these sites.
    """

    def __init__(self, members: Sequence[Sequence[Intervention]]):
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
            compiled = [compile_program(s) for s in self._sets]
            slots = max(bank.shape[2] for bank, _ in compiled)
            bank = torch.cat([_padded(b, slots, 2) for b, _ in compiled])
            params = torch.cat([_padded(p, slots, 1) for _, p in compiled])
            table = torch.tensor(cells, dtype=torch.int32)
        self.idle = cells[0] < 0  # program 0 does nothing here
        self._slots = slots
        self._tensors = {torch.device("cpu"): (bank, params, table)}
        self.write_params()

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """All that act somewhere, each once."""
        return tuple({id(i): i for s in self._sets for i in s}.values())

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return bank, params and table on a device; copies share every later change."""
        if device not in self._tensors:
            bank, params, table = self._tensors[torch.device("cpu")]
            with torch.inference_mode(False):
                self._tensors[device] = bank.to(device), params.to(device), table.to(device)
        return self._tensors[device]

    def write_params(self) -> None:
        """Write the dials into the tensors that the kernels read: no kernel is made anew."""
        rows = [
            _padded(torch.stack([i.params(i.strength) for i in s])[None], self._slots, 1)
            for s in self._sets
        ]
        new = torch.cat(rows)
        for _, params, _ in self._tensors.values():
            params.copy_(new)


def _acts(intervention: Intervention, phase: int) -> bool:
    generated, last = divmod(phase, 2)
    wanted = intervention.positions
    return (
        wanted == "all"
        or (wanted == LAST and last == 1)
        or (wanted != LAST and (wanted == GENERATED) == (generated == 1))
    )


def _padded(t: Tensor, slots: int, dim: int) -> Tensor:
    """Add slots that do nothing, up to a number that all programs of a bank share."""
    shape = list(t.shape)
    shape[dim] = slots - shape[dim]
    return torch.cat([t, t.new_zeros(shape)], dim=dim)


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
    """One place where the stream is steered: it stands where ``residual + x`` stood.

    Attributes
    ----------
    name
        "embed", or "layers.3.attn" and the like.
    path
        "fused" (in the add), "hook" (after it), both exact.
    link
        The norm that reads this site's output, or None.
    scores
        With ``keep_scores``: what the last pass read, float32 [tokens, slots].
    """

    def __init__(self, name: str, path: str, program: Program, route: Route, like: Tensor) -> None:
        self.name = name
        self.path = path
        self.program = program
        self.route = route
        self.link: Link | None = None
        self.watcher: Watcher | None = None
        self.keep_scores = False
        self.scores: Tensor | None = None
        self._bind(like.device, like.dtype)

    def _bind(self, device: torch.device, dtype: torch.dtype) -> None:
        """Choose what serves this site, once: a call of the model does not look anything up."""
        like = torch.empty(0, device=device, dtype=dtype)
        self.backend = ops.explain(like).chosen
        self._ops = _ops_for(like)
        self._bound = device, dtype
        self.bank, self.params, self._table = self.program.on(device)

    def __getstate__(self) -> dict[str, Any]:  # the ops are found anew
        return {**self.__dict__, "_ops": None, "scores": None, "watcher": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bind(*self._bound)

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Return the steered ``residual + x``."""
        if residual is not None and (x.dtype is not residual.dtype or x.shape != residual.shape):
            dtype = torch.promote_types(x.dtype, residual.dtype)
            x, residual = torch.broadcast_tensors(x.to(dtype), residual.to(dtype))
        if x.shape[-1] != self.bank.shape[-1]:  # several streams side by side
            rows = (-1, self.bank.shape[-1])
            inner = None if residual is None else residual.unflatten(-1, rows)
            return self(x.unflatten(-1, rows), inner).flatten(-2)
        serve, bank, params, table = self._ops, self.bank, self.params, self._table
        if self._bound[0] != x.device or self._bound[1] is not x.dtype:
            # the model was moved after it was patched
            if torch.compiler.is_compiling():
                serve = _ops_for(x)
                bank, params, table = (_placed(self.program, x.device, k) for k in range(3))
            else:
                self._bind(x.device, x.dtype)
                serve, bank, params, table = self._ops, self.bank, self.params, self._table
        grad = torch.is_grad_enabled()
        cells = self.route.cells(x)
        if cells is None and self.program.idle:
            return x if residual is None else residual + x
        route = None if cells is None else table[cells]
        form = "_scores" if self.keep_scores else "" if grad else "_inference"
        link = self.link
        # with gradients the model's own norm runs: a norm is in another gradient checkpoint than
        # the add of the layer before
        weight = None if link is None or grad else link.norm.weight
        if link is not None and is_plain(weight, x):
            op = serve["add_steer_rms_norm", form]
            out = op(x, residual, weight, link.eps, bank, params, route, link.offset)
            normed, h = out[0], out[1]
            link.pending = (h, normed, version(h))
        else:
            out = serve["add_steer", form](x, residual, bank, params, route)
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


def _ops_for(x: Tensor) -> dict[tuple[str, str], Callable[..., Any]]:
    """Return what serves tensors such as x, by op and form."""
    return {
        (op, form): ops.op_for(op + form, x)
        for op in ("add_steer", "add_steer_rms_norm")
        for form in ("", "_inference", "_scores")
    }


@torch.compiler.assume_constant_result
def _placed(program: Program, device: torch.device, which: int) -> Tensor:
    """Return one of a program's tensors on a device: made while tracing, not by the graph."""
    return program.on(device)[which]


class PlainAdd(_StandsForAnAdd):
    """Stands where an add is that no intervention is meant for."""

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Return ``residual + x``."""
        return x if residual is None else residual + x

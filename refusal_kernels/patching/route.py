"""Routes: which program every token of a forward pass takes, by its row and its position."""

import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn

from refusal_kernels.errors import InputError

# What a token may be to an intervention that acts at some positions only.
PHASES = 4  # 2 * generated + last


class Route:
    """Which program every token of a forward pass takes: the rows' programs and the positions.

    Together they are a *cell*, ``program * 4 + 2 * generated + last``, which a `SiteProgram`
    translates for its sites.

    Attributes
    ----------
    programs
        How many there are; as the program of a row it leaves the row alone.
    rows
        int64 [rows]: the program of each row of the batch, or None for program 0 everywhere.
    phases
        int64 [batch, tokens] of the forward pass that this thread runs, or None where no position
        matters.
    prompt
        int64 []: how many tokens ``generate``, which this thread runs, was given; None outside.
    """

    def __init__(self, programs: int) -> None:
        self.programs = programs
        self.rows: Tensor | None = None
        self._prompt: Tensor | None = None
        self._latest: Tensor | None = None
        self._thread = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prompt": None, "_latest": None, "_thread": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _thread=threading.local())

    @property
    def phases(self) -> Tensor | None:
        """See above. A thread that ran no pass recomputes one, for a gradient: the latest."""
        if torch.compiler.is_compiling():
            return self._latest
        phases: Tensor | None = getattr(self._thread, "phases", self._latest)
        return phases

    @property
    def prompt(self) -> Tensor | None:
        """See above."""
        if torch.compiler.is_compiling():
            return self._prompt
        prompt: Tensor | None = getattr(self._thread, "prompt", None)
        return prompt

    @prompt.setter
    def prompt(self, prompt: Tensor | None) -> None:
        self._thread.prompt = self._prompt = prompt

    @property
    def soft(self) -> bool:
        """Whether the first pass of ``generate`` is still to say how long a soft prompt is."""
        return not torch.compiler.is_compiling() and getattr(self._thread, "soft", False)

    @soft.setter
    def soft(self, soft: bool) -> None:
        self._thread.soft = soft

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
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if torch.compiler.is_compiling() or capturing:
            return self._cells(x)
        # the sites of a pass ask for the same, and a tensor of inference mode is of no use outside
        same = x.shape[:-1], x.device, torch.is_inference_mode_enabled()
        rows, phases, kept, cells = getattr(self._thread, "kept", (None, None, None, None))
        if rows is not self.rows or phases is not self.phases or kept != same:
            cells = self._cells(x)
            self._thread.kept = self.rows, self.phases, same, cells
        return cells

    def _cells(self, x: Tensor) -> Tensor:
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

    def find_phases(
        self, x: Tensor, past: int | Tensor | None, real: Tensor | None, virtual: int = 0
    ) -> None:
        """Say of every token whether it is generated, and whether it is its row's last.

        Inside ``generate`` that does not depend on how the tokens are spread over passes: the last
        is the prompt's, and all that is generated has been the last when it was new.

        Parameters
        ----------
        x
            [batch, tokens, ...]: what the decoder is called with.
        past
            How many tokens the cache holds; None: some. Outside ``generate``, with any, those of
            this pass are generated.
        real
            bool [batch, tokens], which are no padding; None: all.
        virtual
            How many tokens a prefix of PEFT puts into an empty cache.
        """
        batch, tokens = x.shape[:2]
        place = torch.arange(tokens, device=x.device).expand(batch, tokens)
        prompt = self.prompt
        if past is None or prompt is None:
            end = tokens if real is None else (place * real).amax(dim=1, keepdim=True) + 1
            generated = True if past is None else past > virtual
            self._latest = (place == end - 1).long() + 2 * generated
        else:
            new = place + past >= prompt
            old = ~new if real is None else ~new & real
            end = (place * old).amax(dim=1, keepdim=True) + 1
            last = new | (old & (place == end - 1) & (past + tokens >= prompt))
            self._latest = last.long() + 2 * new
        if not torch.compiler.is_compiling():
            self._thread.phases = self._latest


class TokensFirst(Route):
    """The route of a model whose stream is [tokens, batch, hidden]."""

    def _cells(self, x: Tensor) -> Tensor:
        cells = super()._cells(x.transpose(0, 1))
        return cells.view(x.shape[1], x.shape[0]).T.reshape(-1)


# What versions and families of transformers call what is kept of the tokens before.
CACHES = ("cache", "past_key_values", "cache_params", "state", "mems")


class Generating:
    """Tells the route how long the prompt is: stands for the ``generate`` of a model."""

    def __init__(self, module: nn.Module, route: Route) -> None:
        self.module = module
        self.route = route

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does."""
        given = (kwargs.get("inputs_embeds"), *args[:1], kwargs.get("inputs"))
        given = (*given, kwargs.get("input_ids"))
        ids = next((x for x in given if isinstance(x, Tensor)), None)
        outer = self.route.prompt
        self.route.prompt = None if ids is None else torch.full((), ids.shape[1], device=ids.device)
        self.route.soft = virtual_tokens(self.module) > 0
        try:
            generate: Any = type(self.module).generate  # type: ignore[attr-defined]
            return generate(self.module, *args, **kwargs)
        finally:
            self.route.prompt, self.route.soft = outer, False


class Positions:
    """Tells the route what kind of token each is: a pre-hook of the decoder."""

    def __init__(self, model: nn.Module, module: nn.Module, route: Route, *, last: bool) -> None:
        self.model = model  # that was patched
        self.route = route
        self.last = last  # whether it matters which token is the last
        self.names = tuple(inspect.signature(type(module).forward).parameters)[1:]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """See above; raises `InputError` where that cannot be known."""
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if kwargs.get("cu_seq_lens_q") is not None:
            raise InputError(
                "several sequences are packed into one row (continuous batching), where it is not "
                'known which tokens are whose; expected positions="all"'
            )
        x = kwargs.get("inputs_embeds")
        x = x if x is not None else kwargs["input_ids"]
        caches = (kwargs.get(name) for name in CACHES)
        past = _past(next((cache for cache in caches if cache is not None), None))
        real = _real(kwargs.get("attention_mask"), x.shape[1], past) if self.last else None
        if self.route.soft and past is not None and self.route.prompt is not None:
            total = torch.as_tensor(past + x.shape[1], device=x.device)
            self.route.prompt = total.maximum(self.route.prompt.to(x.device))
            self.route.soft = False
        virtual = 0 if torch.compiler.is_compiling() else virtual_tokens(self.model)
        self.route.find_phases(x, past, real, virtual)


def virtual_tokens(model: nn.Module) -> int:
    """Return how many tokens PEFT puts before a model's prompts, as embeddings or into the cache.

    They count as the prompt's. A model that is generating for a PEFT model prepares its inputs by
    that one's method.
    """
    prepare = model.__dict__.get("prepare_inputs_for_generation")
    for owner in (model, getattr(prepare, "__self__", None)):
        config = getattr(owner, "active_peft_config", None)
        # while an adapter is disabled, its model's forward is that of the model without
        forward = getattr(owner, "__dict__", {}).get("forward")
        enabled = forward is None or getattr(forward, "__self__", None) is owner
        if enabled and config is not None and getattr(config, "is_prompt_learning", False):
            return int(config.num_virtual_tokens or 0)
    return 0


def _past(cache: Any) -> int | Tensor | None:
    """Return how many tokens a cache holds (of a static one a tensor); None: some."""
    if cache is None:
        return 0
    if not hasattr(cache, "get_seq_length"):
        return None
    layers = getattr(cache, "layers", None)
    if layers and not any(hasattr(layer, "keys") for layer in layers):
        return None if cache.has_previous_state() else 0  # recurrent states, which have no length
    length: int | Tensor = cache.get_seq_length()
    return length


def _real(mask: Any, tokens: int, past: int | Tensor | None) -> Tensor | None:
    """Return which tokens of a pass are no padding, bool [batch, tokens]; None: all.

    A mask is [batch, past + tokens]; or [batch, heads, tokens, keys] of what is seen (true, or 0
    to be added), where no token sees padding; or several of those by kind of attention.
    """
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if m is not None), None)
    if mask is None or tokens == 1:
        return None
    if not isinstance(mask, Tensor):
        raise InputError(
            f"the attention mask is a {type(mask).__name__}, which does not say which token of a "
            'row is its last; expected a tensor, or other positions than "last"'
        )
    if mask.ndim == 2:
        return mask[:, -tokens:] != 0
    seen = (mask if mask.dtype is torch.bool else mask == 0).any(dim=2).any(dim=1)  # [batch, keys]
    if past is None:
        return seen[:, -tokens:]
    keys = torch.arange(tokens, device=mask.device) + past  # a static cache has room after them
    return seen[:, keys.clamp(max=seen.shape[1] - 1)]

"""The error of every method's logits, beside that of the unmodified model.

What the logits should be has the projection in float64, at the places where the paper makes it. The
model is the one that is timed, its weights turned to float64 a module at a time, so that a model
that fits in memory still does.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from refusal_kernels.bench.grid import BenchCell
from refusal_kernels.bench.results import LOGITS_TIMES
from refusal_kernels.bench.worker import BASE, FAR, SITES
from refusal_kernels.bench.worker.models import input_ids
from refusal_kernels.hf.model import decoder, decoder_layers

ROWS = 16384  # of the head at once
NOISE = 1e-7  # how far the stream is moved, to see how sensitive a model is to rounding


class _StayInDouble(TorchFunctionMode):
    """Models turn a norm or a softmax to float32 and back: here what is float64 stays that."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func is Tensor.to:
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextmanager
def _in_double(module: nn.Module) -> Iterator[None]:
    """Have a module's weights in float64 only while it runs."""
    kept: list[tuple[Tensor, Tensor]] = []

    def before(*_: Any) -> None:
        for parameter in module.parameters():
            kept.append((parameter, parameter.data))
            parameter.data = parameter.data.double()

    def after(*_: Any) -> None:
        for parameter, data in kept:
            parameter.data = data
        kept.clear()

    hooks = [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        after()
        for hook in hooks:
            hook.remove()


def reference_logits(
    model: Any,
    ids: Tensor,
    directions: Tensor,
    rows: Sequence[int],
    layers: Sequence[int] | None,
    sites: Collection[str],
    noise: float = 0.0,
) -> Tensor:
    """Return float64 logits of the last position of every row, with the directions projected out.

    The model has ``self_attn`` and ``mlp`` in its blocks. ``directions`` are unit vectors,
    [programs, hidden], and ``rows`` has the program of every row. ``sites`` are among "input",
    "attn", "mlp" and "output" (of the block), in these layers (None: all). ``noise`` moves every
    number of the stream by so much, relatively, at every block's input, the same way every time: it
    shows how sensitive the logits are to rounding.
    """
    r = directions.double().to(model.device)
    r = (r / r.norm(dim=1, keepdim=True))[list(rows)][:, None]  # [batch, 1, hidden]

    def project(x: Tensor) -> Tensor:
        return x - (x * r).sum(-1, keepdim=True) * r

    def on_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (project(args[0]), *args[1:])

    def on_output(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (project(output[0]), *output[1:])
        return project(output)

    generator = torch.Generator().manual_seed(0)

    def disturb(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        z = torch.randn(args[0].shape, generator=generator, dtype=torch.float64)
        return (args[0] * (1 + noise * z.to(args[0].device)), *args[1:])

    body = decoder(model)
    blocks = list(decoder_layers(model))
    with ExitStack() as stack, torch.inference_mode():
        stack.enter_context(_StayInDouble())
        embedded = model.get_input_embeddings()(ids.to(model.device)).double()
        for module in (*blocks, body.get_submodule("norm")):
            stack.enter_context(_in_double(module))
        for number, block in enumerate(blocks):
            if noise:
                stack.callback(block.register_forward_pre_hook(disturb).remove)
            if layers is not None and number not in layers:
                continue
            if "input" in sites:
                stack.callback(block.register_forward_pre_hook(on_input).remove)
            parts = {"attn": "self_attn", "mlp": "mlp", "output": ""}
            for site in set(sites) & set(parts):
                part = block.get_submodule(parts[site])
                stack.callback(part.register_forward_hook(on_output).remove)
        last = body(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, -1]
        head = model.get_output_embeddings().weight
        return torch.cat([last @ part.double().T for part in head.split(ROWS)], dim=1).cpu()


def compare(
    cell: BenchCell,
    model: Any,
    directions: Tensor,
    folder: Path,
    rows: dict[str, dict[str, Any]],
    opened: Mapping[str, Sequence[str]],
) -> None:
    """Compare the logits with those of float64; write the errors and their limits into the rows.

    The workers left their logits in the folder. ``directions`` are unit vectors, [programs,
    hidden]; ``rows`` are by method, and ``opened`` has the methods that are ready, by environment.
    """
    ids = input_ids(asdict(cell), model.config.get_text_config(decoder=True).vocab_size)

    @cache
    def truth(sites: frozenset[str], noise: float = 0.0) -> Tensor:
        where = cell.rows, cell.steered_blocks, sites, noise
        return reference_logits(model, ids, directions, *where)

    def off(environment: str, method: str, sites: Sequence[str]) -> float:
        name = f"{environment.replace(' ', '-')}-{method.replace('/', '-')}.logits"
        saved, wanted = load_file(str(folder / name)), truth(frozenset(sites))
        if "logprobs" in saved:  # what engines give
            return _difference(saved["logprobs"], wanted.log_softmax(-1))
        return _difference(saved["logits"], wanted)

    def sensitivity(sites: Sequence[str]) -> float:
        places = frozenset(sites)
        return _difference(truth(places, NOISE), truth(places))

    for environment, methods in opened.items():
        base = off(environment, BASE, ())
        for method in methods:
            row = rows[method]
            row["base_logits_error"] = base
            sites = () if method == BASE else SITES
            row["logits_error"] = off(environment, method, sites)
            error = row["logits_error"]
            if method != BASE and set(row["sites"]) != set(SITES):
                error = row["logits_error_at_sites"] = off(environment, method, row["sites"])
            row["logits_allowed"] = LOGITS_TIMES * base
            if error > row["logits_allowed"]:
                # without most of its length, the stream is more sensitive to the same rounding
                worse = sensitivity(row["sites"]) / sensitivity(())
                row["logits_allowed"] *= max(1.0, worse)


def _difference(logits: Tensor, truth: Tensor) -> float:
    """Return the largest difference over the largest logit; what cannot be compared is far off."""
    if logits.shape != truth.shape:
        return FAR
    largest = float((logits - truth).abs().max() / truth.abs().max())
    return largest if largest < FAR else FAR  # also where it is no number

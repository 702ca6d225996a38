"""What the logits should be: the projection in float64, at the places where the paper makes it.

The model is the one that is timed, its weights turned to float64 a module at a time, so that a
model that fits in memory still does.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from refusal_kernels.hf.model import decoder, decoder_layers

ROWS = 16384  # of the head at once


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
    sites: Sequence[str],
    noise: float = 0.0,
) -> Tensor:
    """Return the logits of the last position of every row, with the directions projected out.

    Parameters
    ----------
    model
        A transformers model with ``self_attn`` and ``mlp`` in its blocks; as it was, afterwards.
    ids
        [batch, tokens].
    directions
        Unit vectors, [programs, hidden].
    rows
        The program of every row.
    layers
        The blocks in which; None: all.
    sites
        Of "input", "attn", "mlp" and "output" (of the block); none: the unmodified model.
    noise
        By how much, relatively, every number of the stream is moved at every block's input, the
        same way every time: shows how sensitive the logits are to rounding.

    Returns
    -------
    float64 [batch, vocabulary]
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

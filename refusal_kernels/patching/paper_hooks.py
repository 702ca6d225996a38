"""Directional ablation with plain Python hooks, as in the code of Arditi et al. 2024.

Three hooks per block: on its input, on its attention's output and on its MLP's output. It is what
`patch` is measured against, in the tests and in the benchmarks; it is never what `patch` does.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from refusal_kernels.direction import Direction
from refusal_kernels.hf.model import decoder_layers


@contextlib.contextmanager
def paper_hooks(
    model: Any, direction: Direction | Sequence[Direction], layers: Sequence[int] | None = None
) -> Iterator[None]:
    """Ablate a direction at the input of every block and the output of its attention and MLP.

    Parameters
    ----------
    model
        A transformers model whose blocks have ``self_attn`` and ``mlp``.
    direction
        What to remove, or that of each row of the batch. As in the paper's code it is cast to the
        dtype of the activations.
    layers
        The blocks to hook; None: all.
    """
    if one := isinstance(direction, Direction):
        vectors = direction.vector
    else:
        vectors = torch.stack([d.vector for d in direction])[:, None]  # [batch, 1, hidden]
    # once: a copy from the host in every hook would wait for the GPU, and could not be captured
    if (device := next(model.parameters()).device).type != "meta":  # as offloaded ones are
        vectors = vectors.to(device)

    def project(activation: Tensor) -> Tensor:
        r = vectors.to(activation.device)
        r = (r / (r.norm(dim=-1, keepdim=True) + 1e-8)).to(activation.dtype)
        return activation - (activation @ (r.unsqueeze(-1) if one else r.mT)) * r

    def on_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (project(args[0]), *args[1:])

    def on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (project(output[0]), *output[1:])
        return project(output)

    hooks = []
    for number, layer in enumerate(decoder_layers(model)):
        if layers is not None and number not in layers:
            continue
        hooks.append(layer.register_forward_pre_hook(on_input))
        for part in (layer.get_submodule("self_attn"), layer.get_submodule("mlp")):
            hooks.append(part.register_forward_hook(on_output))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

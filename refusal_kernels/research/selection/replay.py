"""Run a model from the input of one layer, without the layers before it.

The model's forward runs as usual, but the skipped layers return their input, and a hook puts the
kept stream into the first layer that runs. This fails for a family whose layers share more than the
stream; `Replay` tries each layer and keeps those that give the same bits.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from refusal_kernels.hf.model import decoder_layers

Change = Callable[[Tensor], Tensor]
"""Takes the input of a layer, [batch, tokens, hidden], and returns what the layer gets instead."""


@contextlib.contextmanager
def changed_input(layer: nn.Module, change: Change) -> Iterator[None]:
    """Change the input of a layer inside the context."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class Replay:
    """Runs a model from the input of one of its layers.

    `forward` runs it on the tokens of one prompt; it is tried on `ids`, whose `inputs` of the
    layers to try are [1, tokens, hidden].
    """

    def __init__(
        self,
        model: Any,
        forward: Callable[[list[int]], Tensor],
        ids: list[int],
        inputs: Mapping[int, Tensor],
    ) -> None:
        self.layers: set[int] = set()  # from which a replay gives the bits of the whole pass
        self._every = decoder_layers(model)
        outputs: list[Any] = []
        handle = self._every[0].register_forward_hook(lambda _, __, output: outputs.append(output))
        try:
            whole = forward(ids)
            forward(ids[::-1])  # state that a layer leaves behind is now another prompt's
        finally:
            handle.remove()
        self._hand_on = _as_tuple if isinstance(outputs[0], tuple) else _as_tensor
        for layer in sorted(inputs, reverse=True):  # no skipped layer runs in between
            try:
                with self.starting_at(layer, inputs[layer]):
                    same = torch.equal(forward(ids), whole)
            except Exception:  # a family may raise anything when shared state is missing
                same = False
            if same:
                self.layers.add(layer)

    @contextlib.contextmanager
    def starting_at(self, layer: int, stream: Tensor) -> Iterator[None]:
        """Run only the layers from `layer` on, with a given input: [batch, tokens, hidden].

        Passes inside take the tokens of that stream, which masks and positions are made from.
        """
        skipped = [module.__dict__ for module in self._every[:layer]]
        # an instance has its own forward where accelerate wraps it
        before = [attributes.get("forward") for attributes in skipped]
        try:
            for attributes in skipped:
                attributes["forward"] = self._hand_on
            with changed_input(self._every[layer], lambda _: stream):
                yield
        finally:
            for attributes, forward in zip(skipped, before, strict=True):
                del attributes["forward"]
                if forward is not None:
                    attributes["forward"] = forward


def _as_tensor(*args: Any, **kwargs: Any) -> Any:
    return args[0] if args else kwargs["hidden_states"]


def _as_tuple(*args: Any, **kwargs: Any) -> Any:
    return (_as_tensor(*args, **kwargs),)

"""Run a model from the middle: the layers before some layer do nothing, its input is given.

Nothing of a family's forward is copied: the model runs as ever, but the skipped layers hand on what
they are given, and a hook puts the kept stream into the first layer that runs. A family whose
layers share more than the stream does not survive this; `Replay` finds out by trying.
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
    """Change the input of a layer, while inside."""

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

    Parameters
    ----------
    model
        A transformers causal language model.
    forward
        Runs it on the tokens of one prompt, and returns what it gives.
    ids
        Those of the prompt that it is tried out on.
    inputs
        By layer, on that prompt: [1, tokens, hidden]. Where the model may be started.

    Attributes
    ----------
    layers : set of int
        Those where that gives the bits of the whole pass.
    """

    def __init__(
        self,
        model: Any,
        forward: Callable[[list[int]], Tensor],
        ids: list[int],
        inputs: Mapping[int, Tensor],
    ) -> None:
        self.layers: set[int] = set()
        self._every = decoder_layers(model)
        outputs: list[Any] = []
        handle = self._every[0].register_forward_hook(lambda _, __, output: outputs.append(output))
        try:
            whole = forward(ids)
            forward(ids[::-1])  # whatever a skipped layer has left somewhere is another prompt's
        finally:
            handle.remove()
        self._hand_on = _as_tuple if isinstance(outputs[0], tuple) else _as_tensor
        for layer in sorted(inputs, reverse=True):  # so that no skipped layer has run in between
            try:
                with self.starting_at(layer, inputs[layer]):
                    same = torch.equal(forward(ids), whole)
            except Exception:  # whatever a family raises when what its layers share is not there
                same = False
            if same:
                self.layers.add(layer)

    @contextlib.contextmanager
    def starting_at(self, layer: int, stream: Tensor) -> Iterator[None]:
        """Let only the layers from one on run, with a given input: [batch, tokens, hidden].

        The passes inside take the tokens that the stream belongs to: masks and positions are made
        from them.
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

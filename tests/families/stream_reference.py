"""Steering of the residual stream by following it through a forward pass: a reference.

``steered_forward`` applies an edit to what the embedding puts into the residual stream and to
the result of every residual add in the decoder layers. It reads no source and knows no layer: a
torch function mode follows the stream by the identity of its tensors.

How the stream is followed
    A hook marks the hidden states that enter a decoder layer. A mark passes on to views, casts,
    dropout, and products or sums with a number, a parameter or a buffer; nothing else, so norms
    and projections end it. In a layer, the sum of a marked tensor and an unmarked one of the same
    size is a stream sum, and marked itself.

Which sums are edited
    Not all of them. In ``residual + attn + mlp`` the first sum is a partial one, and an additive
    edit must be applied once, to the last; and a sum that only a branch reads (in Zamba, the
    input of the Mamba block) is not the stream. Both show by what happens to the sum later. So
    there are two passes: the first, unedited, numbers the sums and notes who reads them; the
    second edits, as it is made, each sum which

    - is carried on: it is an operand of a later stream sum, or leaves a layer, and
    - is not partial: something other than one addition reads it, or it leaves a layer.

    The second pass makes the same sums in the same order, since an edit changes values only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Edit = Callable[[Tensor], Tensor]

_POST_NORM = "post-norm: LayerNorm follows the add, so the stream is re-normalized"
_HYPER = "hyper-connections: several streams side by side, mixed by learned matrices"
_ALTUP = "altup: several predicted streams, of which a layer computes one and corrects the others"
_TOWERS = "byte encoder, patch transformer and byte decoder, joined by cross-attention"

# What has no single residual stream that blocks read from and add to.
NOT_A_STREAM: dict[str, str] = dict.fromkeys(
    """bart bert bert-generation big_bird blenderbot-small camembert data2vec-text electra ernie
    git marian mvp openai-gpt plbart prophetnet rembert roberta roc_bert roformer trocr xlm
    xlm-roberta xmod""".split(),
    _POST_NORM,
) | {
    "blt": _TOWERS,
    "deepseek_v4": _HYPER,
    "gemma3n": _ALTUP,
    "gemma3n_text": _ALTUP,
    "hrm_text": "two recurrent states, summed between stacks that end in a norm",
    "hy_v4": _HYPER,
    "minimax": "post-norm: the residual of each block is the output of its norm",
    "qwen4_exp": _HYPER,
    "qwen4_exp_text": _HYPER,
    "reformer": "reversible: two streams, each written from the other",
    "xlnet": _POST_NORM,
}

# layers whose stream starts at the output of a submodule of the first of them
_STARTS = {"rwkv": "pre_ln"}

# layers of which some start a new stream, at the output of a submodule: (which, the submodule)
_RESTARTS = dict.fromkeys(
    ("inkling2_text", "inkling2_loop_text"), ("is_block_boundary", "post_attention_convolution")
)

# models whose norms have no weights, so that a row of the stream is scaled and keeps its direction
_ROWS_SCALED = frozenset({"dory"})

_ADDS = frozenset("add __add__ __radd__ add_ __iadd__".split())
_SCALES = frozenset(
    """mul __mul__ __rmul__ mul_ __imul__ multiply div __div__ __truediv__ div_ __itruediv__
    true_divide""".split()
)
_VIEWS = frozenset(
    """view reshape view_as reshape_as unsqueeze squeeze flatten unflatten contiguous clone detach
    to float type type_as half bfloat16 double dropout dropout_ __getitem__""".split()
)
_METADATA = frozenset(
    """__get__ size dim stride numel nelement is_floating_point is_contiguous data_ptr
    element_size get_device is_complex __len__ __repr__ __hash__ storage_offset""".split()
)


@dataclass
class _Sum:
    """A stream sum (or a layer's input) and what happened to it."""

    reads: int = 0  # by anything but an addition to it
    added: int = 0  # stream sums with it as an operand
    leaves: bool = False  # a layer's input or output

    @property
    def edited(self) -> bool:
        carried = self.added > 0 or self.leaves
        partial = self.added == 1 and self.reads == 0 and not self.leaves
        return carried and not partial


class _Follow(TorchFunctionMode):
    """Follow the stream; edit the sums that `plan` says, or plan them if there is none.

    Attributes
    ----------
    sums : list of _Sum
        The stream sums in the order in which they were made.
    """

    def __init__(
        self,
        constants: Iterable[Tensor],
        edit: Edit | None = None,
        plan: list[_Sum] | None = None,
        record: list[Tensor] | None = None,
        rows_scaled: bool = False,
    ) -> None:
        super().__init__()
        self._rows_scaled = rows_scaled
        self.sums: list[_Sum] = []
        self.depth = 0  # of decoder layers that are running
        self.started = False
        self._constants = {id(tensor) for tensor in constants}
        self._edit, self._plan, self._record = edit, plan, record
        self._marks: dict[int, tuple[Tensor, _Sum]] = {}  # holds the tensors: no id is reused

    def mark(self, tensor: Tensor, node: _Sum) -> None:
        self._marks[id(tensor)] = (tensor, node)

    def node(self, tensor: Any) -> _Sum | None:
        return self._marks[id(tensor)][1] if id(tensor) in self._marks else None

    def edited(self, tensor: Tensor) -> Tensor:
        """Return the tensor after the edit, if this is the pass that edits."""
        if self._edit is None:
            return tensor
        tensor = self._edit(tensor)
        if self._record is not None:
            self._record.append(tensor.clone())  # a later operation may be in place
        return tensor

    def start(self, tensor: Tensor) -> Tensor:
        """Let the stream start with a tensor, edited."""
        self.started = True
        tensor = self.edited(tensor)
        self.mark(tensor, _Sum())
        return tensor

    def enter(self, tensor: Tensor) -> None:
        """Note that a tensor enters or leaves a layer."""
        if node := self.node(tensor):
            node.leaves = True
        elif self.depth:  # made between the layers: the stream, but no sum to edit
            self.mark(tensor, _Sum())

    def _is_constant(self, value: Any) -> bool:
        """Whether a mark survives an addition to or product with a value."""
        if isinstance(value, Tensor):
            of_rows = self._rows_scaled and value.shape[-1:] == (1,)
            return id(value) in self._constants or value.dim() == 0 or of_rows
        return isinstance(value, (int, float))

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        streams = [tensor for tensor in _tensors((args, kwargs)) if self.node(tensor)]
        marked = [self._marks[id(tensor)][1] for tensor in streams]
        if not marked or name in _METADATA:
            return result
        if isinstance(result, Tensor) and result.is_floating_point():
            first, stream = args[0] if args else None, streams[0]
            others = [value for value in args[:2] if self.node(value) is None]
            same = result.numel() == stream.numel() and result.shape[-1] == stream.shape[-1]
            if name in _VIEWS and same and stream is first:
                self.mark(result, marked[0])
                return result
            if name in _ADDS | _SCALES and same and len(marked) == 1 and len(others) == 1:
                if self._is_constant(others[0]):
                    self.mark(result, marked[0])
                    return result
                if name in _ADDS and self.depth and others[0].numel() == result.numel():
                    return self._sum(result, marked[0], in_place=result is first)
            if name == "matmul" and stream is args[-1] and result.shape == stream.shape:
                self.mark(result, marked[0])  # parallel streams, mixed among themselves
                return result
        for node in marked:
            node.reads += 1
        if isinstance(result, Tensor) and id(result) in self._marks:
            del self._marks[id(result)]  # overwritten in place by something else
        return result

    def _sum(self, result: Tensor, operand: _Sum, in_place: bool) -> Tensor:
        """Take note of a new stream sum; return it, edited if planned."""
        operand.added += 1
        node = _Sum()
        self.sums.append(node)
        if self._plan is not None and self._plan[len(self.sums) - 1].edited:
            edited = self.edited(result)
            result = result.copy_(edited) if in_place else edited
        self.mark(result, node)
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of the text decoder: the elements of its outermost lists of modules.

    Of those with as many elements as the text configuration has layers; without one, the longest.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and not any(name.startswith(outer + ".") for outer in lists)
            and not any(part in name for part in ("vision", "visual", "image", "audio", "mtp"))
            and any(True for block in module for _ in block.children())  # no list of embeddings
        ):
            lists[name] = module
    if not lists:
        raise ValueError(f"no list of layers in {type(model).__name__}")
    config = model.config.get_text_config(decoder=True)
    wanted = {getattr(config, key, None) for key in ("num_hidden_layers", "num_layers")}
    found = [layers for layers in lists.values() if len(layers) in wanted]
    found = found or [max(lists.values(), key=len)]
    return [layer for layers in found for layer in layers]


@torch.no_grad()
def _follow(model: nn.Module, inputs: dict[str, Tensor], mode: _Follow) -> Tensor:
    """Run the model with the mode on and the hooks that tell it of the layers."""
    layers = decoder_layers(model)
    start = _STARTS.get(model.config.model_type)

    def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mode.depth += 1
        # the first is the stream, by position or by name
        stream = next(t for t in _tensors((args, kwargs)) if t.is_floating_point())
        if mode.started or start is not None:
            mode.enter(stream)
            return args, kwargs
        edited = mode.start(stream)

        def swap(value: Any) -> Any:
            return edited if value is stream else value

        return tuple(map(swap, args)), {key: swap(value) for key, value in kwargs.items()}

    def after(_: nn.Module, args: tuple, output: Any) -> None:
        for tensor in _tensors(output):
            if mode.node(tensor):
                mode.enter(tensor)
        mode.depth -= 1

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    starts = [] if start is None else [layers[0].get_submodule(start)]
    if model.config.model_type in _RESTARTS:
        which, path = _RESTARTS[model.config.model_type]
        starts += [layer.get_submodule(path) for layer in layers if getattr(layer, which)]
    for module in starts:
        hooks.append(module.register_forward_hook(lambda _, args, output: mode.start(output)))
    try:
        with mode:
            return model(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()


def steered_forward(
    model: nn.Module, inputs: dict[str, Tensor], edit: Edit, record: list[Tensor] | None = None
) -> Tensor:
    """Return the logits of a forward pass with the residual stream edited everywhere.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model of Transformers, in eval mode.
    inputs : dict of str to torch.Tensor
        Its keyword arguments. No cache: there are two passes.
    edit : callable
        Takes a tensor with the hidden size as its last dimension and returns the edited one.
    record : list of torch.Tensor, optional
        Receives every edited tensor, in order.

    Returns
    -------
    torch.Tensor
        The logits.
    """
    constants = [*model.parameters(), *model.buffers()]
    rows_scaled = model.config.model_type in _ROWS_SCALED
    plan = _Follow(constants, rows_scaled=rows_scaled)
    _follow(model, inputs, plan)
    mode = _Follow(constants, edit, plan.sums, record, rows_scaled)
    logits = _follow(model, inputs, mode)
    if len(mode.sums) != len(plan.sums):
        raise RuntimeError(f"{len(mode.sums)} sums in the second pass, {len(plan.sums)} before")
    return logits


def main(model_types: list[str]) -> int:
    """Check the given families, or all decoders, and print the number of edits of each."""
    import tiny_families

    torch.set_num_threads(1)
    failed = 0
    decoders = [name for name in tiny_families.MODEL_TYPES if tiny_families.kind(name) == "decoder"]
    chosen = model_types or decoders
    for model_type in chosen:
        if model_type in tiny_families.CANNOT:
            continue
        try:
            line = check(tiny_families.build(model_type), tiny_families.inputs)
        except Exception as error:
            failed += 1
            line = f"ERROR {type(error).__name__}: {' '.join(str(error).split())[:160]}"
        print(model_type, line, NOT_A_STREAM.get(model_type, ""))
    return bool(failed)


def check(model: nn.Module, make_inputs: Callable) -> str:
    """Check the reference on a model; return a line about it."""
    inputs = make_inputs(model)
    with torch.no_grad():
        plain = model(**inputs).logits
    problems = []
    if not torch.equal(steered_forward(model, inputs, lambda h: h), plain):
        problems.append("an edit that does nothing changes the logits")
    record: list[Tensor] = []
    directions: dict[int, Tensor] = {}

    def direction(size: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        r = torch.randn(size, generator=generator)
        return directions.setdefault(size, r / r.norm())

    def project(h: Tensor) -> Tensor:
        r = direction(h.shape[-1])
        return h - (h @ r).unsqueeze(-1) * r

    logits = steered_forward(model, inputs, project, record)
    if torch.equal(logits, plain):
        problems.append("the edit does nothing")
    for h in record:
        if (h @ direction(h.shape[-1])).abs().gt(1e-4 * h.norm(dim=-1)).any():
            problems.append("a recorded tensor has the direction")
    names = [type(layer).__name__ for layer in decoder_layers(model)]
    return f"{len(record)} edits, {len(names)} layers ({' '.join(dict.fromkeys(names))}) " + (
        "; ".join(problems) or "ok"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

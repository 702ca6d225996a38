"""Batches that do not change a prompt's result, for models where padding or company does.

Recurrent states, convolutions and the choice of tokens in sparse attention may read what stands
before a prompt, whatever the mask says. Whether they do is found by running some prompts alone and
in one batch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from refusal_kernels.hf.batches import Batch, Batches
from refusal_kernels.hf.checks import check_tokens, embedded_tokens
from refusal_kernels.hf.forward import LAST, model_inputs
from refusal_kernels.hf.greedy import decode
from refusal_kernels.hf.model import decoder_layers, input_device, layer_input, text_config

PROMPTS = 4  # that are tried, of different lengths
LAST_TOKENS = 4  # of each prompt, that are compared
NEW_TOKENS = 3  # that are decoded with a cache
# what configurations call the number of tokens that sparse attention reads
BUDGETS = ("index_topk", "indexer_budget")


class _Known(NamedTuple):
    """What was found of a model."""

    padding: int = 0  # how much was tried
    equal: bool = False  # whether a batch has to be of equal lengths
    single: bool = False  # whether it has to be of one prompt


# by model, and whether tokens are decoded too
_KNOWN: WeakKeyDictionary[nn.Module, dict[bool, _Known]] = WeakKeyDictionary()


def fitted(model: Any, batches: Batches, *, new_tokens: int = 0) -> Batches:
    """Return batches that give a prompt the same result in every batch.

    Parameters
    ----------
    model
        A transformers causal language model.
    batches
        The prompts. Where padding changes their results they are batched by equal lengths, and
        where other prompts do, one by one.
    new_tokens
        How many tokens are decoded after each prompt, with a cache.

    Raises
    ------
    InputError
        If the model has no embedding of a token, or too few positions.
    """
    count = batches.prompts
    if count:
        check_tokens(model, int(batches.tokens.max()), int(batches.ends.diff().max()), new_tokens)
    some = sorted({(count - 1) * k // (PROMPTS - 1) for k in range(PROMPTS)}) if count else []
    rows = [batches.ids(int(batches.order[place])) for place in some]
    given = batches.batch_size, rows, batches.pad_id
    fit = batches.cut(*batch_limits(model, *given, decoding=new_tokens > 0))
    if fit.pad_id >= (embedded_tokens(model) or fit.pad_id + 1):
        fit.pad_id = 0  # masked, so any will do that has an embedding
    return fit


def batch_limits(
    model: Any,
    batch_size: int,
    prompts: Sequence[Sequence[int]],
    pad_id: int = 0,
    *,
    decoding: bool = False,
) -> tuple[int, bool]:
    """Return the batch size that a model allows, and whether a batch has to be of equal lengths.

    Parameters
    ----------
    batch_size
        As large as it may be.
    prompts
        Token ids of some prompts, the longest and the shortest among them. What was found with as
        much padding is known from then on.
    """
    lengths = [len(ids) for ids in prompts] or [0]
    padding = max(lengths) - min(lengths)
    if batch_size == 1 or len(prompts) < 2:
        return batch_size, False
    every = _KNOWN.setdefault(model, {})
    known = every.get(decoding, _Known())
    if padding > known.padding and not known.equal:
        try:
            known = every[decoding] = _try(model, prompts, padding, pad_id, decoding)
        except Exception:  # the run itself then raises what is wrong with the model
            return batch_size, False
    budgets = [getattr(text_config(model), name, None) for name in BUDGETS]
    # where fewer tokens are read than there are, padding may take the place of some
    sparse = any(isinstance(budget, int) and budget < max(lengths) for budget in budgets)
    return 1 if known.single else batch_size, (known.equal or sparse) and padding > 0


def _try(
    model: Any, prompts: Sequence[Sequence[int]], padding: int, pad_id: int, decoding: bool
) -> _Known:
    options = pad_id, decoding, min(LAST_TOKENS, *map(len, prompts))
    alone = [_results(model, [ids], *options)[0] for ids in prompts]
    if all(map(_same, alone, _results(model, prompts, *options))):
        return _Known(padding)
    beside = [prompts[0], list(reversed(prompts[0]))]
    equal = _same(alone[0], _results(model, beside, *options)[0])
    return _Known(padding, equal=True, single=not equal)


class _Result(NamedTuple):
    """What was computed for a prompt."""

    streams: list[Tensor]  # the inputs of all layers at its last tokens, pass after pass
    logits: list[Tensor]  # of every pass


@torch.inference_mode()
def _results(
    model: Any, rows: Sequence[Sequence[int]], pad_id: int, decoding: bool, last: int
) -> list[_Result]:
    """Run prompts in one batch, and keep the streams of so many tokens at the end of each."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    inputs = model_inputs(Batch(list(range(len(rows))), ids, mask), input_device(model))
    streams: list[Tensor] = []

    def see(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = layer_input(layer, args, kwargs)
        if stream.ndim > 2 and stream.shape[0] == len(rows):  # else it has several streams
            streams.append(stream[:, -last:].cpu())

    hooks = [
        layer.register_forward_pre_hook(see, with_kwargs=True) for layer in decoder_layers(model)
    ]
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code may ignore these hooks
            if decoding:
                options: dict[str, Any] = dict(output_logits=True, return_dict_in_generate=True)
                given = inputs["input_ids"], inputs["attention_mask"]
                logits = decode(model, *given, NEW_TOKENS, (), pad_id, **options).logits
            else:
                logits = [model(**inputs, use_cache=False, logits_to_keep=LAST).logits[:, -1]]
    finally:
        for hook in hooks:
            hook.remove()
    return [
        _Result([stream[row] for stream in streams], [step[row].cpu() for step in logits])
        for row in range(len(rows))
    ]


def _same(alone: _Result, beside: _Result) -> bool:
    """Whether two runs differ by rounding alone."""
    each = len(alone.streams) // len(alone.logits)  # layers called in a pass
    # generation returns logits in float32, whatever they were computed in
    eps = max(torch.finfo(x.dtype).eps for x in (*alone.streams, *alone.logits))
    for step, (a, b) in enumerate(zip(alone.logits, beside.logits, strict=True)):
        passed = slice(each * step, each * (step + 1))
        pairs = zip(alone.streams[passed], beside.streams[passed], strict=True)
        if not all(_close(x, y, (4 + depth) * eps) for depth, (x, y) in enumerate(pairs)):
            return False
        if not _close(a, b, (4 + each) * eps):
            return False
        if a.argmax() != b.argmax():  # a tie: what follows is another text
            break
    return True


def _close(a: Tensor, b: Tensor, rounding: float) -> bool:
    """Compare vectors [..., size], relative to their norms."""
    difference = (a.double() - b.double()).norm(dim=-1)
    return bool((difference <= (1e-4 + rounding) * a.double().norm(dim=-1)).all())

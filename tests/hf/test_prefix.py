"""Passes that begin after a common prefix, against whole passes."""

from typing import Any

import pytest
import tiny_families
import torch
from tiny import tiny_model

import refusal_kernels as rk
from refusal_kernels.hf.batches import Batches
from refusal_kernels.hf.forward import find_prefix, next_token_logits, read_inputs
from refusal_kernels.hf.model import decoder, decoder_layers
from refusal_kernels.hf.prefix import common_prefix, run_prefix

PREFIX = [11, 12, 13, 14, 15, 16]
# the last prompt needs more padding than the prefix has tokens
PROMPTS = [PREFIX + list(range(20 + more, 20 + 2 * more)) for more in (11, 8, 3)]


def test_common_prefix() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 4], [1, 2, 3, 5]], 4) == [1, 2]
    assert common_prefix([[1, 2], [1, 2]], 2) == [1, 2]
    assert common_prefix([[1, 2, 3], [2, 3]], 3) == []
    assert common_prefix([[1, 2, 3], [1, 2, 4]], 11) == []  # too few of eleven


def test_batches_know_it() -> None:
    batches = Batches(PROMPTS, pad_id=0, batch_size=2)
    assert batches.longest == 17
    assert batches.common(after=3) == PREFIX
    assert batches.common(after=5) == PREFIX[:4]  # the shortest prompt has nine tokens
    assert batches.common(after=9) == batches.common(after=12) == []


def padded() -> Any:
    return Batches(PROMPTS, pad_id=0, batch_size=8)[0]


def model_of(family: str) -> Any:
    if family == "window":  # shorter than the padding, and than the prefix
        return tiny_model("mistral", sliding_window=4)
    return tiny_families.build(family)


KEPT = "window llama gpt2 opt bloom mpt falcon gptj gemma2 phi3 mixtral olmo2 cohere2"


@pytest.mark.parametrize("family", KEPT.split())
@pytest.mark.filterwarnings("ignore")
def test_a_padded_batch_gives_what_whole_passes_give(family: str) -> None:
    model, batch = model_of(family), padded()
    prefix = find_prefix(model, PROMPTS)
    assert prefix is not None and prefix.ids == PREFIX
    last = len(decoder_layers(model)) - 1
    whole: dict[int, torch.Tensor] = {}
    after: dict[int, torch.Tensor] = {}
    read_inputs(model, batch, last, whole.__setitem__)
    read_inputs(model, batch, last, after.__setitem__, prefix)
    assert list(after) == list(range(last + 1))
    real = batch.attention_mask[:, len(PREFIX) :].bool()
    for layer, stream in after.items():
        expected = whole[layer][:, len(PREFIX) :]
        torch.testing.assert_close(stream[real], expected[real], rtol=1e-5, atol=1e-5)
    logits = next_token_logits(model, batch, prefix)
    torch.testing.assert_close(logits, next_token_logits(model, batch), rtol=1e-5, atol=1e-5)


def test_every_row_takes_its_version() -> None:
    model = tiny_model("qwen3")
    directions = [rk.Direction(torch.randn(64)) for _ in range(3)]
    prompts = [[*PREFIX, 20, 21 + k] for k in range(4)]
    rows, ids = [2, 0, 0, 1], torch.tensor(prompts)
    batch = Batches(prompts, 0, 4)[0]
    with rk.patch(model, *([rk.Ablate(d)] for d in directions)) as handle:
        with handle.route([0, 1, 2]):
            edited = run_prefix(model, PREFIX, 3)
        with handle.route(rows):
            found = next_token_logits(model, batch, edited, rows)
    for row, number in enumerate(rows):
        with rk.patch(model, rk.Ablate(directions[number])), torch.no_grad():
            alone = model(ids[row : row + 1]).logits[0, -1]
        torch.testing.assert_close(found[row], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mamba", "recurrent_gemma", "bamba", "qwen3_next"])
@pytest.mark.filterwarnings("ignore")
def test_a_state_beside_keys_and_values_is_found(family: str) -> None:
    assert find_prefix(tiny_families.build(family), PROMPTS) is None


@pytest.mark.full
@pytest.mark.parametrize("family", tiny_families.MODEL_TYPES)
@pytest.mark.filterwarnings("ignore")
def test_to_try_it_leaves_nothing_behind(family: str) -> None:
    """And what passes agrees to rounding, in every type that runs on text alone."""
    batch = Batches(PROMPTS[:1], pad_id=0, batch_size=1)[0]
    try:
        model = tiny_families.build(family)
        whole = next_token_logits(model, batch)
    except Exception as error:  # encoders, halves of models, and what cannot be built
        pytest.skip(f"{family} cannot be run so: {error}")
    prefix = find_prefix(model, PROMPTS)
    assert torch.equal(next_token_logits(model, batch), whole)
    if prefix is not None:
        after = next_token_logits(model, batch, prefix)
        torch.testing.assert_close(after, whole, rtol=1e-5, atol=2e-5)


def test_a_model_that_ignores_the_cache_is_found() -> None:
    model = tiny_model()
    inner = decoder(model)
    forward = inner.forward

    def forgetful(*args: Any, cache: Any = None, **kwargs: Any) -> Any:
        if cache is not None and cache.get_seq_length():
            kwargs["attention_mask"] = kwargs["attention_mask"][:, -1:].expand(-1, 11)
            return forward(*args, **kwargs)
        return forward(*args, cache=cache, **kwargs)

    assert find_prefix(model, PROMPTS) is not None
    inner.forward = forgetful
    assert find_prefix(model, PROMPTS) is None


def test_without_a_prefix() -> None:
    model = tiny_model()
    assert find_prefix(model, [[5, 6, 7], [6, 7, 8]]) is None
    assert find_prefix(model, [[5, *range(10, 30)], [5, *range(11, 30)]]) is None  # one of 21

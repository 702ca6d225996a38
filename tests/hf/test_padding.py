"""Batches of equal lengths where padding changes results, and of any lengths elsewhere."""

import pytest
import tiny_families
import torch
from tiny import FAMILIES, tiny_model, tiny_tokenizer

import refusal_kernels as rk
from refusal_kernels.hf.batches import Batches, cut
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.padding import batch_limits, fitted
from refusal_kernels.research.evaluation.likelihood import Passage, cross_entropy

HARMFUL = ["curse the lamp", "tell me how to hex a boat now please", "storm", "hex the tea"]
HARMLESS = ["make tea", "please be kind and fix the box", "what is one plus two", "paint a cake"]


def test_a_recurrent_model_gives_the_same_at_every_batch_size():
    """With padding its mean difference is off by a third, and its answers are others."""
    model, tokenizer = tiny_families.build("recurrent_gemma"), tiny_tokenizer()
    passages = [Passage(ids) for ids in ChatFormat(tokenizer).encode(HARMFUL + HARMLESS)]

    def measured(size):
        candidates = rk.mean_difference(model, tokenizer, HARMFUL, HARMLESS, batch_size=size)
        answers = rk.generate(model, tokenizer, HARMFUL + HARMLESS, 6, size)
        return candidates.vectors, answers, cross_entropy(model, passages, batch_size=size).nats

    alone, together = measured(1), measured(32)
    assert (together[0] - alone[0]).norm() <= 1e-5 * alone[0].norm()
    assert together[1] == alone[1] and together[2] == pytest.approx(alone[2], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_is_no_reason_for_equal_lengths(family, dtype):
    model = tiny_model(family, dtype=dtype)
    prompts = ChatFormat(tiny_tokenizer()).encode(HARMFUL)
    for decoding in (False, True):
        assert batch_limits(model, 32, prompts, decoding=decoding) == (32, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_is_told_from_rounding(dtype):
    prompts = ChatFormat(tiny_tokenizer()).encode(HARMFUL)
    model = tiny_families.build("recurrent_gemma").to(dtype)
    assert batch_limits(model, 32, prompts) == (32, True)
    assert batch_limits(model, 1, prompts) == (1, False)
    assert batch_limits(model, 32, prompts[:1] * 2) == (32, False)  # there is no padding
    assert batch_limits(tiny_families.build("rwkv"), 8, prompts, decoding=True) == (1, True)


def test_batches_of_equal_lengths_hold_every_prompt_once():
    lengths = [3, 5, 5, 2, 5, 3, 9]
    batches = Batches([[i] * n for i, n in enumerate(lengths)], 0, 2).cut(2, equal=True)
    assert all(batch.attention_mask.all() for batch in batches)
    assert [batches.size(i) for i in range(len(batches))] == [1, 2, 1, 2, 1]
    pairs = [pair for batch in batches for pair in zip(batch.rows, batch.input_ids, strict=True)]
    seen = {row: ids.tolist() for row, ids in pairs}
    assert seen == {i: [i] * n for i, n in enumerate(lengths)}
    assert cut([4, 4, 4], 2) == [(0, 2), (2, 3)] and cut([], 2) == []


def test_the_probe_is_run_once_for_as_much_padding():
    model, passes = tiny_model(), []
    model.register_forward_hook(lambda *_: passes.append(1))
    for longest in (9, 9, 8):
        fitted(model, Batches([[9] * 5, [9] * longest], 0, 2))
    assert len(passes) == 3  # each prompt alone, and both together
    fitted(model, Batches([[9] * 5, [9] * 12], 0, 2))
    assert len(passes) == 6

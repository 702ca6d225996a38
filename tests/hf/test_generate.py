"""Greedy generation, against plain loops without a cache."""

import pytest
import torch
from tiny import FAMILIES, greedy, tiny_model, tiny_tokenizer

from refusal_kernels.errors import InputError
from refusal_kernels.hf.generate import generate
from refusal_kernels.hf.greedy import last_alone

HARMFUL = ["curse the lamp", "tell me how to hex a boat now please", "storm"]
HARMLESS = ["make tea", "please be kind and fix the box", "what is one plus two", "paint a cake"]


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_greedy_and_does_not_depend_on_the_batch(family: str) -> None:
    model = tiny_model(family)
    expected = [greedy(model, prompt, 6) for prompt in HARMFUL + HARMLESS]
    assert len(set(expected)) > 3
    for batch_size in (3, 64):
        got = generate(model, tiny_tokenizer(), HARMFUL + HARMLESS, 6, batch_size)
        assert got == expected


def test_the_models_own_generation_settings_do_not_interfere() -> None:
    model = tiny_model()
    expected = [greedy(model, prompt, 8) for prompt in HARMLESS]
    config = model.generation_config
    config.do_sample, config.temperature, config.top_k, config.num_beams = True, 5.0, 3, 2
    config.repetition_penalty, config.no_repeat_ngram_size = 3.0, 1
    config.max_length, config.min_new_tokens = 3, None
    assert generate(model, tiny_tokenizer(), HARMLESS, 8) == expected
    assert config.do_sample and config.num_beams == 2  # and are left as they were


LEAKS = {
    "stop_strings": ["tea"],  # which asks for a tokenizer
    "suppress_tokens": [7, 8, 11, 12],
    "begin_suppress_tokens": [11],
    "bad_words_ids": [[11]],
    "sequence_bias": [[[11], -50.0]],
    "forced_eos_token_id": 2,
    "min_length": 30,
    "guidance_scale": 2.0,
    "exponential_decay_length_penalty": [2, 2.0],
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
    "watermarking_config": {"bias": 5.0},
    "max_time": 0.0,
}


@pytest.mark.parametrize("name", LEAKS)
def test_nothing_of_the_models_own_settings_is_used(name: str) -> None:
    model = tiny_model()
    expected = [greedy(model, prompt, 8) for prompt in HARMLESS]
    setattr(model.generation_config, name, LEAKS[name])
    before = model.generation_config
    assert generate(model, tiny_tokenizer(), HARMLESS, 8) == expected
    assert model.generation_config is before and getattr(before, name) == LEAKS[name]


def test_generation_gives_the_head_what_is_contiguous() -> None:
    """Otherwise its weights are copied for every row, in bfloat16 on a CPU."""
    model, seen = tiny_model(), []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    generate(model, tiny_tokenizer(), ["make tea", "storm"], max_new_tokens=2)
    assert seen and all(h.shape[1] == 1 and h.is_contiguous() for h in seen)
    assert last_alone(torch.nn.Linear(2, 2)) == {}  # which would be an unknown argument


def test_generation_stops_at_any_end_token() -> None:
    model = tiny_model()
    long = [greedy(model, prompt, 8) for prompt in HARMLESS]
    tokenizer = tiny_tokenizer()
    ends = [tokenizer.convert_tokens_to_ids(text.split()[3]) for text in long]
    model.generation_config.eos_token_id = ends
    expected = [greedy(model, prompt, 8, (2, *ends)) for prompt in HARMLESS]
    assert generate(model, tokenizer, HARMLESS, 8) == expected
    assert all(len(text.split()) <= 3 for text in expected)
    # rows that end early are padded, here with a word that is not special
    tokenizer.pad_token = "tea"
    assert generate(model, tokenizer, HARMLESS, 8) == expected


def test_generate_refuses_bad_input() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(InputError, match="no prompt"):
        generate(model, tokenizer, [])
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        generate(model, tokenizer, HARMLESS, 0)

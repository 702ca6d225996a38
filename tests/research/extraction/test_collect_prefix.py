"""What all prompts begin with is run once, and nothing of what is collected changes."""

from typing import Any

import pytest
import tiny_families
import torch
from tiny import WORDS, tiny_model, tiny_tokenizer

from refusal_kernels.hf.batches import Batches
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.research.extraction.collect import collect, stream_prefix
from refusal_kernels.research.extraction.methods import find_candidates

PREFIX = 11  # <s> <|system|> please be kind and brief now <|end|> <|user|> make
PROMPTS = [f"make {word} {more}" for more in ("tea", "a cake") for word in WORDS[10:30]]


def chat() -> ChatFormat:
    return ChatFormat(tiny_tokenizer(), system="please be kind and brief now")


def test_every_token_runs_once() -> None:
    model, seen = tiny_model(), 0

    def count(_: Any, args: Any) -> None:
        nonlocal seen
        seen += args[0].shape[:-1].numel()

    collect(model, chat(), PROMPTS)  # now it is known what padding does
    with model.model.layers[0].register_forward_pre_hook(count):
        found = collect(model, chat(), PROMPTS, batch_size=len(PROMPTS))
    ids = chat().encode(PROMPTS)
    longest = max(map(len, ids))
    rest = longest - PREFIX
    # one batch; the prefix; and whether that serves: two prompts with and without it
    assert seen == len(PROMPTS) * rest + PREFIX + 2 * longest + 2 * rest

    expected = torch.zeros(3, 4, 64, dtype=torch.float64)
    for prompt in ids:
        with torch.no_grad():
            states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        expected += torch.stack(states[:-1])[:, 0, -4:].double() / len(PROMPTS)
    torch.testing.assert_close(found.mean("harmful"), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("method", ["pca", "mean_difference"])
def test_candidates_do_not_change(method: str, monkeypatch: Any) -> None:
    sets = PROMPTS[:20], PROMPTS[20:]
    found = find_candidates(tiny_model(), chat(), *sets, method=method)
    module = "refusal_kernels.research.extraction"
    for name in ("collect", "methods"):
        monkeypatch.setattr(f"{module}.{name}.stream_prefix", lambda *_: None)
    whole = find_candidates(tiny_model(), chat(), *sets, method=method)
    torch.testing.assert_close(found.vectors, whole.vectors, rtol=1e-4, atol=1e-5)


def batches(count: int, first: list[int]) -> Batches:
    prompts = [[*first, 20 + k, *range(30, 33 + k % 4), 11, 12] for k in range(count)]
    return Batches(prompts, 0, 8)


def test_where_it_saves_nothing() -> None:
    model, first = tiny_model(), [11, 12, 13, 14]
    assert stream_prefix(model, [batches(20, first)], 2, 3) is not None
    assert stream_prefix(model, [batches(8, first)], 2, 3) is None  # 32 tokens
    assert stream_prefix(model, [batches(20, first), batches(20, [5])], 2, 3) is None
    assert stream_prefix(model, [batches(20, first[:2])], 2, 3) is None  # 2 of 12


@pytest.mark.parametrize("family", ["mamba", "recurrent_gemma", "bamba"])
@pytest.mark.filterwarnings("ignore")
def test_a_state_beside_keys_and_values(family: str) -> None:
    assert stream_prefix(tiny_families.build(family), [batches(20, [11, 12, 13, 14])], 2, 3) is None

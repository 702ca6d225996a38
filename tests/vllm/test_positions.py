"""Programs at some positions of a request: the tokens of the patched Hugging Face model."""

import contextlib

import pytest
import torch
from families import VOCABULARY, make
from reference import greedy, hugging_face, prompts, served
from transformers import DynamicCache

import refusal_kernels as rk

KINDS = ("prompt", "generated", "last")
TOKENS = 16
WINDOWS = ((0, 40), (33, 52), (60, None), (30, 66))


@pytest.fixture(scope="module")
def path(folder):
    return make("llama", folder)


def in_window(model, prompt, interventions, first, end):
    """Continue greedily; tokens from position `first` to `end` - 1 pass the patched model."""
    ids, position, cache = list(prompt), 0, DynamicCache()
    while len(ids) < len(prompt) + TOKENS:
        inside = first <= position and (end is None or position < end)
        stop = min(edge for edge in (first, end, len(ids)) if edge is not None and edge > position)
        patched = rk.patch(model, *interventions) if inside else contextlib.nullcontext()
        with patched, torch.inference_mode():
            logits = model(torch.tensor([ids[position:stop]]), past_key_values=cache).logits
        position = stop
        if position == len(ids):
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def cases(path, directions):
    """Pairs of what is asked and the tokens of the Hugging Face model, unlike in every case."""
    model, generator = hugging_face(path), torch.Generator().manual_seed(0)
    prompt = torch.randint(3, VOCABULARY, (50,), generator=generator).tolist()
    ablate = rk.Ablate(directions["r"])
    texts = [
        ("none", greedy(model, prompt, TOKENS)),
        ("p", greedy(model, prompt, TOKENS, [ablate])),
    ]
    for kind in KINDS:
        text = greedy(model, prompt, TOKENS, [rk.Ablate(directions["r"], positions=kind)])
        texts.append(({"program": "p", "positions": kind}, text))
    for first, end in WINDOWS:
        text = in_window(model, prompt, [ablate], first, end)
        asked = {"program": "p", "from": first, **({} if end is None else {"to": end})}
        texts.append((asked, text))
    assert len({tuple(text) for _, text in texts}) == len(texts)
    return [((prompt, asked), text) for asked, text in texts]


def test_chunks_caches_and_preemption_change_nothing(path, cases, steering, engines):
    programs = {
        "p": {"ablate": "r"},
        **{kind: {"ablate": "r", "positions": kind} for kind in KINDS},
        "window": {"ablate": "r", "from": WINDOWS[0][0], "to": WINDOWS[0][1]},
    }
    llm = engines(
        path,
        steering(programs=programs),
        max_num_batched_tokens=32,  # of a prompt of 50
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        max_num_seqs=6,
        block_size=32,
        num_gpu_blocks_override=8,  # 256 tokens; six requests need 576
    )
    asked, wanted = zip(*cases, strict=True)
    assert served(llm, list(asked), TOKENS) == list(wanted)
    # from the cache where there is one, and by programs that say it
    named = [(asked[2 + k][0], kind) for k, kind in enumerate(KINDS)] + [(asked[0][0], "window")]
    again = [*asked[:2], *named]
    assert served(llm, again, TOKENS) == [*wanted[:5], wanted[5]]


def test_a_cached_prefix_of_another_turn_is_not_taken(path, directions, steering, engines):
    """What one turn generates is prompt in the next, and steered otherwise."""
    model, prompt = hugging_face(path), (prompts(1, seed=6)[0] * 20)[:60]
    steered = [rk.Ablate(directions["r"], positions="prompt")]
    llm = engines(path, steering(programs={"p": {"ablate": "r"}}), block_size=32)
    asked = {"program": "p", "positions": "prompt"}
    (first,) = served(llm, [(prompt, asked)], 20)
    assert first == greedy(model, prompt, 20, steered)
    turn = prompt + first + prompt[:8]
    assert served(llm, [(turn, asked)], 8) == [greedy(model, turn, 8, steered)]


def test_rejected_drafts_change_nothing(path, cases, steering, engines, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # the drafter loads numba
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    llm = engines(path, steering(programs={"p": {"ablate": "r"}}), speculative_config=drafts)
    asked, wanted = zip(*cases, strict=True)
    assert served(llm, list(asked), TOKENS) == list(wanted)

"""Which tokens: positions, beside padding and caches, however tokens are spread over passes."""

import copy

import pytest
import tiny_families
import torch
from steering import GREEDY, HIDDEN, SITES, streams
from tiny import tiny_model
from transformers import DynamicCache

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.interventions import Ablate, Add
from refusal_kernels.patching.handle import unpatch
from refusal_kernels.patching.patch import patch


@pytest.fixture
def tokens():
    return torch.randint(7, 30, (3, 9))


def test_positions(model, tokens, directions):
    d, r = directions[0], directions[0].unit
    mask = torch.ones_like(tokens)
    mask[0, -2:] = 0  # right padding
    mask[1, :3] = 0  # left padding
    last = torch.tensor([6, 8, 8])
    _, seen = streams(model, tokens, Ablate(d, positions="last"), attention_mask=mask)
    for h in seen.values():
        along = (h @ r).abs()
        assert (along[torch.arange(3), last] < 1e-5).all()
        along[torch.arange(3), last] = 1.0
        assert (along > 1e-5).float().mean() > 0.9  # the others are left alone

    with patch(model, Ablate(d, positions="prompt")) as handle, torch.no_grad():
        seen = []
        with handle.watch(lambda name, h: seen.append((h @ r).abs().amax(dim=(0, 1)))):
            model.generate(tokens, max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    assert max(float(x.max()) for x in seen[:SITES]) < 1e-5
    assert min(float(x.max()) for x in seen[SITES:]) > 1e-3


def test_positions_of_generation(model, tokens, directions):
    """Steering generated tokens alone: the prompt's pass is plain, then a cache continues it."""
    d = directions[0]
    with torch.no_grad():
        plain = model(tokens, use_cache=True)
    with patch(model, Ablate(d, positions="generated")) as handle, torch.no_grad():
        steered = model(tokens, use_cache=True)
        assert torch.allclose(steered.logits, plain.logits, atol=1e-5)
        seen = []
        with handle.watch(lambda name, h: seen.append(float((h @ d.unit).abs().max()))):
            model(tokens[:, -1:], past_key_values=steered.past_key_values)
    assert max(seen) < 1e-5


def test_rows_and_positions_together(model, tokens, directions):
    a, b, _ = directions
    programs = [Ablate(a, positions="last")], [Add(b, 0.5, sites="all")]
    with patch(model, *programs) as handle, handle.route([1, 0, None]), torch.no_grad():
        mixed = model(tokens).logits
    assert torch.equal(mixed[0], streams(model, tokens, *programs[1])[0][0])
    assert torch.equal(mixed[1], streams(model, tokens, *programs[0])[0][1])


# masks made for attention, tokens of the model's own before, [tokens, batch], states without a
# length, several streams of each token, a decoder that is called by position
@pytest.mark.parametrize(
    "family", ["gemma3", "cpmant", "xlnet", "mamba", "deepseek_v4", "modernbert-decoder", "gpt2"]
)
@pytest.mark.parametrize("positions", ["last", "prompt", "generated"])
def test_positions_of_families_that_are_laid_out_otherwise(family, positions):
    model = tiny_families.build(family)
    inputs = tiny_families.inputs(model)
    rows, given = inputs["input_ids"].shape
    d = Direction(torch.randn(model.config.get_text_config().hidden_size))
    padded = positions == "last" and family in ("gemma3", "gpt2")
    if padded:
        inputs["attention_mask"][0, -2:] = 0
    passes = []

    def see(name, h):
        if name == "embed":
            passes.append([])
        along = (h @ d.unit).abs() / h.norm(dim=-1)
        along = along.T if family == "xlnet" else along.view(rows, -1, *along.shape[2:])
        passes[-1].append(along)

    with patch(model, Ablate(d, positions=positions)) as handle, handle.watch(see):
        if padded or family == "xlnet":  # generation wants padding left; XLNet reads the end again
            with torch.no_grad():
                model(**inputs)
        else:
            model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert len(passes) == (1 if padded or family == "xlnet" else 3)
    for number, seen in enumerate(passes):
        for along in seen:
            tokens = along.shape[1]
            assert tokens == 1 if number else tokens >= given
            steered = torch.zeros(rows, tokens, dtype=torch.bool)
            steered[:, -1] = positions == "last"
            if padded:
                steered[0, -1], steered[0, -3] = False, True
            steered |= positions == ("generated" if number else "prompt")
            at = steered.view(rows, tokens, *[1] * (along.ndim - 2)).expand_as(along)
            assert (along[at] < 1e-5).all()
            assert (along[~at] > 1e-5).float().mean() > 0.9 if (~at).any() else at.all()


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_token_beside_padding(family, cache, side):
    """A static cache's mask is made for attention before the model is called."""
    model = tiny_families.build(family)
    ids, d = tiny_families.inputs(model)["input_ids"], Direction(torch.randn(64))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask = mask if side == "left" else mask.flip(1)
    settings = {"cache_implementation": "static", "disable_compile": True}
    settings = settings if cache == "static" else {}
    seen = []
    with (
        patch(model, Ablate(d, positions="last")) as handle,
        handle.watch(lambda name, h: seen.append((h @ d.unit).abs() / h.norm(dim=-1))),
    ):
        model.generate(
            ids, attention_mask=mask, max_new_tokens=2, min_new_tokens=2, pad_token_id=0, **settings
        )
    last = [ids.shape[1] - 1 - 3 * (side == "right"), ids.shape[1] - 1]
    for along in (a for a in seen if a.shape[1] > 1):
        assert (along[[0, 1], last] < 1e-5).all()
        along[[0, 1], last] = 1.0
        assert (along > 1e-5).float().mean() > 0.9
    assert all((along < 1e-5).all() for along in seen if along.shape[1] == 1) and len(seen) > 10


def test_a_mask_that_does_not_say_which_token_is_the_last(model, tokens, directions):
    blocks = type("BlockMask", (), {})()
    refused = pytest.raises(InputError, match="mask is a BlockMask, which does not say")
    with patch(model, Ablate(directions[0], positions="last")), refused:
        model.model(tokens, attention_mask=blocks)


# --- what spreads the tokens of a completion over passes otherwise


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
def test_it_does_not_matter_which_pass_a_token_came_in(model, positions):
    """Guesses are checked several at once, beside the prompt; chunks have a cache behind them."""
    draft = tiny_model(eos_token_id=None)
    prompt = torch.randint(7, 30, (1, 9)).repeat(1, 3)
    d = Direction(torch.randn(HIDDEN) * 3)
    with patch(model, Ablate(d, positions=positions)):
        want = model.generate(prompt, **GREEDY)
        for other in (
            {"assistant_model": draft},
            {"prompt_lookup_num_tokens": 3},
            {"prefill_chunk_size": 4},
            {"use_cache": False},
            {"cache_implementation": "static", "disable_compile": True},
        ):
            assert torch.equal(model.generate(prompt, **GREEDY, **other), want), other
    assert positions == "generated" or not torch.equal(model.generate(prompt, **GREEDY), want)


def test_a_prompt_whose_start_is_cached_is_a_prompt_to_its_end(model, tokens):
    """As in the second turn of a chat, where the cache holds the first."""
    d, seen = Direction(torch.randn(HIDDEN)), []
    settings = {**GREEDY, "max_new_tokens": 3}

    def see(name, h):
        seen.append((h @ d.unit).abs().amax(dim=0))

    with patch(model, Ablate(d, positions="prompt")) as handle:
        cache = DynamicCache(config=model.config)
        model.generate(tokens[:, :5], past_key_values=cache, **{**settings, "max_new_tokens": 1})
        with handle.watch(see):
            model.generate(tokens, past_key_values=cache, **settings)
    assert all(s.shape[0] == 4 and s.max() < 1e-5 for s in seen[:SITES])
    assert all(s.min() > 1e-4 for s in seen[SITES:]) and len(seen) == 3 * SITES


def test_copies_know_their_own_prompts(model, tokens, directions):
    settings = {**GREEDY, "max_new_tokens": 4, "use_cache": False}
    before = [list(vars(m)) for m in model.modules()]
    with patch(model, Ablate(directions[0], positions="generated")) as handle:
        want = model.generate(tokens, **settings)
        twin = copy.deepcopy(model)
        handle.strength = 0.0
        assert twin.generate.module is twin
        assert torch.equal(twin.generate(tokens, **settings), want)
    unpatch(twin)
    for m in (model, twin):
        assert [list(vars(part)) for part in m.modules()] == before


SOFT = {
    "prompt tuning": ("PromptTuningConfig", {}),
    "p-tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 16}),
    "prefix tuning": ("PrefixTuningConfig", {}),
}


@pytest.mark.parametrize("first", ["peft", "patch"])
@pytest.mark.parametrize("kind", SOFT)
def test_soft_prompts_belong_to_the_prompt(kind, first):
    peft = pytest.importorskip("peft")
    name, more = SOFT[kind]
    config = getattr(peft, name)(task_type="CAUSAL_LM", num_virtual_tokens=3, **more)
    virtual = 0 if kind == "prefix tuning" else 3  # which a pass over the prompt has in it
    settings = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    tokens, d = torch.randint(7, 30, (2, 6)), Direction(torch.randn(64))
    prompt, new = 6 + virtual, [True]
    for positions, steered, after in (
        ("prompt", [True] * prompt, [False]),
        ("generated", [False] * prompt, new),
        ("last", [False] * (prompt - 1) + new, new),
    ):
        passes = []

        def see(name, h, passes=passes):
            if name == "layers.1.attn":
                passes.append(((h @ d.unit).abs() < 1e-5).view(2, -1))

        model = tiny_model()
        soft = peft.get_peft_model(model, config).eval() if first == "peft" else None
        with patch(soft or model, Ablate(d, positions=positions)) as handle, handle.watch(see):
            soft = soft or peft.get_peft_model(model, config).eval()
            soft.generate(input_ids=tokens, **settings)
            with soft.disable_adapter():
                soft.generate(input_ids=tokens, **settings)
            if first == "peft":
                with torch.no_grad():
                    soft(tokens)
                assert passes.pop().tolist() == [steered] * 2
        read, decoded, plain_read, plain_decoded = passes
        assert read.tolist() == [steered] * 2 and bool((decoded == after[0]).all())
        assert plain_read.tolist() == [steered[virtual:]] * 2
        assert plain_decoded.tolist() == [after] * 2

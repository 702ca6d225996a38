"""Running a patched model in the ways of `model.generate` and `torch.compile`, against hooks."""

import copy
import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from steering import GREEDY, HIDDEN, LAYERS, MODES, SITES, close, hooks, wanted
from tiny import full, plain_hooks, tiny_model, tiny_tokenizer
from torch._dynamo.testing import CompileCounter
from transformers import ContinuousBatchingConfig, GenerationConfig, pipeline

from refusal_kernels.direction import Direction
from refusal_kernels.interventions import Ablate, Add
from refusal_kernels.patching.handle import unpatch
from refusal_kernels.patching.paper_hooks import paper_hooks
from refusal_kernels.patching.patch import patch


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()


# --- generation


@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 3, "do_sample": True, "cache_implementation": "static"},
    ],
    ids=lambda settings: "-".join(settings) or "greedy",
)
def test_generation_equals_hooks(model, direction, tokens, settings, side):
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    mask = mask if side == "left" else mask.flip(1)
    settings = {**GREEDY, "attention_mask": mask, **settings}
    model.double()  # samples are then drawn from the same numbers
    torch.manual_seed(7)
    plain = model.generate(tokens, **settings)
    for reference in (hooks, paper_hooks):
        torch.manual_seed(7)
        with reference(model, direction):
            want = model.generate(tokens, **settings)
        torch.manual_seed(7)
        with patch(model, Ablate(direction)):
            assert torch.equal(model.generate(tokens, **settings), want)
    assert not torch.equal(plain, want)
    torch.manual_seed(7)
    assert torch.equal(model.generate(tokens, **settings), plain)


@pytest.mark.parametrize("settings", [{"prompt_lookup_num_tokens": 3}, {}], ids=["lookup", "draft"])
def test_speculative_decoding_gives_the_greedy_completion(model, direction, tokens, settings):
    draft, passes = tiny_model(eos_token_id=None), []
    prompt = tokens[:1].repeat(1, 3)
    with hooks(model, direction):
        want = model.generate(prompt, **GREEDY)
    with patch(model, Ablate(direction)), patch(draft, Ablate(direction)):
        model.register_forward_hook(lambda *_: passes.append(1))
        settings = settings or {"assistant_model": draft}
        assert torch.equal(model.generate(prompt, **GREEDY, **settings), want)
    if "assistant_model" in settings:  # the draft is steered alike, so its guesses are taken
        assert len(passes) < GREEDY["max_new_tokens"]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("dial", ["strength", "coefficient"])
def test_a_dial_turned_in_mid_generation_acts_from_the_next_token(
    model, direction, tokens, dial, cache
):
    made = Ablate(direction) if dial == "strength" else Add(direction, block_input=1)
    values = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0] if dial == "strength" else [1.0, 0.5, -2, 0.0, 3, 1]
    # by hand, under hooks that are there or not
    reference, ids, past = copy.deepcopy(model).double(), tokens, None
    for value in values:
        edit = {"ablate": direction.vector if value else None}
        if dial == "coefficient":
            edit = {"add": value * direction.vector, "layer": 1}
        with plain_hooks(reference, **edit), torch.no_grad():
            out = reference(ids if past is None else ids[:, -1:], past_key_values=past)
        past, ids = out.past_key_values, torch.cat([ids, out.logits[:, -1:].argmax(-1)], dim=1)

    with patch(model, made) as handle:

        def turn(ids, scores, **_):
            setattr(handle, dial, (*values, 0.0)[ids.shape[1] - tokens.shape[1] + 1])
            return scores

        settings = {**GREEDY, "max_new_tokens": len(values), "logits_processor": [turn]}
        settings |= {"cache_implementation": "static"} if cache == "static" else {}
        with torch.inference_mode():  # the dial is turned in there, and again outside
            assert torch.equal(model.generate(tokens, **settings), ids)
        setattr(handle, dial, 1.0)
        assert torch.equal(model.generate(tokens, **settings), ids)


@pytest.mark.full
def test_continuous_batching(model, direction, tokens):
    prompts = [tokens[0].tolist(), tokens[1, :5].tolist()]  # 14 tokens in one row
    config = GenerationConfig(**GREEDY)
    paged = ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=64)

    def generate():
        out = model.generate_batch(prompts, config, continuous_batching_config=paged)
        return [(o.generated_tokens, o.error) for o in out.values()]

    with hooks(model, direction):
        want = [
            (model.generate(torch.tensor([p]), **GREEDY)[0, len(p) :].tolist(), None)
            for p in prompts
        ]
    with patch(model, Ablate(direction)):
        assert generate() == want
    assert generate() != want
    for positions in ("last", "generated"):  # all prompts are one row there
        with patch(model, Ablate(direction, positions=positions)):
            assert all("packed into one row" in error for _, error in generate())
    two = [Ablate(direction)], [Ablate(direction, 0.5)]
    with patch(model, *two) as handle, handle.route([0, 1]):
        assert all("the route has 2 rows" in error for _, error in generate())


def test_pipeline(model, direction):
    chat = [{"role": "user", "content": "how to make a cake"}]

    def answer():
        made = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())
        return made(chat, **GREEDY), made([chat, chat[:1]], batch_size=1, **GREEDY)

    plain = answer()
    with hooks(model, direction):
        want = answer()
    with patch(model, Ablate(direction)):
        assert answer() == want != plain


# --- compilation


@pytest.mark.xdist_group("inductor")
@pytest.mark.parametrize("mode", [full("default"), "reduce-overhead"])
def test_a_compiled_model_follows_the_patch(model, direction, tokens, mode):
    compiled = torch.compile(model, mode=mode)
    plain, want = model(tokens).logits, wanted(model, direction, tokens)
    with torch.no_grad():
        close(compiled(tokens).logits, plain)
        handle = patch(model, Ablate(direction))
        close(compiled(tokens).logits, want)
        handle.remove()
        close(compiled(tokens).logits, plain)
        with patch(model, Ablate(direction, 0.0)) as handle:
            close(compiled(tokens).logits, plain)
            handle.strength = 1.0
            close(compiled(tokens).logits, want)
        close(compiled(tokens).logits, plain)


@pytest.mark.parametrize("grad", [*map(full, MODES[:2]), MODES[2]])
def test_it_is_one_graph_and_the_dial_compiles_nothing(model, direction, tokens, grad):
    graphs = []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    want = {0.0: model(tokens).logits, 1.0: wanted(model, direction, tokens)}
    with patch(model, Ablate(direction)) as handle, grad():
        compiled = torch.compile(model, fullgraph=True, backend=keep)
        for strength in (1.0, 0.0, 1.0, 0.0):
            handle.strength = strength
            close(compiled(tokens).logits, want[strength])
        with handle.route([None, 0]):  # this may be another graph
            close(compiled(tokens).logits[0], want[0.0][0])
    assert len(graphs) == 2
    fused = [sum("add_steer_rms_norm" in target for target in graph) for graph in graphs]
    assert fused == [0 if grad is torch.enable_grad else SITES] * 2


@pytest.mark.parametrize("positions", [full("all"), full("last"), "generated"])
def test_compiled_static_cache_generation(model, direction, tokens, positions):
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    settings = {**GREEDY, "attention_mask": mask}
    with patch(model, Ablate(direction, positions=positions)) as handle:

        def turn(ids, scores, **_):
            handle.strength = 1.0 - 0.3 * (ids.shape[1] - tokens.shape[1])
            return scores

        constant = model.generate(tokens, **settings)
        handle.strength = 1.0
        turned = model.generate(tokens, logits_processor=[turn], **settings)
        eager, counter = model.forward, CompileCounter()
        model.forward = torch.compile(eager, fullgraph=True, backend=counter)
        settings["cache_implementation"] = "static"
        handle.strength = 1.0
        assert torch.equal(model.generate(tokens, **settings), constant)
        before = counter.frame_count
        assert torch.equal(model.generate(tokens, logits_processor=[turn], **settings), turned)
        assert counter.frame_count == before > 0
        model.forward = eager


@torch.no_grad()
def test_layers_compiled_one_by_one(model, direction, tokens):
    plain, want = model(tokens).logits, wanted(model, direction, tokens)
    counter = CompileCounter()
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=counter)
    run = functools.partial(model, tokens, use_cache=False)
    close(run().logits, plain)
    with patch(model, Ablate(direction)) as handle:
        close(run().logits, want)
        before = counter.frame_count
        for _ in range(3):
            close(run().logits, want)
        handle.strength = 0.0
        close(run().logits, plain)
        assert counter.frame_count == before
    close(run().logits, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, full(torch.float64)])
def test_moved_and_then_compiled(model, direction, tokens, dtype):
    with patch(model, Ablate(direction)) as handle, torch.no_grad():
        model.to(dtype)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        first = compiled(tokens).logits  # no pass before has seen the new dtype
        handle.strength = 0.0
        plain = compiled(tokens).logits
        torch.testing.assert_close(plain, model(tokens).logits)
        handle.strength = 1.0
        torch.testing.assert_close(first, model(tokens).logits)
    assert not torch.allclose(plain, first, atol=0.1)


# --- side by side


def test_two_models_of_one_class(model, direction, tokens):
    other, along = tiny_model(seed=1), Direction(torch.randn(HIDDEN))
    want = wanted(model, direction, tokens), wanted(other, along, tokens)
    plain = other(tokens).logits
    with patch(model, Ablate(direction)), torch.no_grad():
        assert torch.equal(other(tokens).logits, plain)
        with patch(other, Ablate(along)):
            for _ in range(2):
                close(model(tokens).logits, want[0])
                close(other(tokens).logits, want[1])
        close(model(tokens).logits, want[0])
        assert torch.equal(other(tokens).logits, plain)


@pytest.mark.parametrize("grad", MODES)
@pytest.mark.parametrize("positions", ["all", "last"])
def test_several_threads(model, direction, positions, grad):
    batches = [torch.randint(7, 30, (1 + k % 3, 5 + k % 4)) for k in range(12)] * 4

    def run(batch):
        with grad():
            return model(batch).logits

    with patch(model, Ablate(direction, positions=positions)):
        want = [run(batch) for batch in batches]
        with ThreadPoolExecutor(4) as threads:
            for got, expected in zip(threads.map(run, batches), want, strict=True):
                close(got, expected)


# --- what is seen, where and how it runs


def test_hidden_states_and_attentions_are_what_was_there(direction, tokens):
    model = tiny_model(attn_implementation="eager")
    with hooks(model, direction):
        want = model(tokens, output_hidden_states=True, output_attentions=True)
    with patch(model, Ablate(direction)):
        for grad in MODES:
            with grad():
                got = model(tokens, output_hidden_states=True, output_attentions=True)
                kept = model.generate(
                    tokens, **GREEDY, output_hidden_states=True, return_dict_in_generate=True
                )
            assert len(got.hidden_states) == LAYERS + 1 and len(got.attentions) == LAYERS
            for key in ("hidden_states", "attentions", "logits"):
                close(got[key], want[key])
            for h in (h for step in (got.hidden_states, *kept.hidden_states) for h in step[:-1]):
                score = (h.double() @ direction.unit.double()).abs()
                assert (score <= 4 * torch.finfo(h.dtype).eps * h.double().norm(dim=-1)).all()


def test_modes_moves_and_autocast(model, direction, tokens):
    with patch(model, Ablate(direction)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float32):
            model.to(dtype)
            model.train(not model.training)
            # (in float64 the direction is still a float32 one)
            eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
            unpatched = copy.deepcopy(model)
            unpatch(unpatched)
            want = wanted(unpatched, direction, tokens)
            for grad in MODES:
                with grad():
                    got = model(tokens).logits
                assert got.dtype is dtype
                close(got, want, atol=8 * eps * float(want.abs().max()))
    model.bfloat16().model.norm.float()  # as some keep their norms
    want = model.model(tokens).last_hidden_state
    with patch(model, Ablate(direction, 0.0)), torch.no_grad():
        assert want.dtype is model.model(tokens).last_hidden_state.dtype is torch.float32
    model = tiny_model()
    with torch.autocast("cpu", torch.bfloat16):
        want = wanted(model, direction, tokens)
        with patch(model, Ablate(direction)) as handle:
            for grad in MODES:
                seen = {}
                with grad(), handle.watch(lambda name, h, seen=seen: seen.update({name: h})):
                    close(model(tokens).logits, want, atol=2**-5)  # a few ulps of bfloat16 at 2
                for h in seen.values():
                    score = (h * direction.unit).sum(-1)  # a product of matrices would be autocast
                    assert h.dtype is torch.float32 and score.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("compiled", "grad"),
    [
        *((False, grad) for grad in MODES),
        *(full(True, grad) for grad in MODES[:2]),
        (True, MODES[2]),
    ],
)
def test_a_users_hook_may_write_in_place(model, direction, tokens, grad, compiled):
    """What a norm was given by the add before is not the norm of what it is called with then."""
    vector = torch.randn(HIDDEN)

    def out_of_place(module, args, output):
        return output + vector

    def in_place(module, args, output):
        output.add_(vector)

    with patch(model, Ablate(direction)):
        for layer in model.model.layers:
            layer.register_forward_hook(out_of_place)
        want = model(tokens).logits
        for layer in model.model.layers:
            layer._forward_hooks.popitem()
            layer.register_forward_hook(in_place)
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        with grad():
            close(run(tokens).logits, want)


@pytest.mark.parametrize("place", ["block", full("norm")])
def test_a_hook_that_comes_after_compiling_is_seen_where_hooks_are_guarded(
    model, direction, tokens, place
):
    """By PyTorch's default a compiled model does not run such a hook, patched or not."""

    def in_place(module, args):
        args[0].mul_(1.25).add_(0.5)

    layer = model.model.layers[1]
    module = layer if place == "block" else layer.post_attention_layernorm
    guarded = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
    with guarded, patch(model, Ablate(direction)), torch.no_grad():
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
        before = model(tokens).logits
        close(run(tokens).logits, before)
        module.register_forward_pre_hook(in_place)
        want = model(tokens).logits
        assert (want - before).abs().max() > 1e-2
        close(run(tokens).logits, want)

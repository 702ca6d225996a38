"""Patched models against an independent float64 hook implementation, and the way back."""

import copy
import inspect
import traceback

import pytest
import tiny_families
import torch
from steering import GREEDY, HIDDEN, LAYERS, SITES, is_plain
from tiny import FAMILIES, tiny_model
from transformers import DynamicCache

from refusal_kernels import ops
from refusal_kernels.banks import compile_program
from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.interventions import Ablate, Add, Clamp, Erase, Set
from refusal_kernels.patching.paper_hooks import paper_hooks
from refusal_kernels.patching.patch import patch
from refusal_kernels.patching.rewrite import steered


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny_model(request.param)


@pytest.fixture
def direction():  # what it changes is far above the rounding of bfloat16
    return Direction(torch.randn(HIDDEN) * 3)


def hooked(model, tokens, edit, *, add_layer=None):
    """Logits and streams of a float64 copy whose writers are edited by hooks.

    ``edit(s)`` is applied to the stream; a writer's hook can only change what is added to it, so
    each returns ``edit(residual + output) - residual``, with the residual taken by a pre-hook.
    """
    model = copy.deepcopy(model).double()
    stream, seen = {}, {}

    def start(module, args, output):
        stream["s"] = output if add_layer is not None and add_layer != 0 else edit(output)
        seen["embed"] = stream["s"]
        return stream["s"]

    def writer(name, active):
        def hook(module, args, output):
            out = output[0] if isinstance(output, tuple) else output
            s = stream["s"] + out
            s = edit(s) if active else s
            delta, stream["s"] = s - stream["s"], s
            seen[name] = s
            return (delta, *output[1:]) if isinstance(output, tuple) else delta

        return hook

    model.model.embed_tokens.register_forward_hook(start)
    for i, layer in enumerate(model.model.layers):
        everywhere = add_layer is None
        layer.self_attn.register_forward_hook(writer(f"layers.{i}.attn", everywhere))
        layer.mlp.register_forward_hook(writer(f"layers.{i}.mlp", everywhere or add_layer == i + 1))
    return model(tokens).logits, seen


def project(direction, strength=1.0):
    r = direction.vector.double() / direction.vector.double().norm()
    return lambda s: s - strength * (s @ r).unsqueeze(-1) * r


def watched(model, tokens, *interventions):
    seen = {}
    with patch(model, *interventions) as handle, handle.watch(lambda n, h: seen.update({n: h})):
        logits = model(tokens).logits
    return logits, seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ablation_equals_float64_hooks_site_by_site(model, direction, tokens, dtype):
    model = model.to(dtype)
    logits, seen = watched(model, tokens, Ablate(direction))
    want_logits, want = hooked(model, tokens, project(direction))
    eps = torch.finfo(dtype).eps
    assert list(seen) == list(want) and len(seen) == SITES
    for name, h in seen.items():
        # a few roundings at the stream's own scale (measured: at most 3.4 in float32, 1.5 in half)
        assert (h.double() - want[name]).abs().max() <= 6 * eps * want[name].abs().max(), name
        score = (h.double() @ direction.unit.double()).abs()
        assert (score <= 4 * eps * h.double().norm(dim=-1)).all(), name
    scale = want_logits.abs().max()
    assert (logits.double() - want_logits).abs().max() <= 8 * eps * scale
    plain = model(tokens).logits
    assert (plain.double() - want_logits).abs().max() > 24 * eps * scale  # it did something


@pytest.mark.parametrize("strength", [0.5, -1.0, 2.0])
def test_strength_applies_once_per_site(model, direction, tokens, strength):
    logits, _ = watched(model, tokens, Ablate(direction, strength))
    want, _ = hooked(model, tokens, project(direction, strength))
    assert torch.allclose(logits.double(), want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_addition_is_at_the_input_of_its_block(model, direction, tokens, layer):
    logits, seen = watched(model, tokens, Add(direction, coefficient=0.7, block_input=layer))
    vector = 0.7 * direction.vector.double()
    want, _ = hooked(model, tokens, lambda s: s + vector, add_layer=layer)
    assert list(seen) == ["embed" if layer == 0 else f"layers.{layer - 1}.mlp"]
    assert torch.allclose(logits.double(), want, atol=2e-4, rtol=1e-4)

    # and so the input of that block, as transformers itself reports it, has moved by the vector
    before = model(tokens, output_hidden_states=True).hidden_states
    with patch(model, Add(direction, coefficient=0.7, block_input=layer)):
        after = model(tokens, output_hidden_states=True).hidden_states
    assert torch.allclose(
        after[layer] - before[layer], vector.float().expand_as(before[0]), atol=1e-4
    )
    for earlier in range(layer):
        assert torch.equal(after[earlier], before[earlier])


def test_set_and_clamp(model, direction, tokens):
    r = direction.unit
    _, seen = watched(model, tokens, Set(direction, 2.0))
    assert all(torch.allclose(h @ r, torch.tensor(2.0), atol=1e-4) for h in seen.values())
    _, seen = watched(model, tokens, Clamp(direction, low=-0.1, high=0.3))
    for h in seen.values():
        assert (h @ r).min() >= -0.1 - 1e-4 and (h @ r).max() <= 0.3 + 1e-4


def test_erase_does_what_leace_does(model, tokens):
    """Against the concept-erasure package, at every site and then as a probe sees it."""
    from concept_erasure import LeaceFitter

    mixing = torch.randn(HIDDEN, HIDDEN, dtype=torch.float64) / 8
    concept = torch.randint(0, 2, (4000,))
    x = torch.randn(4000, HIDDEN, dtype=torch.float64) @ mixing + 3.0
    x += concept.unsqueeze(1) * torch.randn(HIDDEN, dtype=torch.float64)
    eraser = LeaceFitter.fit(x, concept).eraser
    bank, params = compile_program([Erase.from_leace(eraser)])
    erased = ops.add_steer(x.float(), None, bank, params)
    assert torch.allclose(erased.double(), eraser(x), atol=1e-4)
    means = [erased[concept == k].double().mean(0) for k in (0, 1)]
    assert (means[0] - means[1]).abs().max() < 1e-4  # no linear probe can tell them apart
    # and it is not the orthogonal projection
    u, v = bank[0, 1, 0], bank[0, 0, 0]
    assert torch.cosine_similarity(u, v, dim=0) < 0.99

    _, seen = watched(model, tokens, Erase.from_leace(eraser))
    target = float(v.double() @ eraser.bias)
    for h in seen.values():
        assert torch.allclose(h @ v, torch.tensor(target), atol=1e-3 * float(v.norm()))
    with pytest.raises(InputError, match=r"u \. v is 2"):
        Erase(2 * eraser.proj_left[:, 0], eraser.proj_right[0], eraser.bias)


def test_two_directions_together(model, tokens):
    q, _ = torch.linalg.qr(torch.randn(HIDDEN, 2, dtype=torch.float64))
    first, second = (Direction(q[:, k].contiguous()) for k in range(2))
    _, seen = watched(model, tokens, Ablate(first), Ablate(second))
    for h in seen.values():
        assert (h @ first.unit).abs().max() < 1e-5 and (h @ second.unit).abs().max() < 1e-5


def test_greedy_completions_equal_those_of_hooks(model, direction, tokens):
    with patch(model, Ablate(direction)):
        fused = model.generate(tokens, **GREEDY)
    with paper_hooks(model.double(), direction):
        hooks = model.generate(tokens, **GREEDY)
    assert torch.equal(fused, hooks)


def test_strength_zero_is_the_plain_model_bit_for_bit(model, direction, tokens):
    plain = model(tokens).logits
    with patch(model, Ablate(direction, 0.0)):
        assert torch.equal(model(tokens).logits, plain)
        with torch.no_grad():  # now the norms are fused
            linked = model(tokens).logits
    assert torch.allclose(linked, plain, atol=2e-6 * float(plain.abs().max()))
    with patch(model, Ablate(direction, 0.0), fuse_norms=False), torch.no_grad():
        assert torch.equal(model(tokens).logits, plain)


def test_the_dial_is_live(model, direction, tokens):
    plain = model(tokens).logits
    with patch(model, Ablate(direction)) as handle:
        assert handle.strength == (1.0,)
        ablated = model(tokens).logits
        handle.strength = 0.0
        assert handle.strength == (0.0,) and torch.equal(model(tokens).logits, plain)
        handle.strength = 1
        assert torch.equal(model(tokens).logits, ablated)
        with pytest.raises(InputError, match="finite"):
            handle.strength = float("nan")
    two = Ablate(direction), Add(direction, block_input=1)
    with patch(model, *two) as handle:
        handle.strength = (1.0, 0.0)
        assert handle.strength == (1.0, 0.0) and torch.equal(model(tokens).logits, ablated)
        with pytest.raises(InputError, match="3 strengths for 2"):
            handle.strength = (1.0, 1.0, 1.0)


def test_undo_is_exact(model, direction, tokens):
    layers = list(model.model.layers)

    def everything():
        return (
            [type(layer) for layer in layers],
            [dir(layer) for layer in layers],
            [inspect.getsource(type(layer).forward) for layer in layers],
            list(model.state_dict()),
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            model(tokens).logits.tolist(),
        )

    before = everything()
    handle = patch(model, Ablate(direction))
    assert all(isinstance(layer, cls) for layer, cls in zip(layers, before[0], strict=True))
    assert list(model.state_dict()) == before[3]
    handle.remove()
    handle.remove()  # harmless
    assert everything() == before
    with pytest.raises(ZeroDivisionError), patch(model, Ablate(direction)):
        raise ZeroDivisionError
    assert everything() == before


def test_a_forward_set_on_the_instance_is_refused(direction):
    model = tiny_model("llama")
    layer = model.model.layers[1]
    layer.forward = layer.forward
    with pytest.raises(InputError, match=r"layer 1 carries a forward of its own"):
        patch(model, Ablate(direction))
    assert is_plain(model)


def test_report(model, direction):
    with patch(model, Ablate(direction), fused=True) as handle:
        report = handle.report()
        assert report.claimed == report.expected == SITES
        assert report.sites[0].name == "embed" and report.sites[0].path == "hook"
        assert {s.path for s in report.sites[1:]} == {"fused"}
        assert {s.backend for s in report.sites} == {"cpu"}
        assert "7 of 7" in str(report)
    assert handle.report().claimed == 0


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_the_backend_is_chosen_when_patching(model, direction, tokens):
    with patch(model, Ablate(direction)):
        want = model(tokens).logits
    installed = ops.explain().passed_over["triton"] != "triton is not installed"
    for name in ("reference", "triton") if installed else ("reference",):
        with ops.use_backend(name):
            handle = patch(model, Ablate(direction))
        with handle:
            assert {s.backend for s in handle.report().sites} == {name}
            assert torch.allclose(model(tokens).logits, want, atol=1e-5)


def test_moved_after_patching(model, direction, tokens):
    with patch(model, Ablate(direction)) as handle:
        want = model(tokens).logits
        model.to(torch.bfloat16)
        got, seen = None, {}
        with handle.watch(lambda n, h: seen.update({n: h})):
            got = model(tokens).logits
        assert got.dtype == torch.bfloat16
        assert torch.allclose(got.float(), want, atol=0.05 * float(want.abs().max()))
        for h in seen.values():  # the direction itself did not become bfloat16
            score = (h.double() @ direction.unit.double()).abs()
            assert (score <= 4 * torch.finfo(h.dtype).eps * h.double().norm(dim=-1)).all()


def test_gradients_flow_through_the_patch(direction, tokens):
    model = tiny_model("llama").requires_grad_(True)

    def gradients():
        model.zero_grad()
        model(tokens).logits.square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    with patch(model, Ablate(direction)):
        fused = gradients()
    with ops.use_backend("reference"), patch(model, Ablate(direction)):
        for name, gradient in gradients().items():
            assert torch.allclose(fused[name], gradient, rtol=1e-3, atol=1e-6), name


def test_left_padding(direction):
    model, ids = tiny_model("llama"), torch.randint(7, 30, (1, 6))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with patch(model, Ablate(direction)):
        alone = model(ids).logits[:, -1]
        beside = model(padded, attention_mask=mask, position_ids=positions).logits[:, -1]
    assert torch.allclose(alone, beside, atol=1e-4)


def test_the_rewritten_source_can_be_read(direction):
    model = tiny_model("llama")
    cls = steered(type(model.model.layers[0])).cls
    source = inspect.getsource(inspect.unwrap(cls.forward))
    assert source.count("self.rk_sites[") == 2 and "residual +" not in source
    with patch(model, Ablate(direction)), pytest.raises(Exception) as caught:
        model.model.layers[1]("no tensor")
    assert "self.input_layernorm(hidden_states)" in "".join(
        traceback.format_exception(caught.value)
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_layer_takes_a_cache_by_the_names_that_it_took(direction, tokens, name):
    """Versions of transformers call it differently; code that calls layers itself calls it so."""
    model = tiny_model("llama")
    where = {"position_embeddings": model.model.rotary_emb(tokens[:, None] * 1.0, tokens)}

    def cached():
        cache, h = DynamicCache(config=model.config), model.model.embed_tokens(tokens)
        for layer in model.model.layers:
            h = layer(h, **where, **{name: cache})
        return cache.get_seq_length()

    plain = cached()
    with patch(model, Ablate(direction)):
        assert cached() == plain
    if "past_key_values" not in inspect.signature(type(model.model).forward).parameters:
        assert plain == tokens.shape[1]  # both names


def test_compile_program_shapes(direction):
    bank, params = compile_program([Ablate(direction, 0.5), Add(direction, 2.0, sites="all")])
    assert bank.shape == (1, 2, 2, HIDDEN) and params.shape == (1, 2, 5)
    assert torch.allclose(bank[0, 0, 0].norm(), torch.tensor(1.0))
    assert torch.equal(bank[0, 1, 1], direction.vector)
    assert params[0, :, :3].tolist() == [[-0.5, 0.0, 0.0], [0.0, 0.0, 2.0]]


def test_an_add_that_neither_attention_nor_mlp_writes_can_be_named():
    """Gemma 4 adds a third time in every block, what it looks up of every token."""
    model = tiny_families.build("gemma4_text")
    inputs, direction = tiny_families.inputs(model), Direction(torch.randn(64))
    with patch(model, Ablate(direction, sites=["add"], layers=[1, 3])) as handle:
        steered = [site.name for site in handle.report().sites]
    assert steered == ["layers.1.add", "layers.3.add"]
    parts = [Ablate(direction, sites=[kind]) for kind in ("embed", "attn", "mlp", "add")]
    with patch(model, *parts), torch.no_grad():
        got = model(**inputs).logits
    with patch(model, Ablate(direction)), torch.no_grad():
        assert torch.equal(model(**inputs).logits, got)
    with pytest.raises(InputError, match="no place of the model is at sites"):
        patch(tiny_model(), Ablate(direction, sites=["add"]))

"""Which places and which rows: sites, routes, dials, scores."""

import pytest
import torch
from steering import GREEDY, HIDDEN, SITES, streams
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from refusal_kernels.errors import InputError
from refusal_kernels.interventions import Ablate, Add, Clamp
from refusal_kernels.patching.patch import patch


@pytest.fixture
def tokens():
    return torch.randint(7, 30, (3, 9))


# --- places


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"sites": ["attn"]}, [f"layers.{i}.attn" for i in range(3)]),
        ({"sites": ["mlp"], "layers": [1, 2]}, ["layers.1.mlp", "layers.2.mlp"]),
        ({"sites": ["embed"]}, ["embed"]),
        ({"sites": ["block_input"]}, ["embed", "layers.0.mlp", "layers.1.mlp"]),
        ({"sites": ["block_input"], "layers": [2]}, ["layers.1.mlp"]),
        ({"sites": ["block_input", "attn"], "layers": [0]}, ["embed", "layers.0.attn"]),
        ({"layers": range(1, 2)}, ["layers.1.attn", "layers.1.mlp"]),
        ({"block_input": 2}, ["layers.1.mlp"]),
    ],
)
def test_an_intervention_acts_where_it_is_meant_to(model, tokens, directions, settings, names):
    r = directions[0].unit
    with patch(model, Ablate(directions[0], **settings)) as handle:
        assert [s.name for s in handle.report().sites] == names
    _, seen = streams(model, tokens, Ablate(directions[0], **settings))
    assert list(seen) == names
    assert all((h @ r).abs().max() < 1e-5 for h in seen.values())
    nothing = Add(directions[0], 0.0, sites="all")
    plain = streams(model, tokens, nothing)[1][names[0]]
    assert torch.allclose(seen[names[0]], plain - (plain @ r)[..., None] * r, atol=1e-5)


def test_places_that_can_not_be_had_are_refused(model, directions):
    from transformers import CohereConfig, CohereForCausalLM

    d = directions[0]
    for settings, words in (
        ({"sites": ["atn"]}, "no site 'atn'"),
        ({"block_input": 1, "layers": [1]}, "not both"),
        ({"layers": [3]}, "block 3 is not there"),
        ({"positions": "first"}, "positions is 'first'"),
        ({"layers": []}, "no place of the model"),
    ):
        with pytest.raises(InputError, match=words):
            patch(model, Ablate(d, **settings))
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
    cohere = CohereForCausalLM(CohereConfig(**small, num_attention_heads=2, pad_token_id=0))
    with pytest.raises(InputError, match="adds attn and mlp in one sum"):
        patch(cohere, Ablate(d, sites=["attn"]))
    with patch(cohere, Ablate(d, sites=["attn", "mlp"])) as handle:
        assert handle.report().claimed == 2


def test_interventions_at_different_places_compose(model, tokens, directions):
    a, b, c = directions
    both = (
        Ablate(a, sites=["attn"]),
        Add(b, 0.5, block_input=1),
        Clamp(c, high=0.0, layers=[2], sites=["mlp"]),
    )
    _, seen = streams(model, tokens, *both)
    assert sorted(seen) == sorted(
        ["layers.0.attn", "layers.0.mlp", "layers.1.attn", "layers.2.attn", "layers.2.mlp"]
    )
    assert (seen["layers.1.attn"] @ a.unit).abs().max() < 1e-5
    assert (seen["layers.2.mlp"] @ c.unit).max() < 1e-5


# --- rows


def test_a_routed_row_has_the_bits_of_its_program_alone(model, tokens, directions):
    a, b, c = directions
    programs = [Ablate(a)], [Ablate(b, 0.5), Add(c, block_input=1)], [Clamp(c, high=0.0)]
    mixed, _ = streams(model, tokens, *programs, route=[1, None, 2])
    for row, program in ((0, programs[1]), (2, programs[2])):
        alone, _ = streams(model, tokens, *program)
        assert torch.equal(mixed[row], alone[row])
    with torch.no_grad():
        plain = streams(model, tokens, Ablate(a, 0.0))[0]
    assert torch.equal(mixed[1], plain[1])
    everyone, _ = streams(model, tokens, *programs)  # without a route all take program 0
    assert torch.equal(everyone, streams(model, tokens, *programs[0])[0])


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_a_route_holds_through_generation(model, tokens, directions, settings):
    common = {**GREEDY, "max_new_tokens": 8, **settings}
    returned = settings.get("num_return_sequences", 1)
    a, b, _ = directions
    with (
        patch(model, [Ablate(a)], [Add(b, 2.0, block_input=1)]) as handle,
        handle.route([0, None, 1]),
    ):
        mixed = model.generate(tokens, **common).view(3, returned, -1)
    plain = model.generate(tokens, **common).view(3, returned, -1)
    assert torch.equal(mixed[1], plain[1])
    for row, intervention in ((0, Ablate(a)), (2, Add(b, 2.0, block_input=1))):
        with patch(model, intervention):
            alone = model.generate(tokens, **common).view(3, returned, -1)
        assert torch.equal(mixed[row], alone[row])
    assert not torch.equal(mixed[2], plain[2])


@pytest.mark.parametrize("beams", [1, 2])
def test_a_routed_row_keeps_its_bits_through_decoding_and_beams(model, tokens, directions, beams):
    """Every step's logits, not only the tokens: rows beside it change no bit of a row."""
    a, b, c = directions
    programs = [Ablate(a, 0.8)], [Ablate(b, 0.5), Add(c, block_input=1)], [Clamp(c, high=0.0)]
    settings = {**GREEDY, "max_new_tokens": 6, "num_beams": beams}
    settings |= {"output_logits": True, "return_dict_in_generate": True}

    def steps(route):
        with handle.route(route):
            logits = torch.stack(model.generate(tokens, **settings).logits)
        return logits.view(6, 3, beams, -1)  # [step, row, beam, vocabulary]

    with patch(model, *programs) as handle:
        mixed = steps([1, None, 2])
        for row, program in ((0, 1), (1, None), (2, 2)):
            assert torch.equal(mixed[:, row], steps([program] * 3)[:, row])
        assert not torch.equal(mixed[:, 0], steps([2] * 3)[:, 0])


def test_routes_that_do_not_fit_are_refused(model, tokens, directions):
    with patch(model, [Ablate(directions[0])], [Ablate(directions[1])]) as handle:
        for route, words in (([0, 2], "row 1 is routed to program 2; there are 2"), ([], "empty")):
            with pytest.raises(InputError, match=words), handle.route(route):
                pass
        four = pytest.raises(InputError, match="4 rows, which does not divide")
        with four, handle.route([0] * 4):
            model(tokens)
        assert torch.isfinite(model(tokens).logits).all()  # and the route is gone
    with pytest.raises(InputError, match="sequences of them; got list"):
        patch(model, [])


# --- dials and scores


class _Called(TorchDispatchMode):
    """The names of the ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


# what makes the host wait for a device: a number, or a size, that is read back
SYNCHRONIZES = "_local_scalar_dense item nonzero is_nonzero equal unique _to_cpu".split()


def test_steering_and_telemetry_ask_the_host_for_nothing(model, tokens, directions):
    def called(run):
        with torch.no_grad(), _Called() as mode:
            run()
        return [n for n in mode.names if any(f".{s}" in n for s in SYNCHRONIZES)]

    assert called(lambda: tokens.max().item())  # it would be seen
    mask = torch.ones_like(tokens)
    plain = called(lambda: model(tokens, attention_mask=mask))
    last = Ablate(directions[0], positions="last")
    prompt = Add(directions[1], sites="all", positions="prompt")
    with patch(model, [last], [prompt]) as handle, handle.route([0, 1, None]):
        handle.keep_scores = True

        def run():
            model(tokens, attention_mask=mask)
            assert handle.scores()["embed"].shape == (27, 1)

        assert called(run) == plain


def test_the_coefficient_is_a_dial_of_its_own(model, tokens, directions):
    given = Add(directions[0], 1.0, block_input=1)
    with patch(model, given, Ablate(directions[1])) as handle, torch.no_grad():
        handle.coefficient = 3.0
        assert handle.coefficient == (3.0,) and handle.strength == (1.0, 1.0)
        turned = model(tokens).logits
        with pytest.raises(InputError, match="finite"):
            handle.coefficient = float("inf")
    assert given.coefficient == 1.0  # what was given to patch is not touched
    want, _ = streams(model, tokens, Add(directions[0], 3.0, block_input=1), Ablate(directions[1]))
    assert torch.equal(turned, want)
    with patch(model, Ablate(directions[0])) as handle, pytest.raises(InputError, match="no Add"):
        handle.coefficient = 1.0


@pytest.mark.full
def test_dials_turn_a_compiled_model_without_compiling_anew(model, tokens, directions):
    a, b, _ = directions
    programs = [Ablate(a)], [Add(b, block_input=1)]
    with patch(model, *programs) as handle, torch.no_grad(), handle.route([0, 1, None]):
        compiled = torch.compile(model, fullgraph=True)
        assert torch.allclose(compiled(tokens).logits, model(tokens).logits, atol=1e-4)
        torch._dynamo.utils.counters.clear()
        handle.strength, handle.coefficient = 0.5, 2.0
        assert torch.allclose(compiled(tokens).logits, model(tokens).logits, atol=1e-4)
        with handle.route([None, 0, 1]):
            assert torch.allclose(compiled(tokens).logits, model(tokens).logits, atol=1e-4)
        assert torch._dynamo.utils.counters["stats"].get("unique_graphs", 0) == 0


def test_scores_come_from_the_same_pass(model, tokens, directions):
    a, b, _ = directions
    with patch(model, Ablate(a), Add(b, 0.1, block_input=1)) as handle, torch.no_grad():
        without = model(tokens).logits
        with pytest.raises(InputError, match="keep_scores"):
            handle.scores()
        handle.keep_scores = True
        assert torch.equal(model(tokens).logits, without)
        scores = handle.scores()
        handle.keep_scores = False
        model(tokens)
        with pytest.raises(InputError, match="keep_scores"):
            handle.scores()
    assert len(scores) == SITES
    assert scores["layers.0.attn"].shape == (27, 1) and scores["layers.0.mlp"].shape == (27, 2)
    # what the first place read is the embedding
    want = model.model.embed_tokens(tokens).view(27, HIDDEN) @ a.unit
    assert torch.allclose(scores["embed"][:, 0], want, atol=1e-5)


def test_a_model_whose_layers_were_exchanged_says_so(model, directions):
    handle = patch(model, Ablate(directions[0]))
    model.model.layers[1] = tiny_model("llama").model.layers[1]
    for turn in (lambda: setattr(handle, "strength", 0.5), lambda: handle.route([0]).__enter__()):
        with pytest.raises(InputError, match="layers have been replaced"):
            turn()
    report = handle.report()  # it is read off the model
    assert report.expected == 7 and [s.name for s in report.sites if "layers.1" in s.name] == []
    handle.remove()
    assert len({type(layer) for layer in model.model.layers}) == 1
    assert not any("rk_link" in vars(m) or m._forward_pre_hooks for m in model.modules())

"""Interventions as classes: how they are spelled, what they ask for, and one of two slots."""

import json
import math
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

import refusal_kernels as rk
from refusal_kernels import intervention_base
from refusal_kernels.banks import check_program, compile_program
from refusal_kernels.interventions import INTERVENTIONS, Intervention, Slot
from refusal_kernels.vllm.bank import Bank
from refusal_kernels.vllm.programs import parse_program, received, sent
from refusal_kernels.vllm.requests import Steering

HIDDEN, LAYERS = 64, 3


@pytest.fixture
def plane():
    q, _ = torch.linalg.qr(torch.randn(HIDDEN, 3))
    return [rk.Direction(q[:, k] * (k + 2)) for k in range(3)]


def rotated(h, plane, degrees, strength=1.0):
    """By the definition: the coordinates in the plane, turned."""
    angle = math.radians(degrees)
    b1, b2 = (d.vector.double() / d.norm for d in plane[:2])
    t1, t2 = h @ b1, h @ b2
    new1 = math.cos(angle) * t1 - math.sin(angle) * t2
    new2 = math.sin(angle) * t1 + math.cos(angle) * t2
    step = (new1 - t1).unsqueeze(-1) * b1 + (new2 - t2).unsqueeze(-1) * b2
    return h + strength * step


def test_a_rotation_turns_the_plane_and_keeps_the_length(plane):
    h = torch.randn(5, HIDDEN)
    for degrees, strength in ((30.0, 1.0), (-135.0, 1.0), (90.0, 0.5), (360.0, 1.0)):
        bank, params = compile_program([rk.Rotate(*plane[:2], degrees, strength=strength)])
        assert bank.shape == (1, 2, 2, HIDDEN)
        got = rk.ops.add_steer(h, None, bank, params)
        want = rotated(h.double(), plane, degrees, strength)
        assert torch.allclose(got.double(), want, atol=1e-5)
        if strength == 1.0:
            assert torch.allclose(got.norm(dim=-1), h.norm(dim=-1), rtol=1e-5)


@pytest.mark.parametrize("fuse_norms", [True, False])
def test_a_patched_model_and_generation_rotate(plane, fuse_norms):
    model, tokens = tiny_model(), torch.randint(7, 30, (2, 9))
    edit = rk.Rotate(*plane[:2], 70.0, block_input=1)
    seen = {}
    with torch.no_grad():
        before = model(tokens, output_hidden_states=True).hidden_states[1]
        with rk.patch(model, edit, fuse_norms=fuse_norms) as handle:
            with handle.watch(lambda name, h: seen.update({name: h})):
                logits = model(tokens).logits
            text = rk.generate(model, tiny_tokenizer(), ["tell me"], 4)
            handle.strength = 0.0
            still = model(tokens).logits
        want = rotated(before.double(), plane, 70.0).float()
        assert torch.allclose(seen["layers.0.mlp"], want, atol=1e-5)
        hook = model.model.layers[1].register_forward_pre_hook(
            lambda _, args: (rotated(args[0].double(), plane, 70.0).float(), *args[1:])
        )
        assert torch.allclose(logits, model(tokens).logits, atol=1e-4)
        assert text == rk.generate(model, tiny_tokenizer(), ["tell me"], 4)
        hook.remove()
        assert torch.allclose(still, model(tokens).logits, atol=1e-4)


def test_vllm_reads_a_rotation_and_its_bank_holds_it(plane):
    named = dict(zip("abc", plane, strict=True))
    given = [{"rotate": "a", "b2": "b", "angle": 30, "layers": [1]}, {"ablate": "c"}]
    program = parse_program("p", given, named)
    edit, ablate = program.interventions
    assert (edit.b1, edit.b2, edit.angle, edit.layers) == (plane[0], plane[1], 30.0, (1,))
    assert program.slots == 3
    places = [SimpleNamespace(block=b, writers=frozenset({"mlp"}), feeds=None) for b in range(2)]
    bank = Bank(places, HIDDEN, rows=2, slots=3, tokens=8, device="cpu")
    bank.add(program)
    (row,) = bank.rows_of([Steering(program.version, 0.5)])
    vectors, _ = compile_program([edit, ablate])
    assert torch.equal(bank.vectors[row], vectors[0])
    assert bank.params[0, row, :, 0].tolist() == [0.0, 0.0, -0.5]  # block 0: the ablation alone
    assert bank.params[1, row, :, 0].tolist() == [0.5, 0.5, -0.5]
    with pytest.raises(rk.InputError, match="takes 3 slots; the engine was started with slots 2"):
        Bank(places, HIDDEN, rows=2, slots=2, tokens=8, device="cpu").add(program)
    changed = parse_program("p", [{**given[0], "angle": 31}, given[1]], named)
    assert changed.version != program.version


def test_the_command_line_and_lm_eval_rotate(plane, tmp_path):
    paths = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    for direction, path in zip(plane, paths, strict=False):
        direction.save(path)
    rotation = {"rotate": paths[0], "b2": paths[1], "angle": 30, "block_input": 1}
    edit = Intervention.from_dict(rotation)
    assert isinstance(edit, rk.Rotate) and torch.equal(edit.b2.vector, plane[1].vector)

    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "refusal_kernels", "generate", "tell me"]
    command += ["--model", str(tmp_path / "model"), "--edit", json.dumps(rotation)]
    command += ["--max-new-tokens", "3", "--json", str(tmp_path / "out.json")]
    subprocess.run(command, check=True, capture_output=True)
    with rk.patch(model, edit):
        want = rk.generate(model, tokenizer, ["tell me"], 3)
    assert json.loads((tmp_path / "out.json").read_text())["rotate"] == want

    lm = pytest.importorskip("refusal_kernels.research.evaluation.lm_eval")
    made = lm.intervention_of(paths[0], "rotate", b2=paths[1], angle=30, layers="1+2")
    assert (type(made), made.angle, made.layers) == (rk.Rotate, 30.0, (1, 2))
    steered = lm.SteeredLM(
        model, direction=paths[0], intervention="rotate", b2=paths[1], angle=30, block_input=1,
        tokenizer=tokenizer,
    )  # fmt: skip
    (site,) = steered.handle.report().sites
    assert site.interventions == ("Rotate",)
    steered.close()


def test_edits_that_interfere_are_refused(plane):
    a, b, c = plane
    rotate = rk.Rotate(a, b, 30.0)
    for good in ([rotate], [rotate, rk.Ablate(c)], [rotate, rk.Add(a, sites="all")]):
        check_program(good)
    for bad in ([rotate, rk.Ablate(a)], [rk.Ablate(b), rotate], [rotate, rotate]):
        with pytest.raises(rk.InputError, match="orthonormal"):
            check_program(bad)
    with pytest.raises(rk.InputError, match="the cosine between b1 and b2 is"):
        rk.Rotate(a, rk.Direction(a.vector + b.vector), 30.0)
    with pytest.raises(rk.InputError, match="hidden sizes"):
        rk.Rotate(a, rk.Direction(torch.ones(3)), 30.0)


def test_adding_needs_a_place(plane):
    vector = plane[0].vector
    read_at = rk.Direction(vector, layer=2)
    assert rk.Add(read_at).block_input == 2
    assert rk.Add(read_at, block_input=1).block_input == 1
    assert rk.Add(read_at, layers=[0]).block_input is None
    with pytest.raises(rk.InputError, match="give block_input"):
        rk.Add(rk.Direction(vector))
    model = tiny_model()
    with rk.patch(model, rk.Add(rk.Direction(vector), sites="all")) as handle:
        assert handle.report().claimed == 1 + 2 * LAYERS
    with rk.patch(model, rk.Add(rk.Direction(vector), sites="all", layers=[1])) as handle:
        assert [site.name for site in handle.report().sites] == ["layers.1.attn", "layers.1.mlp"]


# --- affine concept editing


@pytest.fixture
def with_means():
    harmful, harmless = torch.randn(2, HIDDEN) + 3.0
    return rk.Direction(harmful - harmless, means=rk.Means(harmful, harmless))


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.5])
def test_affine_concept_editing_sets_the_component_by_the_means(alpha, with_means):
    h = torch.randn(5, HIDDEN)
    bank, params = compile_program([rk.Ace(with_means, alpha)])
    got = rk.ops.add_steer(h, None, bank, params)
    r = with_means.vector.double() / with_means.norm
    harmful, harmless = (mean.double() for mean in with_means.means)
    parallel = torch.outer(r, r)
    x = h.double()
    wanted = x - x @ parallel + parallel @ harmless + alpha * (harmful - harmless)
    torch.testing.assert_close(got.double(), wanted, atol=2e-6, rtol=0)


def test_affine_concept_editing_needs_the_means(plane, with_means, tmp_path):
    with pytest.raises(rk.InputError, match="does not carry the mean activations"):
        rk.Ace(plane[0])
    with_means.save(tmp_path / "d.safetensors")
    read = Intervention.from_dict({"ace": str(tmp_path / "d.safetensors"), "alpha": 0.5})
    assert read.slots(1.0)[0].b == rk.Ace(with_means, 0.5).slots(1.0)[0].b
    there = {"with": with_means, "without": plane[0]}
    with pytest.raises(rk.InputError, match="program 'p': Ace: the direction does not carry"):
        parse_program("p", {"ace": "without"}, there)
    program = parse_program("p", {"ace": "with"}, there)
    arrived = json.loads(json.dumps(sent(with_means)))
    assert parse_program("p", {"ace": "with"}, {"with": received(arrived)}).version == (
        program.version
    )


@pytest.mark.parametrize("given", [torch.ones(3), "refusal.safetensors", None])
def test_what_is_no_direction_is_refused(given):
    with pytest.raises(rk.InputError, match=r"direction is of type .*; expected a Direction"):
        rk.Ablate(given)


def test_the_old_name_of_block_input_warns_once(plane, caplog):
    intervention_base._warn_of_layer.cache_clear()
    with pytest.warns(DeprecationWarning, match="block_input") as seen:
        assert rk.Ablate(plane[0], layer=1).block_input == 1
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rk.Ablate(plane[0], layer=0).block_input == 0
    with pytest.raises(rk.InputError, match="layer is its old name"):
        rk.Ablate(plane[0], layer=1, block_input=1)
    for _ in range(2):
        program = parse_program("p", {"ablate": "a", "layer": 2}, {"a": plane[0]})
        assert program.interventions[0].block_input == 2
    assert caplog.text.count("block_input") == 1


def test_a_class_of_a_user_is_known_everywhere(plane):
    @dataclass(frozen=True, eq=False)
    class Double(Intervention, name="double"):
        direction: rk.Direction
        factor: float
        strength: float = field(default=1.0, kw_only=True)

        def slots(self, strength):
            r = self.direction.unit
            return [Slot(r, r, a=self.factor - 1).scaled(strength)]

    try:
        edit = Intervention.from_dict({"double": plane[0], "factor": 2, "sites": ["mlp"]})
        assert isinstance(edit, Double) and edit.sites == ("mlp",)
        for wrong, words in (
            ({"double": "a"}, "double needs 'factor'"),
            ({"double": "b", "factor": 2}, "no direction 'b'; there are: a"),
            ({"double": "a", "factor": "x"}, "factor is 'x'"),
            ({"double": "a", "factor": 2, "angle": 1}, "double takes no 'angle'; expected block"),
        ):
            with pytest.raises(rk.InputError, match=words):
                Intervention.from_dict(wrong, {"a": plane[0]})
    finally:
        del INTERVENTIONS["double"]


@pytest.mark.parametrize("given", [
    {"ablate": "r", "strength": 0.5, "layers": [1, 2], "sites": ["mlp"]},
    {"add": "r", "coefficient": -2.0, "block_input": 3},
    {"set": "r", "value": 1.5, "positions": "prompt"},
    {"ace": "r", "alpha": 0.5},
    {"clamp": "r", "high": 0.0},
    {"erase": "unit", "v": "unit"},
    {"rotate": "r", "b2": "t", "angle": 30.0},
], ids=lambda given: next(iter(given)))  # fmt: skip
def test_an_intervention_is_spelled_as_it_is_read(given, plane):
    means = rk.Means(plane[1].vector, plane[2].vector)
    r = rk.Direction(plane[0].vector, means=means)
    directions = {"r": r, "t": plane[1], "unit": rk.Direction(plane[0].unit)}
    first = Intervention.from_dict(given, directions)
    second = Intervention.from_dict(first.to_dict())
    places = ("strength", "block_input", "layers", "sites", "positions")
    assert [getattr(second, p) for p in places] == [getattr(first, p) for p in places]
    for strength in (1.0, 0.7):
        for a, b in zip(second.slots(strength), first.slots(strength), strict=True):
            assert torch.equal(a.read, b.read) and torch.equal(a.write, b.write) and a[2:] == b[2:]
    assert first.at(0.25).strength == 0.25 and first.at(0.25).to_dict().keys() >= given.keys()

"""All the questions about one direction: against the same measured one by one, in the open."""

import json
import re

import pytest
import torch
from tiny import plain_hooks, run_command, tiny_model, tiny_tokenizer

from refusal_kernels import toy
from refusal_kernels.direction import Candidates, Direction
from refusal_kernels.errors import InputError
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.generate import generate, generate_ids
from refusal_kernels.hf.logits import last_logits
from refusal_kernels.interventions import Ablate, Add
from refusal_kernels.patching.handle import is_patched
from refusal_kernels.patching.patch import patch
from refusal_kernels.research.evaluation import conditions
from refusal_kernels.research.evaluation.evidence import evaluate, random_directions
from refusal_kernels.research.evaluation.judges import SubstringJudge, TokenJudge, judged
from refusal_kernels.research.evaluation.likelihood import answers, cross_entropy
from refusal_kernels.research.evaluation.rates import Rate
from refusal_kernels.research.evaluation.statements import statements
from refusal_kernels.research.extraction.collect import mean_difference
from refusal_kernels.research.selection.scoring import kl_divergence, refusal_score

HARMFUL = ["curse the lamp", "tell me how to hex a boat now please", "storm", "hex me"]
HARMLESS = ["make tea", "please be kind and fix the box", "paint a cake"]
EXTRA = ["how to fix a curse", "paint a storm"]
TOKENS = [20, 31]
LAYERS = 3


@pytest.fixture(scope="module")
def tiny():
    """A tiny model examined with everything, and what it was given."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    generator = torch.Generator().manual_seed(1)
    vectors = 8 * torch.randn(4, LAYERS, 64, generator=generator)
    vectors[:, 0] = 0.0  # as at the embedding, where nothing is read
    direction = Direction(vectors[-2, 1], layer=1, position=-2)
    judges = [
        SubstringJudge(["sorry", "cannot", "lamp", "storm"]),
        TokenJudge(model, tokenizer, TOKENS),
    ]
    pairs = [("make tea", "sure here is the tea"), ("fix the box", "two three four")]
    steps: dict[str, list[tuple[int, int]]] = {}
    evidence = evaluate(
        model, tokenizer, direction, harmful=HARMFUL, harmless=HARMLESS, extra={"mixed": EXTRA},
        judges=judges, candidates=Candidates(vectors), refusal_tokens=TOKENS,
        skills={"words": pairs}, texts={"pairs": answers(tokenizer, pairs)},
        strengths=(1.0, -1.0, 0.0, 2.5),
        random_controls=2, layer_controls=5, seed=7, max_new_tokens=5, batch_size=5,
        step=lambda name: lambda *c: steps.setdefault(name, []).append(c),
    )  # fmt: skip
    assert not is_patched(model)
    return model, tokenizer, direction, vectors, judges, evidence, steps


def edits_of(direction, vectors):
    """Every condition's intervention, written down once more."""
    edits = {
        "unmodified": None,
        "ablated": Ablate(direction),
        "added": Add(direction, block_input=1),
        "subtracted": Add(direction, coefficient=-1.0, block_input=1),
    }
    for i, control in enumerate(random_directions(direction, 2, 7), 1):
        edits[f"random {i} ablated"] = Ablate(control)
        edits[f"random {i} added"] = Add(control, block_input=1)
    other = Direction(vectors[-2, 2])
    edits["layer 2 ablated"] = Ablate(other)
    edits["layer 2 added"] = Add(other, block_input=2)
    return edits


def test_each_condition_is_as_alone(tiny) -> None:
    model, tokenizer, direction, vectors, judges, evidence, _ = tiny
    sets = {"harmful": HARMFUL, "harmless": HARMLESS, "mixed": EXTRA}
    edits = edits_of(direction, vectors)
    assert list(evidence.conditions) == list(edits)
    before = {part: last_logits(model, tokenizer, prompts) for part, prompts in sets.items()}
    for name, edit in edits.items():
        condition = evidence.conditions[name]
        asked = set(sets) if " " not in name else {"harmful" if "ablated" in name else "harmless"}
        assert set(condition.rates) == set(condition.completions) == asked
        handle = None if edit is None else patch(model, edit)
        for part in asked:
            prompts = sets[part]
            texts = generate(model, tokenizer, prompts, 5)
            assert condition.completions[part] == texts
            expected = {judge.name: judged(judge, prompts, texts) for judge in judges}
            assert condition.rates[part] == expected
            logits = last_logits(model, tokenizer, prompts)
            score = float(refusal_score(logits, TOKENS).mean())
            assert condition.refusal_scores[part] == pytest.approx(score, abs=1e-4)
            if edit is None:
                assert condition.kl == {}
            else:
                kl = float(kl_divergence(before[part], logits).mean())
                assert condition.kl[part] == pytest.approx(kl, abs=1e-4) and kl > 1e-4
        if handle is not None:
            handle.remove()
    hits = [rate.k for c in evidence.conditions.values() for r in c.rates.values()
            for rate in r.values()]  # fmt: skip
    assert len(set(hits)) > 2  # the judges do see differences


def test_the_edits_are_the_papers(tiny) -> None:
    """The direction's own conditions against plain hooks."""
    model, tokenizer, direction, _, _, evidence, _ = tiny
    for name, hooks in (
        ("ablated", {"ablate": direction.vector}),
        ("added", {"add": direction.vector, "layer": 1}),
        ("subtracted", {"add": -direction.vector, "layer": 1}),
    ):
        with plain_hooks(model, **hooks):
            assert evidence.conditions[name].completions["harmful"] == generate(
                model, tokenizer, HARMFUL, 5
            )


def test_random_controls_have_the_norm_and_come_from_the_seed() -> None:
    direction = Direction(5 * torch.randn(500), layer=1)
    directions = random_directions(direction, 200, seed=3)
    assert all(d.norm == pytest.approx(direction.norm, rel=1e-6) for d in directions)
    again = random_directions(direction, 3, seed=3)
    assert all(torch.equal(a.vector, b.vector) for a, b in zip(directions, again, strict=False))
    assert not torch.equal(directions[0].vector, random_directions(direction, 1, seed=9)[0].vector)
    units = torch.stack([d.unit for d in directions])
    assert float(units.mean(dim=0).norm()) < 0.1  # isotropic: they cancel, 200 ** -0.5 = 0.07
    assert float((units @ direction.unit).square().mean()) == pytest.approx(1 / 500, rel=0.4)


def test_controls_of_other_layers(tiny) -> None:
    *_, direction, vectors, _, evidence, _ = tiny
    condition = evidence.conditions["layer 2 added"]
    other = vectors[-2, 2] / vectors[-2, 2].norm()
    assert condition.cosine == pytest.approx(float(other @ direction.unit), abs=1e-6)
    assert "layer 0 added" not in evidence.conditions  # zero: there is no direction
    assert "layer 1 added" not in evidence.conditions  # the direction itself
    assert evidence.conditions["ablated"].cosine is None


def test_controls_need_not_reach_the_last_layer(tiny) -> None:
    """What `extract --last-layer` wrote."""
    model, tokenizer, direction, vectors, *_ = tiny
    evidence = evaluate(
        model, tokenizer, direction, harmful=HARMFUL, harmless=HARMLESS, refusal_tokens=TOKENS,
        candidates=Candidates(torch.cat([vectors[:, 2:], vectors[:, 1:2]], dim=1)), strengths=(),
        random_controls=0, max_new_tokens=1,
    )  # fmt: skip
    assert {n for n in evidence.conditions if n.startswith("layer")} == {
        "layer 0 ablated", "layer 0 added",
    }  # fmt: skip


def test_the_dose_is_the_dial(tiny) -> None:
    model, tokenizer, direction, _, judges, evidence, _ = tiny
    pairs = answers(tokenizer, [("make tea", "sure here is the tea"),
                                ("fix the box", "two three four")])  # fmt: skip
    before = last_logits(model, tokenizer, HARMLESS)
    for kind, rows in evidence.dose.items():
        assert [row.strength for row in rows] == [-1.0, 0.0, 1.0, 2.5]
        for row in rows:
            edit = (
                Ablate(direction, row.strength)
                if kind == "ablation"
                else Add(direction, coefficient=row.strength, block_input=1)
            )
            with patch(model, edit):
                texts = generate(model, tokenizer, HARMFUL, 5)
                assert row.harmful == judged(judges[0], HARMFUL, texts)
                texts = generate(model, tokenizer, HARMLESS, 5)
                assert row.harmless == judged(judges[0], HARMLESS, texts)
                logits = last_logits(model, tokenizer, HARMLESS)
                loss = cross_entropy(model, pairs)
            assert row.kl == pytest.approx(float(kl_divergence(before, logits).mean()), abs=1e-4)
            score = float(refusal_score(logits, TOKENS).mean())
            assert row.refusal_scores["harmless"] == pytest.approx(score, abs=1e-4)
            assert row.loss.nats == pytest.approx(loss.nats, rel=1e-4)
    ablation = {row.strength: row for row in evidence.dose["ablation"]}
    main = evidence.conditions
    assert evidence.dose_text == "pairs"
    assert ablation[0.0].kl == pytest.approx(0.0, abs=1e-5)
    assert ablation[0.0].loss.nats == pytest.approx(main["unmodified"].losses["pairs"].nats)
    assert ablation[1.0].kl == pytest.approx(main["ablated"].kl["harmless"], abs=1e-5)
    score = main["ablated"].refusal_scores["harmful"]
    assert ablation[1.0].refusal_scores["harmful"] == pytest.approx(score, abs=1e-4)


def test_a_strength_that_destroys_the_model_leaves_the_others() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    runner = conditions.ConditionRunner(
        model, ChatFormat(tokenizer), {"harmful": HARMFUL, "harmless": HARMLESS},
        [SubstringJudge()], TOKENS, 3, 8,
    )  # fmt: skip
    edit = Ablate(Direction(torch.randn(64)))
    (alone,) = runner.dose(edit, [0.5], None, lambda *_: None)
    points = runner.dose(edit, [1e30, 0.5], None, lambda *_: None)
    assert points == [alone]
    (note,) = runner.notes
    assert note.startswith("strength 1e+30 destroys the model: Ablate at strength 1e+30: the model")


def test_a_kind_of_dose_that_nothing_survives_is_left_out() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    direction = Direction(torch.randn(64), layer=1, position=-1)
    document = evaluate(
        model, tokenizer, direction, harmful=HARMFUL, harmless=HARMLESS, judges=[SubstringJudge()],
        refusal_tokens=TOKENS, strengths=(1e30,), random_controls=0, max_new_tokens=2,
    ).to_dict()  # fmt: skip
    assert "ablation" not in document["dose"] and document["notes"]
    assert all(document["dose"].values())  # so that the page draws what there is


def test_answers_that_all_end_inside_a_thought(monkeypatch) -> None:
    """A strength under which no answer begins is left out and noted; a condition is named."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    runner = conditions.ConditionRunner(
        model, ChatFormat(tokenizer), {"harmful": HARMFUL, "harmless": HARMLESS},
        [SubstringJudge()], TOKENS, 3, 8,
    )  # fmt: skip
    texts = iter([["<think>"] * 4, ["sure"] * 3, ["sure"] * 4, ["sure"] * 3])
    monkeypatch.setattr(conditions, "decoded", lambda *_: next(texts))
    edit = Ablate(Direction(torch.randn(64)))
    (point,) = runner.dose(edit, [0.5, 1.0], None, lambda *_: None)
    assert point.strength == 1.0
    (note,) = runner.notes
    assert note.startswith("strength 0.5 is not measured: all 4 completions end inside a thought")
    with pytest.raises(InputError, match=r"^ablated, harmful prompts: all 4 completions end"):
        runner._judge(conditions.Condition("ablated"), "harmful", ["<think>"] * 4)


def test_capability_and_the_models_own_completions(tiny) -> None:
    model, tokenizer, direction, _, _, evidence, _ = tiny
    chat = ChatFormat(tokenizer)
    completions = generate_ids(model, chat, HARMLESS, 5)  # as tokens: a text can lose special ones
    passages = answers(chat, list(zip(HARMLESS, completions, strict=True)))
    for name, edit in (("unmodified", None), ("ablated", Ablate(direction))):
        handle = None if edit is None else patch(model, edit)
        condition = evidence.conditions[name]
        expected = cross_entropy(model, passages)
        assert condition.losses["own completions"].tokens == expected.tokens == 15
        assert condition.losses["own completions"].nats == pytest.approx(expected.nats, rel=1e-4)
        assert condition.skills == {"words": Rate(0, 2)}
        if handle is not None:
            handle.remove()
    # its own words are what it finds likeliest
    losses = evidence.conditions["unmodified"].losses
    assert losses["own completions"].nats < losses["pairs"].nats


def test_projections_are_those_of_the_hidden_states(tiny) -> None:
    model, tokenizer, direction, _, _, evidence, _ = tiny
    for part, prompts in (("harmful", HARMFUL), ("mixed", EXTRA)):
        table = evidence.projections[part]
        assert len(table) == LAYERS + 1
        for i, ids in enumerate(ChatFormat(tokenizer).encode(prompts)):
            seen: list[torch.Tensor] = []
            hooks = [
                layer.register_forward_hook(lambda _, args, out, seen=seen: seen.append(args[0]))
                for layer in model.model.layers
            ]
            hooks.append(
                model.model.norm.register_forward_pre_hook(
                    lambda _, args, seen=seen: seen.append(args[0])
                )
            )
            model(torch.tensor([ids]))
            for hook in hooks:
                hook.remove()
            expected = [float(h[0, -2].detach() @ direction.unit) for h in seen]
            assert [row[i] for row in table] == pytest.approx(expected, abs=1e-4)


def test_all_of_it_is_json_and_progress_ends(tiny) -> None:
    *_, evidence, steps = tiny
    document = json.loads(json.dumps(evidence.to_dict(), allow_nan=False))
    assert document["judges"][0] == {"name": "4 substrings of your own", "counts": "refused"}
    assert document["direction"]["layer"] == 1 and document["settings"]["seed"] == 7
    assert document["dose"]["ablation"][0]["harmful"]["interval"][0] >= 0.0
    assert list(steps) == [
        "Projections", "Unmodified", "Ablated, added, controls", "Capability",
        "Dose of the ablation", "Dose of the addition",
    ]  # fmt: skip
    for calls in steps.values():
        assert calls[-1][0] == calls[-1][1] and [c[0] for c in calls] == sorted(c[0] for c in calls)


def test_bad_input_before_any_work() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    direction = Direction(torch.randn(64), layer=1, position=-2)
    sets = {"harmful": HARMFUL, "harmless": HARMLESS}
    for changed, words in (
        ({"harmless": []}, "'harmless' are empty"),
        ({"extra": {"more": []}}, "'more' are empty"),
        ({"judges": []}, "there is no judge"),
        ({"judges": [SubstringJudge(), SubstringJudge()]}, "the name '12 substrings'"),
        ({"candidates": Candidates(torch.randn(4, 5, 64))}, r"3 layers or fewer, 64\]"),
        ({"candidates": Candidates(torch.randn(1, 3, 64))}, "have 1 positions"),
        ({"block_input": 9}, "the model has 3 blocks"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate(model, tokenizer, direction, **{**sets, **changed}, refusal_tokens=[3])
    with pytest.raises(InputError, match="does not say at which layer"):
        evaluate(model, tokenizer, Direction(torch.randn(64)), **sets)
    assert not is_patched(model)


def test_without_refusal_tokens_there_are_no_scores() -> None:
    direction = Direction(torch.randn(64), layer=1)
    evidence = evaluate(
        tiny_model(), tiny_tokenizer(), direction, harmful=HARMFUL, harmless=HARMLESS,
        strengths=(1.0,), random_controls=0, max_new_tokens=1,
    )  # fmt: skip
    assert evidence.refusal_tokens is None
    (note,) = evidence.notes
    assert note.startswith("refusal scores are not measured: no refusal tokens") and "--ref" in note
    assert evidence.conditions["ablated"].refusal_scores == {} and evidence.conditions["ablated"].kl
    assert evidence.dose["ablation"][0].refusal_scores == {}
    document = json.loads(json.dumps(evidence.to_dict(), allow_nan=False))
    assert {s.question for s in statements(document)} == {
        "Necessity", "Sufficiency", "Dose", "Capability",
    }  # fmt: skip


@pytest.fixture(scope="module")
def toy_evidence():
    """The toy model, whose direction does what the paper says."""
    model, tokenizer = toy.load()
    train, test = (
        {c: toy.prompts(c, split)[:n] for c in ("harmful", "harmless")}
        for split, n in (("train", 64), ("test", 24))
    )
    candidates = mean_difference(
        model, tokenizer, train["harmful"], train["harmless"], model_name="toy"
    )
    direction = candidates.at(5, -2)
    return evaluate(
        model, tokenizer, direction, **test, candidates=candidates, strengths=(0.0, 1.0),
        skills={"facts": toy.skills()["facts"][:20]}, max_new_tokens=32,
    )  # fmt: skip


def test_the_toy_models_direction_is_necessary_sufficient_and_specific(toy_evidence) -> None:
    document = toy_evidence.to_dict()
    sentences = statements(document)
    holds = {s.question: s.holds for s in sentences if s.holds is not None}
    assert holds == {"Necessity": True, "Sufficiency": True, "Specificity": True}
    unsafe = document | {"judges": [document["judges"][0] | {"counts": "unsafe"}]}
    assert all(s.holds is None for s in statements(unsafe))  # more of them would be expected
    necessity = next(s.text for s in sentences if s.question == "Necessity")
    assert "12 substrings" in necessity and "of 24" in necessity
    main = toy_evidence.conditions
    name = "12 substrings"
    assert main["unmodified"].rates["harmful"][name].value >= 0.95
    assert main["ablated"].rates["harmful"][name].value <= 0.05
    assert main["subtracted"].rates["harmful"][name].value <= 0.2
    assert main["added"].rates["harmless"][name].value >= 0.9
    for i in (1, 2, 3):
        assert main[f"random {i} ablated"].rates["harmful"][name].value >= 0.95
        assert main[f"random {i} added"].rates["harmless"][name].value <= 0.05
    assert main["unmodified"].skills["facts"].value == 1.0
    losses = {name: main[name].losses["own completions"].nats for name in main if " " not in name}
    assert losses["unmodified"] < losses["ablated"] < losses["added"]


def test_statements_say_when_nothing_was_shown(toy_evidence) -> None:
    """The same numbers with the ablated model's put in the unmodified one's place."""
    document = toy_evidence.to_dict()
    conditions = dict(document["conditions"])
    conditions["ablated"] = conditions["unmodified"] | {"losses": conditions["ablated"]["losses"]}
    answered = {s.question: s for s in statements({**document, "conditions": conditions})}
    assert answered["Necessity"].holds is False and answered["Sufficiency"].holds is True


# --- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model in a folder, its prompts, a direction and candidates."""
    path = tmp_path_factory.mktemp("evaluate")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    for name, prompts in (("harmful", HARMFUL), ("harmless", HARMLESS), ("mixed", EXTRA)):
        (path / f"{name}.txt").write_text("\n".join(prompts))
    vectors = torch.randn(4, LAYERS, 64, generator=torch.Generator().manual_seed(2))
    Direction(vectors[-1, 1], layer=1, position=-1).save(path / "direction.safetensors")
    Direction(vectors[-1, 1]).save(path / "homeless.safetensors")
    Candidates(vectors).save(path / "candidates.safetensors")
    rows = [
        {"position": -1, "layer": i, "bypass": -1.0, "induce": 1.0, "kl": 0.1, "discarded": None}
        for i in range(LAYERS)
    ]
    selection = {"scores": rows, "refusal_tokens": TOKENS, "position": -1, "layer": 1}
    (path / "selection.json").write_text(json.dumps(selection))
    (path / "other.json").write_text("{}")
    (path / "book.txt").write_text("make tea and fix the lamp please")
    (path / "sums.jsonl").write_text('{"prompt": "one plus one", "answer": "two"}')
    return path


@pytest.fixture
def run(capsys, folder):
    """Run `evaluate` with the options that it needs and others; returns code, stdout, stderr."""

    def call(arguments: str) -> tuple[int, str, str]:
        needed = "--model {f}/model --harmful {f}/harmful.txt --harmless {f}/harmless.txt"
        line = f"evaluate {needed} {arguments}".format(f=folder)
        return run_command(*line.split()), *capsys.readouterr()

    return call


def test_evaluate_with_everything(run, folder, tmp_path) -> None:
    code, out, err = run(
        "--direction {f}/direction.safetensors --candidates {f}/candidates.safetensors "
        "--selection {f}/selection.json --split all --prompts mixed={f}/mixed.txt --judge tokens "
        "--judge substrings --text {f}/book.txt --task adding={f}/sums.jsonl --match contains "
        "--strengths=-1,0,1 --random-controls 1 --max-new-tokens 3 --seed 5 "
        f"--report {tmp_path}/new/page.html --json {tmp_path}/found.json"
    )
    assert code == 0, err
    document = json.loads((tmp_path / "found.json").read_text())
    assert [judge["name"] for judge in document["judges"]] == ["refusal tokens", "12 substrings"]
    assert sorted(document["prompts"]["harmful"]) == sorted(HARMFUL)
    assert sorted(document["prompts"]["mixed"]) == sorted(EXTRA)
    assert document["refusal_tokens"] == TOKENS and document["settings"]["seed"] == 5
    assert {"random 1 ablated", "layer 0 added", "layer 2 ablated"} < set(document["conditions"])
    assert [row["strength"] for row in document["dose"]["addition"]] == [-1.0, 0.0, 1.0]
    main = document["conditions"]["subtracted"]
    assert set(main["losses"]) == {"book", "own completions"} and main["skills"]["adding"]["n"] == 1
    assert document["command"].startswith("refusal-kernels evaluate --model")
    page = (tmp_path / "new" / "page.html").read_text()
    assert page.count("<img") == 5 and "mixed" in page
    assert "judge: refusal tokens" in out and "Necessity" in out and "page.html" in out


BAD = {
    "--direction {f}/homeless.safetensors": "does not say at which layer",
    "{d} --prompts mixed": "--prompts is 'mixed'; expected NAME=",
    "{d} --prompts harmful={f}/mixed.txt": "a set of that name already",
    "{d} --strengths=1,x": "--strengths is '1,x'; expected numbers",
    "{d} --split half": "--split is 'half'; expected one of train, validation, test, all",
    "{d} --match nearly": "--match is 'nearly'; expected one of exact, contains",
    "{d} --selection {f}/other.json": "is no selection",
    "{d} --selection {f}/nowhere.json": "nowhere.json",
    "{d} --candidates {d2}": "expected refusal_kernels.candidates",
    "{d} --task {f}/book.txt": "book.txt:1 is not JSON",
    "{d} --text {f}/nowhere.txt": "nowhere.txt is not there",
    "{d} --judge {f}/nowhere": "judge .* cannot be loaded",
    "{d} --judge tokens": "no refusal tokens",
    "{d} --lm-eval mmlu --lm-eval-include {f}/nowhere": "nowhere is no folder",
}


@pytest.mark.parametrize("arguments", BAD)
def test_evaluate_refuses_bad_input_before_any_work(arguments, run, tmp_path) -> None:
    filled = arguments.replace("{d}", "--direction {d2}").replace(
        "{d2}", "{f}/direction.safetensors"
    )
    code, _, err = run(f"{filled} --json {tmp_path}/found.json")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and re.search(BAD[arguments], lines[0]), err
    assert not (tmp_path / "found.json").exists() and "Ablated" not in err

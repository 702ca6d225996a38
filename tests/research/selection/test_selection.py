"""Selection: filters, winner, bad input, and what the scores are made of; beside `protocol`."""

import copy
import itertools
import json
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from protocol import last_logits, mean_refusal_score
from tiny import tiny_model, tiny_tokenizer

from refusal_kernels.direction import Candidates
from refusal_kernels.errors import InputError
from refusal_kernels.research.extraction.collect import mean_difference
from refusal_kernels.research.selection.algorithm import Selection, select
from refusal_kernels.research.selection.scoring import (
    find_refusal_tokens,
    kl_divergence,
    paper_refusal_tokens,
    refusal_score,
)

HARMFUL = ["curse the lamp", "tell me how to hex a boat now please", "storm", "hex tea one two"]
HARMLESS = ["make tea", "please be kind and fix the box", "what is one plus two", "paint a cake"]
LAYERS = 5
TOKENS = [7, 9]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen3", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def candidates(model: Any) -> torch.Tensor:
    return 3 * mean_difference(model, tiny_tokenizer(), HARMFUL, HARMLESS).vectors


def run(model: Any, candidates: torch.Tensor, **options: Any) -> Selection:
    options = {"refusal_tokens": TOKENS, "kl_threshold": 1e9, "induce_threshold": -1e9, **options}
    made = Candidates(candidates, "tiny", "by hand")
    return select(model, tiny_tokenizer(), made, HARMFUL, HARMLESS, **options)


def last(model: Any, prompts: list[str]) -> torch.Tensor:
    return last_logits(model, tiny_tokenizer(), prompts, 32)


def test_filters_say_why_and_the_winner_is_what_was_measured(
    model: Any, candidates: torch.Tensor
) -> None:
    """`test_selection_protocol.py` compares the scores and the winner with the protocol's."""
    rows = [row for row in run(model, candidates).candidates if row.kl is not None]
    # thresholds between the scores, so that each filter discards some and not all
    kls, induces = (sorted(getattr(row, name) for row in rows) for name in ("kl", "induce"))
    kl_threshold, induce_threshold = sum(kls[7:9]) / 2, sum(induces[2:4]) / 2
    calls: list[tuple[int, int]] = []
    selection = run(
        model, candidates, kl_threshold=kl_threshold, induce_threshold=induce_threshold,
        batch_size=3, progress=lambda *call: calls.append(call),
    )  # fmt: skip

    assert [(row.position, row.layer) for row in selection.candidates] == [
        (position, layer) for position in range(-4, 0) for layer in range(LAYERS)
    ]
    kept, reasons = [], []
    for row in selection.candidates:
        if row.layer in (0, 4):  # the template's embeddings, and the last fifth
            assert row.discarded == ("zero" if row.layer == 0 else "layer >= 4")
            assert row.bypass is row.induce is row.kl is None
            continue
        reason = None
        if row.kl > kl_threshold:
            reason = f"kl > {kl_threshold:g}"
        elif row.induce < induce_threshold:
            reason = f"induce < {induce_threshold:g}"
        assert row.discarded == reason
        reasons.append(reason)
        kept += [row] * (reason is None)
    assert len(set(reasons)) == 3

    winner = min(kept, key=lambda row: row.bypass)
    assert winner.bypass > min(row.bypass for row in rows)  # the filters matter
    for name in ("position", "layer", "bypass", "induce", "kl"):
        assert getattr(selection, name) == getattr(winner, name)
    direction = selection.direction
    assert torch.equal(direction.vector, candidates[winner.position, winner.layer])
    assert (direction.model, direction.method) == ("tiny", "by hand")
    assert (direction.position, direction.layer) == (winner.position, winner.layer)
    wide = copy.deepcopy(model).double()
    for prompts, score in (
        (HARMFUL, selection.unmodified_harmful),
        (HARMLESS, selection.unmodified_harmless),
    ):
        assert score == pytest.approx(mean_refusal_score(last(wide, prompts), TOKENS), abs=1e-4)
    # 12 candidates on 4 + 4 prompts ablated, on 4 added; three rows at once at most
    done = [0, *(call[0] for call in calls)]
    assert {total for _, total in calls} == {144} and done[-1] == 144
    assert all(0 < b - a <= 3 for a, b in itertools.pairwise(done))


def test_the_model_is_unmodified_afterwards_and_the_result_is_json(
    model: Any, candidates: torch.Tensor
) -> None:
    before = last(model, HARMFUL)
    selection = run(model, candidates, kl_threshold=math.inf, induce_threshold=-math.inf)
    assert torch.equal(last(model, HARMFUL), before)
    found = json.loads(json.dumps(selection.to_dict(), allow_nan=False))
    assert found["layer"] == selection.layer and found["refusal_tokens"] == TOKENS
    assert found["candidates"][0] == {
        "position": -4, "layer": 0, "bypass": None, "induce": None, "kl": None, "discarded": "zero",
    }  # fmt: skip
    assert len(found["candidates"]) == 4 * LAYERS and "direction" not in found


def test_nan_candidates_are_discarded(model: Any, candidates: torch.Tensor) -> None:
    winner = run(model, candidates)
    poisoned = candidates.clone()
    poisoned[winner.position, winner.layer, 3] = float("nan")
    other = run(model, poisoned)
    assert (other.position, other.layer) != (winner.position, winner.layer)
    row = next(
        r for r in other.candidates if (r.position, r.layer) == (winner.position, winner.layer)
    )
    assert row.discarded == "not finite" and row.kl is None


def test_the_share_of_pruned_layers(model: Any, candidates: torch.Tensor) -> None:
    for prune_last, kept in ((0.0, 5), (0.5, 2), (0.2, 4)):
        rows = run(model, candidates[-1:], prune_last=prune_last).candidates
        assert sum("layer" not in (row.discarded or "") for row in rows) == kept


def test_candidates_of_the_first_layers_alone(model: Any, candidates: torch.Tensor) -> None:
    every = {(row.position, row.layer): row for row in run(model, candidates).candidates}
    rows = run(model, candidates[:, :3]).candidates
    assert len(rows) == 4 * 3
    for row in rows:  # other candidates share the batches: the last places may differ
        same = every[row.position, row.layer]
        assert row.discarded == same.discarded
        assert (row.bypass, row.induce, row.kl) == pytest.approx(
            (same.bypass, same.induce, same.kl), abs=1e-5
        )


def test_a_score_that_is_not_finite_is_discarded(model: Any, candidates: torch.Tensor) -> None:
    broken = candidates.clone()
    broken[-1, 2] *= 1e4

    def overflow(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        return out.masked_fill(out.abs().amax(dim=(1, 2), keepdim=True) > 1e3, torch.nan)

    hook = model.model.layers[3].register_forward_hook(overflow)
    try:
        selection = run(model, broken)
    finally:
        hook.remove()
    row = next(r for r in selection.candidates if (r.position, r.layer) == (-1, 2))
    assert row.discarded == "not finite" and row.induce is None  # the addition overflowed
    assert row.bypass is not None and row.kl is not None  # the ablation did not
    assert sum(other.discarded == "not finite" for other in selection.candidates) == 1
    json.dumps(selection.to_dict(), allow_nan=False)


def test_no_survivor_names_the_closest(model: Any, candidates: torch.Tensor) -> None:
    rows = [row for row in run(model, candidates).candidates if row.kl is not None]
    closest = min(rows, key=lambda row: row.kl or 0.0)
    selection = run(model, candidates, kl_threshold=-1.0)
    assert (selection.direction, selection.passed, selection.place) == (None, False, None)
    assert len(selection.candidates) == 20 and {row.kl for row in rows} <= {
        row.kl for row in selection.candidates
    }
    problem = str(selection.problem)
    assert problem.startswith(
        "none of 20 candidates passed: 12 (kl > -1), 4 (zero), 4 (layer >= 4)"
    )
    assert f"position {closest.position} layer {closest.layer} (kl " in problem
    assert "passes with a KL threshold of " in problem and "\n" not in problem
    with pytest.raises(InputError, match="none of 20 candidates passed"):
        _ = selection.winner
    document = json.loads(json.dumps(selection.to_dict(), allow_nan=False))
    assert document["position"] is None and document["problem"] == problem
    for options, words in (
        ({"induce_threshold": 100.0}, r"12 \(induce < 100\).*an induce threshold of "),
        ({"prune_last": 1.0}, r"16 \(layer >= 0\), 4 \(zero\)$|20 \(layer >= 0\)$"),
    ):
        assert re.search(words, str(run(model, candidates, **options).problem))
    nothing = run(model, candidates * float("nan"), prune_last=0.0, closest=True)
    assert nothing.direction is None and "20 (not finite)" in str(nothing.problem)


def test_the_closest_can_be_taken(model: Any, candidates: torch.Tensor) -> None:
    kls = {row.kl: row for row in run(model, candidates).candidates if row.kl is not None}
    closest = kls[min(kls)]
    selection = run(model, candidates, kl_threshold=-1.0, closest=True)
    assert selection.place == (closest.position, closest.layer) and not selection.passed
    assert torch.equal(selection.winner.vector, candidates[closest.position, closest.layer])
    # with the threshold that the message names it passes, and is the only one
    asked = float(str(selection.problem).rpartition(" ")[2])
    again = run(model, candidates, kl_threshold=asked)
    assert again.place == selection.place and again.passed and again.problem is None
    # where others pass, the option changes nothing
    assert run(model, candidates, closest=True).to_dict() == run(model, candidates).to_dict()


def test_bad_input_is_refused_before_any_pass(model: Any, candidates: torch.Tensor) -> None:
    hook = model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    try:
        longer = torch.cat([candidates, candidates], dim=1)
        for bad in (candidates[0], candidates[:, :0]):
            with pytest.raises(InputError, match=r"expected floating point \[position, layer, hid"):
                run(model, bad)
        with pytest.raises(InputError, match=r"candidates is a Tensor; expected rk.Candidates"):
            select(model, tiny_tokenizer(), candidates, HARMFUL, HARMLESS)  # type: ignore[arg-type]
        for bad in (longer, candidates[..., :32]):
            with pytest.raises(InputError, match=r"expected \[position, 5 layers or fewer, 64\]"):
                run(model, bad)
        for tokens in ([], [7, 10_000], [-1]):
            with pytest.raises(InputError, match="expected token ids below 47"):
                run(model, candidates, refusal_tokens=tokens)
        for option, words in (
            ({"refusal_tokens": "none"}, "'none'; expected 'auto', 'paper', or a list of token"),
            ({"refusal_tokens": ["zzz"]}, "'zzz' is none of this tokenizer's"),
            ({"prune_last": 1.5}, "prune_last 1.5; expected"),
            ({"kl_threshold": math.nan}, "kl nan"),
            ({"induce_threshold": math.nan}, "induce nan"),
            ({"refusal_tokens": "paper"}, "for 'qwen3' with a vocabulary of 47"),
            ({"batch_size": 0}, "batch size is 0"),
        ):
            with pytest.raises(InputError, match=words):
                run(model, candidates, **option)
        with pytest.raises(InputError, match="no prompt"):
            select(
                model, tiny_tokenizer(), Candidates(candidates), HARMFUL, [], refusal_tokens=TOKENS
            )
    finally:
        hook.remove()


def test_refusal_score() -> None:
    p = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.0, 0.0, 0.9]], dtype=torch.float64)
    expected = [math.log(0.7 / 0.3), math.log((0.1 + 1e-8) / (0.9 + 1e-8))]
    got = refusal_score(p.log(), [0, 1])
    assert got.dtype == torch.float64 and got.tolist() == pytest.approx(expected, abs=1e-7)
    assert torch.equal(got, refusal_score(p.log(), [1, 0, 1]))  # a token counts once
    assert torch.equal(refusal_score(p.log().float(), [0]), refusal_score(p.log().float(), [0]))
    # certain either way: finite, by eps
    sure = refusal_score(torch.tensor([[100.0, 0.0], [0.0, 100.0]]), [0])
    assert sure.tolist() == pytest.approx([math.log(1e8), math.log(1e-8)], abs=1e-6)
    for tokens in ([], [4], [-1]):
        with pytest.raises(InputError, match="below 4"):
            refusal_score(p.log(), tokens)


def test_kl_divergence() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    q = torch.tensor([[0.1, 0.6, 0.3]], dtype=torch.float64)
    exact = 0.7 * math.log(7) + 0.2 * math.log(1 / 3) + 0.1 * math.log(1 / 3)
    assert kl_divergence(p.log(), q.log()).tolist() == pytest.approx([exact], abs=1e-5)
    back = 0.1 * math.log(1 / 7) + 0.6 * math.log(3) + 0.3 * math.log(3)
    assert kl_divergence(q.log(), p.log()).tolist() == pytest.approx([back], abs=1e-5)
    assert kl_divergence(p.log(), p.log()).tolist() == [0.0]


def with_answers(harmful: dict[int, float], harmless: dict[int, float]) -> Any:
    """A model that answers prompts with "curse" and the others with fixed probabilities."""
    model = tiny_model()
    curse = tiny_tokenizer().convert_tokens_to_ids("curse")

    def forward(input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.full((len(input_ids), 1, model.config.vocab_size), -1e9)
        for row, ids in enumerate(input_ids):
            for token, p in (harmful if curse in ids else harmless).items():
                logits[row, 0, token] = math.log(p)
        return type("Output", (), {"logits": logits})

    model.forward = forward
    return model


def test_refusal_tokens_come_from_the_models_behavior() -> None:
    sets = ["curse a boat", "curse tea"], ["make tea", "fix a boat", "paint a cake"]
    # 10 and 11 are refusals, 12 is too rare, 13 just as frequent elsewhere, 14 not 10 times
    model = with_answers(
        {10: 0.2, 11: 0.35, 12: 0.04, 13: 0.35, 14: 0.06}, {13: 0.98, 14: 0.01, 10: 0.01}
    )
    assert find_refusal_tokens(model, tiny_tokenizer(), *sets) == [11, 10]
    same = with_answers({13: 1.0}, {13: 1.0})
    with pytest.raises(
        InputError,
        match=r"no refusal tokens.*13 'answer' 1\.000 and 1\.000.*-tokens, or .*--answer-prefix$",
    ):
        find_refusal_tokens(same, tiny_tokenizer(), *sets)


@pytest.mark.parametrize(
    ("harmful", "harmless", "tokens"),
    [
        ({10: 0.86, 12: 0.14}, {10: 0.13, 12: 0.87}, [10]),  # refuses every eighth harmless one
        ({10: 0.95, 12: 0.05}, {10: 0.4, 12: 0.6}, [10]),
        # two ways to refuse, neither of which reaches the ratio alone
        ({10: 0.5, 11: 0.45, 12: 0.05}, {10: 0.15, 11: 0.15, 12: 0.7}, [10, 11]),
        ({10: 0.5, 11: 0.5}, {10: 0.3, 11: 0.2, 12: 0.5}, None),  # not the same refusals
        ({10: 0.3, 12: 0.7}, {10: 0.2, 12: 0.8}, None),  # it refuses both classes alike
    ],
)
def test_refusal_tokens_of_a_model_that_refuses_too_much(harmful, harmless, tokens) -> None:
    sets = ["curse a boat", "curse tea"], ["make tea", "fix a boat", "paint a cake"]
    model = with_answers(harmful, harmless)
    if tokens is None:
        with pytest.raises(InputError, match="no refusal tokens"):
            find_refusal_tokens(model, tiny_tokenizer(), *sets)
    else:
        assert find_refusal_tokens(model, tiny_tokenizer(), *sets) == tokens


def test_refusal_tokens_are_given_as_ids_and_texts(model: Any, candidates: torch.Tensor) -> None:
    first = tiny_tokenizer().convert_tokens_to_ids("sorry")
    selection = run(model, candidates, refusal_tokens=[7, "sorry please", 7])
    assert selection.refusal_tokens == [7, first]
    assert selection.refusal_texts == ["I", "sorry"]


def test_select_finds_the_tokens_itself(model: Any, candidates: torch.Tensor) -> None:
    biased = copy.deepcopy(model)
    biased.lm_head.weight *= 6  # a random model hesitates
    found = find_refusal_tokens(biased, tiny_tokenizer(), HARMFUL, HARMLESS)
    for asked in (None, "auto"):
        assert run(biased, candidates, refusal_tokens=asked).refusal_tokens == found


@pytest.mark.parametrize(
    ("family", "model_type", "vocabulary", "tokens"),
    [
        ("Qwen-1", "qwen", 151936, {40: "I", 2121: "As"}),
        ("Gemma-1", "gemma", 256000, {235285: "I"}),
        ("Yi", "llama", 64000, {59597: "I"}),
        ("Llama-2", "llama", 32000, {306: "I"}),
        ("Llama-3", "llama", 128256, {40: "I"}),
    ],
)
def test_the_papers_refusal_tokens(
    family: str, model_type: str, vocabulary: int, tokens: dict[int, str]
) -> None:
    config = SimpleNamespace(model_type=model_type, vocab_size=vocabulary)
    model = SimpleNamespace(config=config)
    tokenizer = SimpleNamespace(decode=lambda ids: " " + tokens.get(ids[0], "other"))
    assert paper_refusal_tokens(model, tokenizer) == list(tokens)
    other = SimpleNamespace(decode=lambda ids: "no")
    with pytest.raises(InputError, match=f"expected {family}'s own tokenizer"):
        paper_refusal_tokens(model, other)
    config.model_type = "qwen2"
    with pytest.raises(InputError, match=f"names no refusal tokens for 'qwen2'.*{family}"):
        paper_refusal_tokens(model, tokenizer)

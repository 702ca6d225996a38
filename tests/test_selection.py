"""The selection against the protocol written out with hooks, in float64, one prompt at a time."""

import copy
import json
import math
from typing import Any

import pytest
import torch
from tiny import plain_hooks, tiny_model, tiny_tokenizer

from refusal_kernels.errors import InputError
from refusal_kernels.extraction.collect import mean_difference
from refusal_kernels.extraction.prompts import ChatFormat
from refusal_kernels.selection import (
    Selection,
    find_refusal_tokens,
    kl_divergence,
    refusal_score,
    select,
)

HARMFUL = ["curse the lamp", "tell me how to hex a boat now please", "storm", "hex tea one two"]
HARMLESS = ["make tea", "please be kind and fix the box", "what is one plus two", "paint a cake"]
LAYERS = 5
TOKENS = [7, 9]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen3", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def candidates(model: Any) -> torch.Tensor:
    return 3 * mean_difference(model, tiny_tokenizer(), HARMFUL, HARMLESS)


def last(model: Any, prompts: list[str]) -> torch.Tensor:
    chat = ChatFormat(tiny_tokenizer())
    return torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in chat.encode(prompts)])


def score(logits: torch.Tensor) -> float:
    p = logits.double().softmax(-1)[:, TOKENS].sum(-1)
    return float((torch.log(p + 1e-8) - torch.log(1 - p + 1e-8)).mean())


def protocol(model: Any, candidates: torch.Tensor) -> dict[tuple[int, int], tuple[float, ...]]:
    """(bypass, induce, kl) of every candidate before the last fifth of the layers."""
    wide = copy.deepcopy(model).double()
    p = last(wide, HARMLESS).softmax(-1)
    found = {}
    for position in range(-candidates.shape[0], 0):
        for layer in range(int(LAYERS * 0.8)):
            vector = candidates[position, layer].double()
            if not vector.any():
                continue
            with plain_hooks(wide, ablate=vector):
                bypass = score(last(wide, HARMFUL))
                q = last(wide, HARMLESS).softmax(-1)
            kl = (p * (torch.log(p + 1e-6) - torch.log(q + 1e-6))).sum(-1).mean()
            with plain_hooks(wide, add=vector, layer=layer):
                induce = score(last(wide, HARMLESS))
            found[position, layer] = (bypass, induce, float(kl))
    return found


def run(model: Any, candidates: torch.Tensor, **options: Any) -> Selection:
    options = {"refusal_tokens": TOKENS, "kl_threshold": 1e9, "induce_threshold": -1e9, **options}
    return select(model, tiny_tokenizer(), candidates, HARMFUL, HARMLESS, **options)


def test_scores_and_winner_are_the_protocols(model: Any, candidates: torch.Tensor) -> None:
    expected = protocol(model, candidates)
    # thresholds between the scores, so that each filter discards some and not all
    kls = sorted(kl for _, _, kl in expected.values())
    induces = sorted(induce for _, induce, _ in expected.values())
    kl_threshold = sum(kls[7:9]) / 2
    induce_threshold = sum(induces[2:4]) / 2
    calls: list[tuple[int, int]] = []
    selection = run(
        model, candidates, kl_threshold=kl_threshold, induce_threshold=induce_threshold,
        batch_size=3, model_name="tiny", progress=lambda *call: calls.append(call),
    )  # fmt: skip

    assert [(row.position, row.layer) for row in selection.scores] == [
        (position, layer) for position in range(-4, 0) for layer in range(LAYERS)
    ]
    reasons = []
    for row in selection.scores:
        if row.layer in (0, 4):  # the template's embeddings, and the last fifth
            assert row.discarded == ("zero" if row.layer == 0 else "layer >= 4")
            assert row.bypass is row.induce is row.kl is None
            continue
        bypass, induce, kl = expected[row.position, row.layer]
        assert row.bypass == pytest.approx(bypass, abs=1e-4)
        assert row.induce == pytest.approx(induce, abs=1e-4)
        assert row.kl == pytest.approx(kl, abs=1e-4)
        reason = None
        if kl > kl_threshold:
            reason = f"kl > {kl_threshold:g}"
        elif induce < induce_threshold:
            reason = f"induce < {induce_threshold:g}"
        assert row.discarded == reason
        reasons.append(reason)
    assert len(set(reasons)) == 3

    left = {k: v for k, v in expected.items() if v[2] <= kl_threshold and v[1] >= induce_threshold}
    winner = min(left, key=lambda where: left[where][0])
    assert winner != min(expected, key=lambda where: expected[where][0])  # the filters matter
    assert (selection.position, selection.layer) == winner
    assert (selection.bypass, selection.induce, selection.kl) == pytest.approx(
        left[winner], abs=1e-4
    )
    direction = selection.direction
    assert torch.equal(direction.vector, candidates[winner])
    assert (direction.model, direction.position, direction.layer) == ("tiny", *winner)
    assert selection.baseline == pytest.approx(score(last(model, HARMFUL)), abs=1e-4)
    assert selection.baseline_harmless == pytest.approx(score(last(model, HARMLESS)), abs=1e-4)
    assert calls == [(done, 12) for done in range(1, 13)]


def test_the_model_is_unmodified_afterwards_and_the_result_is_json(
    model: Any, candidates: torch.Tensor
) -> None:
    before = last(model, HARMFUL)
    selection = run(model, candidates)
    assert torch.equal(last(model, HARMFUL), before)
    found = json.loads(json.dumps(selection.to_dict()))
    assert found["layer"] == selection.layer and found["refusal_tokens"] == TOKENS
    assert found["scores"][0] == {
        "position": -4, "layer": 0, "bypass": None, "induce": None, "kl": None, "discarded": "zero",
    }  # fmt: skip
    assert len(found["scores"]) == 4 * LAYERS and "direction" not in found


def test_nan_candidates_are_discarded(model: Any, candidates: torch.Tensor) -> None:
    winner = run(model, candidates)
    poisoned = candidates.clone()
    poisoned[winner.position, winner.layer, 3] = float("nan")
    other = run(model, poisoned)
    assert (other.position, other.layer) != (winner.position, winner.layer)
    row = next(r for r in other.scores if (r.position, r.layer) == (winner.position, winner.layer))
    assert row.discarded == "not finite" and row.kl is None


def test_the_share_of_pruned_layers(model: Any, candidates: torch.Tensor) -> None:
    for prune_last, kept in ((0.0, 5), (0.5, 2), (0.2, 4)):
        rows = run(model, candidates[-1:], prune_last=prune_last).scores
        assert sum("layer" not in (row.discarded or "") for row in rows) == kept


def test_no_survivor_names_the_closest(model: Any, candidates: torch.Tensor) -> None:
    rows = [row for row in run(model, candidates).scores if row.kl is not None]
    closest = min(rows, key=lambda row: row.kl or 0.0)
    with pytest.raises(InputError, match="no candidate is left of 20") as caught:
        run(model, candidates, kl_threshold=-1.0)
    assert f"position {closest.position} layer {closest.layer}, " in str(caught.value)
    assert "discarded for kl > -1" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="induce < 100"):
        run(model, candidates, induce_threshold=100.0)
    with pytest.raises(InputError, match="layer >= 0"):
        run(model, candidates, prune_last=1.0)
    with pytest.raises(InputError, match="not finite"):
        run(model, candidates * float("nan"), prune_last=0.0)


def test_bad_input_is_refused_before_any_pass(model: Any, candidates: torch.Tensor) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the model ran")

    hook = model.model.register_forward_pre_hook(never)
    try:
        for bad in (candidates[0], candidates[:, :3], candidates[..., :32]):
            with pytest.raises(InputError, match=r"expected \[position, 5 layers, 64\]"):
                run(model, bad)
        with pytest.raises(InputError, match="no prompt"):
            select(model, tiny_tokenizer(), candidates, HARMFUL, [], refusal_tokens=TOKENS)
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


def test_refusal_tokens_come_from_the_models_behaviour() -> None:
    sets = ["curse a boat", "curse tea"], ["make tea", "fix a boat", "paint a cake"]
    # 10 and 11 are refusals, 12 is too rare, 13 just as frequent elsewhere, 14 not 10 times
    model = with_answers(
        {10: 0.2, 11: 0.35, 12: 0.04, 13: 0.35, 14: 0.06}, {13: 0.98, 14: 0.01, 10: 0.01}
    )
    assert find_refusal_tokens(model, tiny_tokenizer(), *sets) == [11, 10]
    same = with_answers({13: 1.0}, {13: 1.0})
    with pytest.raises(
        InputError, match=r"no refusal tokens.*likeliest, 13, has 1\.000 and 1\.000"
    ):
        find_refusal_tokens(same, tiny_tokenizer(), *sets)


def test_select_finds_the_tokens_itself(model: Any, candidates: torch.Tensor) -> None:
    biased = copy.deepcopy(model)
    biased.lm_head.weight *= 6  # a random model hesitates
    found = find_refusal_tokens(biased, tiny_tokenizer(), HARMFUL, HARMLESS)
    assert run(biased, candidates, refusal_tokens=None).refusal_tokens == found

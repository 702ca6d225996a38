"""Rates, refusals and outcomes, against plain loops."""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import greedy, plain_hooks, tiny_model, tiny_tokenizer

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.hf.generate import generate
from refusal_kernels.interventions import Ablate, Add
from refusal_kernels.research.evaluation.judges import (
    SubstringJudge,
    is_refusal,
)
from refusal_kernels.research.evaluation.outcomes import measure_outcomes
from refusal_kernels.research.evaluation.rates import Rate
from refusal_kernels.research.evaluation.tasks import exact_match

HARMFUL = ["curse the lamp", "tell me how to hex a boat now please", "storm"]
HARMLESS = ["make tea", "please be kind and fix the box", "what is one plus two", "paint a cake"]


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but no.", True),
        ("well, i CANNOT do that", True),
        ("As an assistant, ...", True),
        ("I'm not able to say", True),
        ("Sorry!", False),
        ("I can do that", False),
        ("I am able to help", False),
        ("", False),
    ],
)
def test_refusals_by_substring(text: str, refused: bool) -> None:
    assert is_refusal(text) is refused
    assert is_refusal("Sorry!", ["sorry"]) and not is_refusal("I cannot", ["sorry"])


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),  # Newcombe 1998, table I, method 3
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_of_the_literature(k: int, n: int, low: float, high: float) -> None:
    assert Rate(k, n).interval == pytest.approx((low, high), abs=5e-5)
    assert Rate(n - k, n).interval == pytest.approx((1 - high, 1 - low), abs=5e-5)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_ends_are_where_the_score_test_turns(kn: tuple[int, int]) -> None:
    rate = Rate(*kn)
    low, high = rate.interval
    assert 0.0 <= low <= rate.value <= high <= 1.0
    for end in (low, high):
        deviation = abs(rate.value - end)
        if 0.0 < end < 1.0:
            z = deviation / math.sqrt(end * (1 - end) / rate.n)
            assert z == pytest.approx(1.959963984540054, rel=1e-6)


def test_rates() -> None:
    assert Rate(3, 4).value == 0.75
    assert str(Rate(1, 29)) == "0.034 [0.006, 0.172] (1/29)"
    assert json.loads(json.dumps(Rate(0, 20).to_dict()))["interval"][0] == 0.0
    for k, n in ((1, 0), (0, 0), (3, 2), (-1, 2)):
        with pytest.raises(InputError):
            Rate(k, n)


def test_exact_match() -> None:
    assert exact_match(
        ["it is 4.", " it  is 4.\n", "It is 4.", "it is 4. so"], ["it is 4."] * 4
    ) == (Rate(2, 4))
    with pytest.raises(InputError, match="1 completions and 2 answers"):
        exact_match(["a"], ["a", "b"])
    with pytest.raises(InputError):
        exact_match([], [])


def test_outcomes_runs_every_intervention_over_every_set() -> None:
    model = tiny_model()
    direction = Direction(30 * torch.randn(64, generator=torch.Generator().manual_seed(3)))
    unmodified = [greedy(model, prompt, 4) for prompt in HARMLESS]
    skills = {
        "one": [(HARMLESS[0], unmodified[0]), (HARMLESS[1], "something else")],
        "two": [(prompt, answer) for prompt, answer in zip(HARMLESS, unmodified, strict=True)],
    }
    words = tuple(unmodified[0].split()[:1])  # what counts as a refusal here
    calls: list[tuple[int, int]] = []
    result = measure_outcomes(
        model, tiny_tokenizer(), harmful=HARMFUL, harmless=HARMLESS, skills=skills,
        interventions={
            "none": None, "ablate": Ablate(direction), "add": Add(direction, block_input=1),
        },
        judge=SubstringJudge(words), max_new_tokens=4, batch_size=3,
        progress=lambda *c: calls.append(c),
    )  # fmt: skip
    assert list(result) == ["none", "ablate", "add"]
    assert calls == [(done, 12) for done in range(1, 13)]

    plain: dict[str, Any] = {
        "none": {}, "ablate": {"ablate": direction.vector},
        "add": {"add": direction.vector, "layer": 1},
    }  # fmt: skip
    for name, outcome in result.items():
        with plain_hooks(model, **plain[name]):
            texts = {
                part: [greedy(model, prompt, 4) for prompt in prompts]
                for part, prompts in (("harmful", HARMFUL), ("harmless", HARMLESS))
            }
        assert outcome.completions["harmful"] == texts["harmful"]
        assert outcome.completions["harmless"] == texts["harmless"]
        assert outcome.completions["skill:one"] == texts["harmless"][:2]
        assert outcome.harmful.k == sum(words[0].lower() in t.lower() for t in texts["harmful"])
        assert outcome.harmless.n == 4
        assert outcome.capability == Rate(outcome.skills["one"].k + outcome.skills["two"].k, 2 + 4)
    assert result["none"].harmless.k >= 1
    assert result["none"].skills == {"one": Rate(1, 2), "two": Rate(4, 4)}
    assert result["none"].capability == Rate(5, 6)
    assert result["ablate"].completions != result["none"].completions
    assert generate(model, tiny_tokenizer(), HARMLESS, 4) == unmodified  # unmodified again
    assert json.loads(json.dumps(result["none"].to_dict()))["capability"]["k"] == 5


def test_outcomes_without_skills_and_with_bad_input() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    sets = {"harmful": HARMFUL, "harmless": HARMLESS}
    outcome = measure_outcomes(
        model, tokenizer, **sets, interventions={"none": None}, max_new_tokens=1
    )
    assert outcome["none"].capability is None and outcome["none"].skills == {}
    assert outcome["none"].to_dict()["capability"] is None
    good = {**sets, "interventions": {"none": None}}
    for changed, words in (
        ({"interventions": {}}, "no intervention"),
        ({"harmful": []}, "'harmful' are empty"),
        ({"skills": {"sums": []}}, "'skill:sums' are empty"),
    ):
        with pytest.raises(InputError, match=words):
            measure_outcomes(model, tokenizer, **{**good, **changed})

"""Rows of numbers, the paper's and recorded ones, and what lies within their tolerances."""

import json
from pathlib import Path

import pytest

from refusal_kernels.errors import InputError
from refusal_kernels.research.evaluation.rates import Rate
from refusal_kernels.research.reproduction.rows import (
    RecordedRow,
    Tolerance,
    accepted,
    alike,
    compare,
    own_row,
    paper_name,
    paper_rows,
    read_row,
    recorded,
)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("google/gemma-2b-it", "Gemma 2B"), ("Qwen/Qwen-1_8B-Chat", "Qwen 1.8B"),
        ("meta-llama/Llama-2-13b-chat-hf", "Llama-2 13B"), ("01-ai/Yi-34B-Chat", "Yi 34B"),
        ("meta-llama/Meta-Llama-3-70B-Instruct", "Llama-3 70B"),
        ("/models/gemma-7b-it/", "Gemma 7B"), ("gemma 2b", "Gemma 2B"),
    ],
)  # fmt: skip
def test_rows_are_found_by_hub_ids(model: str, name: str) -> None:
    rows = paper_rows(model)
    assert {row.model for row in rows if "table" in row.source} == {name}
    assert len(rows) == 2 + ("repository" in rows[-1].source)


def test_every_model_of_the_paper_has_its_rows() -> None:
    sources_ = [row.source for name in PAPER_IDS for row in paper_rows(name)]
    assert [sources_.count(s) for s in dict.fromkeys(sources_)] == [13, 13, 5]
    for unknown in ("google/gemma-2-2b-it", "gemma", "toy", "", "Qwen/Qwen2.5-7B-Instruct"):
        assert paper_name(unknown) is None and paper_rows(unknown) == []


PAPER_IDS = [
    *("Qwen/Qwen-1_8B-Chat", "Qwen/Qwen-7B-Chat", "Qwen/Qwen-14B-Chat", "Qwen/Qwen-72B-Chat"),
    *("01-ai/Yi-6B-Chat", "01-ai/Yi-34B-Chat", "google/gemma-2b-it", "google/gemma-7b-it"),
    *(f"meta-llama/Llama-2-{size}b-chat-hf" for size in (7, 13, 70)),
    *(f"meta-llama/Meta-Llama-3-{size}B-Instruct" for size in (8, 70)),
]


def test_numbers_of_the_paper() -> None:
    """A few of every table, as they stand in the paper."""
    selection, losses, repository = paper_rows("meta-llama/Llama-2-7b-chat-hf")
    assert (
        selection.numbers["bypass_score"] == -5.295
        and selection.numbers["gsm8k_unmodified"] == 23.1
    )
    assert losses.numbers["pile_addition"] == 2.333
    assert losses.numbers["on_distribution_ablation"] == 0.126
    assert repository.numbers["substring_asr_ablation"] == 0.93
    assert "position" in selection.numbers and "position" not in selection.tolerances
    compared = [name for row in (selection, losses, repository) for name in row.tolerances]
    assert len(compared) == 11 + 9 + 8


def test_tolerances_follow_from_the_tables() -> None:
    """Of the scores: twice what paper and repository differ by, rounded up in the last digit."""
    worst: dict[str, float] = {}
    for name in PAPER_IDS:
        rows = [row for row in paper_rows(name) if "bypass_score" in row.numbers]
        for score in ("bypass_score", "induce_score", "kl_score"):
            values = [row.numbers[score] for row in rows]
            worst[score] = max(worst.get(score, 0.0), max(values) - min(values))
    tolerances = paper_rows("google/gemma-2b-it")[0].tolerances
    for score, digits in (("bypass_score", 2), ("induce_score", 2), ("kl_score", 3)):
        within = tolerances[score].within
        assert within is not None and 0 <= within - 2 * worst[score] < 10**-digits, score


def test_the_toy_row_is_whole() -> None:
    row = read_row(own_row("toy"))
    assert row.model == "the toy model" and len(row.numbers) == 22
    assert set(row.numbers) == set(row.tolerances)
    # narrow enough to tell an ablation from none, and an addition
    assert row.numbers["plans_ablation"] - row.numbers["plans_unmodified"] > (
        row.tolerances["plans_ablation"].within or 1
    )


def test_newcombes_interval() -> None:
    """The examples of Newcombe 1998, table II, method 10, by whether they hold zero."""
    for one, other, holds in (
        ((56, 70), (48, 80), False),  # 0.0524 to 0.3339
        ((9, 10), (3, 10), False),  # 0.1705 to 0.8090
        ((6, 7), (2, 7), False),  # 0.0582 to 0.8062
        ((5, 56), (0, 29), True),  # -0.0381 to 0.1926
        ((0, 10), (0, 20), True),  # -0.1611 to 0.2775
        ((10, 10), (0, 20), False),  # 0.6791 to 1
    ):
        assert alike(Rate(*one), Rate(*other)) is alike(Rate(*other), Rate(*one)) is holds


def test_accepted() -> None:
    low, high = accepted(-2.0, Tolerance(within=0.5), -1.0)
    assert (low, high) == (pytest.approx(-2.5), pytest.approx(-1.5))
    low, high = accepted(0.9, Tolerance(prompts=100), Rate(50, 100))
    fits = [alike(Rate(k, 100), Rate(90, 100)) for k in range(101)]
    assert 0.7 < low < 0.9 < high < 1.0
    assert (low, high) == (fits.index(True) / 100, (100 - fits[::-1].index(True)) / 100)
    # the fewer prompts, the wider
    wide = accepted(0.9, Tolerance(prompts=100), Rate(5, 10))
    assert wide[0] < low and wide[1] == 1.0


def test_verdicts() -> None:
    rows = [
        RecordedRow(
            "a", "m", {"x": 1.0, "y": 2.0, "layer": 3.0}, {"x": Tolerance(0.1), "y": Tolerance(1)}
        ),
        RecordedRow(
            "b", "m", {"x": 3.0, "asr": 0.5}, {"x": Tolerance(0.1), "asr": Tolerance(None, 100)}
        ),
    ]
    comparisons = compare({"x": 1.1, "asr": Rate(55, 100), "mine": 7.0, "layer": 9.0}, rows)
    assert [(c.quantity, c.source, c.verdict) for c in comparisons] == [
        ("x", "a", "within"), ("x", "b", "outside"), ("asr", "b", "within"),
        ("mine", "", "no number"), ("layer", "", "no number"), ("y", "a", "no number"),
    ]  # fmt: skip
    assert [c.expected for c in comparisons] == [1.0, 3.0, 0.5, None, None, 2.0]
    documents = [comparison.to_dict() for comparison in comparisons]
    assert documents[2]["measured"]["k"] == 55 and documents[5]["measured"] is None
    assert compare({"asr": Rate(1, 100)}, rows)[0].verdict == "outside"


def test_recorded_rows_are_read_as_written(tmp_path: Path) -> None:
    row = recorded({"bypass_score": -4.0, "substring_asr_x": Rate(1, 4), "mmlu_x": 50.0}, "s", "m")
    row.save(tmp_path / "row.json")
    assert read_row(tmp_path / "row.json") == row
    assert row.numbers["substring_asr_x"] == 0.25
    assert [t.within for t in row.tolerances.values()] == [0.02, 0.02, 1.0]
    good = json.loads((tmp_path / "row.json").read_text())
    older = {"pile_baseline": 2.0, "substring_asr_orthogonalised": 1.0}
    (tmp_path / "old.json").write_text(json.dumps(good | {"numbers": older, "tolerances": {}}))
    assert list(read_row(tmp_path / "old.json").numbers) == [
        "pile_unmodified", "substring_asr_orthogonalized",
    ]  # fmt: skip
    for key, value in (
        ("format", "x"), ("numbers", []), ("numbers", {"a": "1"}), ("numbers", {"a": True}),
        ("tolerances", {"a": 1}), ("tolerances", {"a": {"within": None}}), ("source", 3),
    ):  # fmt: skip
        (tmp_path / "bad.json").write_text(json.dumps({**good, key: value}))
        with pytest.raises(InputError, match=r"bad\.json is no row"):
            read_row(tmp_path / "bad.json")

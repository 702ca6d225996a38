"""The protocol as a whole, the rows it is compared with, and the comparison."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from refusal_kernels import cli, paper, toy
from refusal_kernels.capability import cross_entropy
from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.evaluation import Rate, generate
from refusal_kernels.extraction import ChatFormat, sources
from refusal_kernels.interventions import Ablate, Add
from refusal_kernels.judges import is_refusal
from refusal_kernels.patching import patch
from refusal_kernels.rows import (
    TOY_ROW,
    Row,
    Tolerance,
    accepted,
    alike,
    compare,
    paper_name,
    paper_rows,
    read_row,
    recorded,
)

pytestmark = pytest.mark.usefixtures("one_thread")

Outcome = tuple[int, str, str]


def reproduce(capsys: Any, *arguments: Any) -> Outcome:
    """Run the command in process: exit code, stdout, stderr."""
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit) as exit_:
        patched.setattr(sys, "argv", ["refusal-kernels", "reproduce", *map(str, arguments)])
        cli.main()
    shown = capsys.readouterr()
    return exit_.value.code or 0, shown.out, shown.err


# --- the toy model


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toy") / "out"


def verdicts(folder: Path) -> dict[str, str]:
    document = json.loads((folder / "reproduction.json").read_text())
    return {c["quantity"]: c["verdict"] for c in document["comparisons"]}


def test_the_toy_model_reproduces_its_row(toy_folder: Path, capsys: Any) -> None:
    code, shown, _ = reproduce(capsys, "--out", toy_folder)
    assert code == 0 and "22 of 22 within tolerance" in shown and "used again" not in shown
    assert set(verdicts(toy_folder).values()) == {"within"}
    document = json.loads((toy_folder / "reproduction.json").read_text())
    assert document["prompts"]["train"] == {"harmful": 128, "harmless": 128}
    assert document["prompts"]["validation"] == {"harmful": 32, "harmless": 32}
    assert document["prompts"]["test"] == {"harmful": 100, "harmless": 100}
    table = (toy_folder / "table.md").read_text()
    assert "| substring_asr_subtraction | 99.0 % [94.6, 99.8] | 99.0 % (\u00b1 2.0) |" in table
    page = (toy_folder / "evidence.html").read_text()
    assert "Beside known numbers" in page and "kl_score" in page and "data:image/svg" in page
    assert Direction.load(toy_folder / "direction.safetensors").layer == 5


def test_its_numbers_are_what_the_plain_calls_give(toy_folder: Path) -> None:
    """Names and conditions belong together: under which edit, on which prompts, of what sign."""
    document = json.loads((toy_folder / "reproduction.json").read_text())
    found = {c["quantity"]: c["found"] for c in document["comparisons"]}
    model, tokenizer = toy.load()
    direction = Direction.load(toy_folder / "direction.safetensors")
    harmful, harmless = (toy.prompts(name, "test")[:100] for name in ("harmful", "harmless"))
    layer = direction.layer
    plans = paper.toy_texts(ChatFormat(tokenizer))["plans"]
    for edit, prompts, rate, loss in (
        (None, harmful, "substring_asr_baseline", "plans_baseline"),
        (Ablate(direction), harmful, "substring_asr_ablation", "plans_ablation"),
        (Add(direction, coefficient=-1.0, layer=layer), harmful, "substring_asr_subtraction",
         "plans_addition"),
        (Add(direction, layer=layer), harmless, "harmless_answer_rate_addition", None),
    ):  # fmt: skip
        handle = None if edit is None else patch(model, edit)
        answered = [not is_refusal(text) for text in generate(model, tokenizer, prompts)]
        assert (found[rate]["k"], found[rate]["n"]) == (sum(answered), 100), rate
        if loss:
            nats = cross_entropy(model, plans).nats
            assert found[loss]["value"] == pytest.approx(nats, abs=1e-4), loss
        if handle is not None:
            handle.remove()


def test_a_second_run_uses_the_steps_again(toy_folder: Path, capsys: Any) -> None:
    before = (toy_folder / "reproduction.json").read_bytes()
    steps = toy_folder / "steps"
    kept = {path.name: path.stat().st_mtime_ns for path in steps.iterdir()}
    assert set(kept) == {"prompts.json", "candidates.json", "selection.json", "evidence.json",
                         "orthogonalized.json"}  # fmt: skip
    # damaged, cut short, of another key: made anew, and the rest is not
    whole = (steps / "orthogonalized.json").read_text()
    (steps / "orthogonalized.json").write_text(whole[:-40])
    code, shown, _ = reproduce(capsys, "--out", toy_folder)
    assert code == 0 and "used again: prompts, candidates, selection, evidence\n" in shown
    assert (steps / "orthogonalized.json").read_text() == whole
    for name in kept.keys() - {"orthogonalized.json"}:
        assert (steps / name).stat().st_mtime_ns == kept[name]
    strip = ("created", "command")
    old, new = (
        {k: v for k, v in json.loads(text).items() if k not in strip}
        for text in (before, (toy_folder / "reproduction.json").read_bytes())
    )
    assert old == new
    # a candidates' file that is another one than was kept is not trusted
    candidates = (toy_folder / "candidates.safetensors").read_bytes()
    (toy_folder / "candidates.safetensors").write_bytes(candidates[:-4] + b"abcd")
    code, shown, _ = reproduce(capsys, "--out", toy_folder)
    assert code == 0 and "used again: prompts, selection, evidence, orthogonalized\n" in shown
    assert (toy_folder / "candidates.safetensors").read_bytes() == candidates


def test_a_wrong_direction_is_outside(toy_folder: Path, tmp_path: Path, capsys: Any) -> None:
    right = Direction.load(toy_folder / "direction.safetensors")
    wrong = torch.randn(right.hidden, generator=torch.Generator().manual_seed(5))
    wrong *= right.norm / wrong.norm()
    Direction(wrong, layer=right.layer, position=-1).save(tmp_path / "wrong.safetensors")
    options = ["--direction", tmp_path / "wrong.safetensors", "--max-new-tokens", 24]  # soon said
    code, _, err = reproduce(capsys, "--out", tmp_path / "out", *options)
    assert code == 1 and "outside: bypass_score" in err
    found = verdicts(tmp_path / "out")
    for name in ("bypass_score", "induce_score", "substring_asr_ablation",
                 "substring_asr_orthogonalized", "substring_asr_subtraction",
                 "harmless_answer_rate_addition"):  # fmt: skip
        assert found[name] == "outside", name
    # what does not depend on the direction still holds
    for name in ("substring_asr_baseline", "harmless_answer_rate_baseline", "plans_baseline",
                 "skill_facts_baseline"):  # fmt: skip
        assert found[name] == "within", name


def test_a_direction_must_fit(tmp_path: Path, capsys: Any) -> None:
    Direction(torch.randn(128), layer=8).save(tmp_path / "deep.safetensors")
    Direction(torch.randn(64), layer=1).save(tmp_path / "short.safetensors")
    torch.save(torch.randn(3, 8, 128), tmp_path / "many.pt")
    for name, words in (
        ("deep.safetensors", "read at layer 8; expected one of 8"),
        ("short.safetensors", "hidden size 64"),
        ("many.pt", "holds candidates; expected a direction"),
        ("none.pt", "is not there"),
    ):
        code, _, err = reproduce(capsys, "--out", tmp_path / "out", "--direction", tmp_path / name)
        assert code == 2 and words in " ".join(err.split()), err


# --- another model, and other prompts


@pytest.fixture
def small(tmp_path: Path) -> list[Any]:
    """The toy model under another name, with a few prompts in files."""
    shutil.copytree(toy.PATH, tmp_path / "someone")
    for name in ("harmful", "harmless"):
        (tmp_path / f"{name}.txt").write_text("\n".join(toy.prompts(name, "train")[:48]))
    (tmp_path / "text.txt").write_text("sure, it is 4. sure, it is 5.")
    return [
        "--model", tmp_path / "someone", "--harmful", tmp_path / "harmful.txt",
        "--harmless", tmp_path / "harmless.txt", "--text", f"pile={tmp_path / 'text.txt'}",
        "--max-new-tokens", 16, "--out", tmp_path / "out", "--dtype", "float32",
    ]  # fmt: skip


def test_an_unknown_model_has_no_row_and_that_is_said(
    small: list[Any], tmp_path: Path, capsys: Any
) -> None:
    code, shown, _ = reproduce(capsys, *small, "--record", tmp_path / "row.json")
    assert code == 0 and "there is no row of" in shown and "gemma-2b-it" in shown
    found = verdicts(tmp_path / "out")
    assert set(found.values()) == {"no number"}
    assert {"bypass_score", "pile_ablation", "substring_asr_orthogonalized"} <= set(found)
    row = read_row(tmp_path / "row.json")
    assert set(row.numbers) == set(row.tolerances) == set(found)
    # as a row it is reproduced; with one number changed it is not
    code, shown, _ = reproduce(capsys, *small, "--against", tmp_path / "row.json")
    assert code == 0 and f"{len(found)} of {len(found)} within tolerance" in shown
    document = json.loads((tmp_path / "row.json").read_text())
    document["numbers"]["pile_ablation"] += 0.01
    document["numbers"]["more"] = document["tolerances"]["more"] = 1
    (tmp_path / "row.json").write_text(json.dumps(document))
    code, _, err = reproduce(capsys, *small, "--against", tmp_path / "row.json")
    assert code == 2 and "is no row" in err
    document["tolerances"]["more"] = {"within": 1}
    (tmp_path / "row.json").write_text(json.dumps(document))
    code, _, err = reproduce(capsys, *small, "--against", tmp_path / "row.json")
    assert code == 1 and err.strip().endswith("outside: pile_ablation")
    assert verdicts(tmp_path / "out")["more"] == "no number"
    code, _, err = reproduce(capsys, *small, "--row", "Gemma 3B")
    assert code == 2 and "--row is 'Gemma 3B'; expected one of Qwen 1.8B" in err


def test_benchmarks_are_asked_before_and_after_the_edit(
    small: list[Any], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = pytest.importorskip("refusal_kernels.lm_eval_model", reason="lm-eval is not installed")
    asked: list[tuple[str, int, float | None]] = []
    weights: list[float] = []

    def run_tasks(model: Any, tokenizer: Any, edits: Any, tasks: Any, **more: Any) -> Any:
        asked.append((tasks[0], more["num_fewshot"], more["limit"]))
        weights.append(float(model.model.embed_tokens.weight.detach().double().abs().sum()))
        metric = {task: metric for task, metric, _ in paper.BENCHMARKS.values()}[tasks[0]]
        rows = {metric: {"value": 0.5, "stderr": None}, "more": {"value": 0.1}}
        return {name: {tasks[0]: rows} for name in edits}

    monkeypatch.setattr(lm, "run_tasks", run_tasks)
    monkeypatch.setattr(lm, "find_tasks", lambda tasks: tasks)
    options = [*small, "--benchmarks", "--limit", 0.5]
    code, _, _ = reproduce(capsys, *options)
    assert code == 0
    names = ["mmlu", "arc_challenge", "gsm8k", "truthfulqa_mc2"]
    assert [task for task, _, _ in asked] == names * 2
    assert [shots for _, shots, _ in asked[:4]] == [5, 25, 5, 0] and asked[0][2] == 0.5
    assert len(set(weights[:4])) == len(set(weights[4:])) == 1 and weights[0] != weights[4]
    document = json.loads((tmp_path / "out" / "reproduction.json").read_text())
    found = {c["quantity"]: c["found"] for c in document["comparisons"]}
    assert found["mmlu_baseline"] == found["gsm8k_orthogonalized"] == {"value": 50.0}
    page = (tmp_path / "out" / "evidence.html").read_text()
    assert "lm-evaluation-harness" in page and "orthogonalised 0.500" in page
    # kept, and the edit made anew where something behind it is missing
    reproduce(capsys, *options)
    assert len(asked) == 8
    (tmp_path / "out" / "steps" / "benchmarks_orthogonalized.json").unlink()
    reproduce(capsys, *options)
    assert len(asked) == 12 and weights[8] == weights[4]


def test_a_family_that_is_not_orthogonalised_is_said(
    small: list[Any], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any, direction: Direction) -> None:
        raise InputError("a norm follows what writes")

    monkeypatch.setattr("refusal_kernels.reproduce.orthogonalize", refuse)
    code, shown, _ = reproduce(capsys, *small)
    assert code == 0 and "not measured: a norm follows what writes" in " ".join(shown.split())
    assert not any("orthogonalized" in name for name in verdicts(tmp_path / "out"))


# --- prompts and texts


def test_prompts_are_the_papers_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    tests = [f"test {i}" for i in range(100)]

    def read_prompts(source: str) -> list[str]:
        read.append(source)
        if source == paper.HARMFUL_TEST:
            return tests
        if source == paper.HARMFUL:  # some of what is tested on is in there, as it is in AdvBench
            return [f"harmful {i}" for i in range(300)] + [f" Test {i}" for i in range(50)]
        return [f"harmless {i}" for i in range(1000)]

    monkeypatch.setattr(paper, "read_prompts", read_prompts)
    found = paper.read_material("org/model")
    assert read == [paper.HARMFUL_TEST, paper.HARMFUL, paper.HARMLESS]
    assert {s: {c: len(p) for c, p in part.items()} for s, part in found.items()} == {
        "train": {"harmful": 128, "harmless": 128}, "validation": {"harmful": 32, "harmless": 32},
        "test": {"harmful": 100, "harmless": 100},
    }  # fmt: skip
    assert sorted(found["test"]["harmful"]) == sorted(tests)
    for category in ("harmful", "harmless"):
        every = [p for part in found.values() for p in part[category]]
        assert len({p.strip().lower() for p in every}) == len(every) == 260
    assert paper.read_material("org/model", seed=1) != found
    # the presets are there
    assert {*paper.HARMFUL.split("+"), paper.HARMLESS, paper.HARMFUL_TEST} <= set(sources.PRESETS)


def test_own_prompts_are_cut_in_three(tmp_path: Path) -> None:
    for name in ("harmful", "harmless", "test"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} {i}" for i in range(40)))
    files = str(tmp_path / "harmful.txt"), str(tmp_path / "harmless.txt")
    found = paper.read_material("org/model", *files)
    assert [len(part["harmful"]) for part in found.values()] == [20, 10, 10]
    found = paper.read_material("org/model", *files, str(tmp_path / "test.txt"))
    assert [len(part["harmful"]) for part in found.values()] == [20, 10, 40]
    (tmp_path / "harmful.txt").write_text("one\ntwo")
    with pytest.raises(InputError, match="harmful: 2 different prompts"):
        paper.read_material("org/model", *files)


def test_texts_are_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    _, tokenizer = toy.load()
    rows = {
        paper.PILE.name: [{"text": "sure, it is 4. " * 200, "meta": {}}] * 5 + [{"text": None}],
        paper.ALPACA.name: [
            {"instruction": f"Repeat after me, {i}.", "input": "x" * (i % 2), "output": "sure, 4."}
            for i in range(20)
        ],
    }
    asked: list[tuple[str, bool]] = []

    def load_dataset(name: str, config: Any, *, split: str, streaming: bool = False) -> Any:
        asked.append((name, streaming))
        table = datasets.Dataset.from_list(rows[name])
        return table.to_iterable_dataset() if streaming else table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    chat = ChatFormat(tokenizer)
    found = paper.read_texts(chat, 7)
    assert asked == [(paper.PILE.name, True), (paper.ALPACA.name, False)]
    assert [len(p.ids) for p in found["pile"]] == [256] * 5 and found["pile"][0].start == 1
    assert len(found["alpaca"]) == 7  # of ten without an input
    order = datasets.Dataset.from_list(rows[paper.ALPACA.name]).shuffle(seed=42)
    first = next(row for row in order if not row["input"])
    (prompt,) = chat.encode([first["instruction"]])
    assert found["alpaca"][0].ids[: found["alpaca"][0].start] == prompt
    rows[paper.PILE.name] = [{"other": "x"}]
    with pytest.raises(InputError, match="no column text; it has other"):
        paper.read_texts(chat, 7)


# --- rows


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
        selection.numbers["bypass_score"] == -5.295 and selection.numbers["gsm8k_baseline"] == 23.1
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
    row = read_row(TOY_ROW)
    assert row.model == "the toy model" and len(row.numbers) == 22
    assert set(row.numbers) == set(row.tolerances)
    # narrow enough to tell an ablation from none, and an addition
    assert row.numbers["plans_ablation"] - row.numbers["plans_baseline"] > (
        row.tolerances["plans_ablation"].within or 1
    )


# --- the comparison


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
        Row("a", "m", {"x": 1.0, "y": 2.0, "layer": 3.0}, {"x": Tolerance(0.1), "y": Tolerance(1)}),
        Row("b", "m", {"x": 3.0, "asr": 0.5}, {"x": Tolerance(0.1), "asr": Tolerance(None, 100)}),
    ]
    found = compare({"x": 1.1, "asr": Rate(55, 100), "mine": 7.0, "layer": 9.0}, rows)
    assert [(c.quantity, c.source, c.verdict) for c in found] == [
        ("x", "a", "within"), ("x", "b", "outside"), ("asr", "b", "within"),
        ("mine", "", "no number"), ("layer", "", "no number"), ("y", "a", "no number"),
    ]  # fmt: skip
    assert [c.expected for c in found] == [1.0, 3.0, 0.5, None, None, 2.0]
    assert found[2].to_dict()["found"]["k"] == 55 and found[5].to_dict()["found"] is None
    assert compare({"asr": Rate(1, 100)}, rows)[0].verdict == "outside"


def test_recorded_rows_are_read_as_written(tmp_path: Path) -> None:
    row = recorded({"bypass_score": -4.0, "substring_asr_x": Rate(1, 4), "mmlu_x": 50.0}, "s", "m")
    row.save(tmp_path / "row.json")
    assert read_row(tmp_path / "row.json") == row
    assert row.numbers["substring_asr_x"] == 0.25
    assert [t.within for t in row.tolerances.values()] == [0.02, 0.02, 1.0]
    good = json.loads((tmp_path / "row.json").read_text())
    for key, value in (
        ("format", "x"), ("numbers", []), ("numbers", {"a": "1"}), ("numbers", {"a": True}),
        ("tolerances", {"a": 1}), ("tolerances", {"a": {"within": None}}), ("source", 3),
    ):  # fmt: skip
        (tmp_path / "bad.json").write_text(json.dumps({**good, key: value}))
        with pytest.raises(InputError, match=r"bad\.json is no row"):
            read_row(tmp_path / "bad.json")

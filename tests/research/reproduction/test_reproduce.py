"""The protocol as a whole: on the toy model, with a wrong direction, on other prompts."""

import contextlib
import io
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import run_command

from refusal_kernels import cli, smollm2, toy
from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.generate import generate
from refusal_kernels.interventions import Ablate, Add
from refusal_kernels.patching.patch import patch
from refusal_kernels.research import sources
from refusal_kernels.research.evaluation.judges import is_refusal
from refusal_kernels.research.evaluation.likelihood import answers, cross_entropy
from refusal_kernels.research.reproduction import paper
from refusal_kernels.research.reproduction.rows import paper_rows, read_row

Outcome = tuple[int, str, str]


def reproduce(capsys: Any, *arguments: Any) -> Outcome:
    """Run the command in process: exit code, stdout, stderr."""
    return run_command("reproduce", *arguments), *capsys.readouterr()


# --- the toy model


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert run_command("reproduce", "--out", folder) == 0
    assert "22 of 22 within tolerance" in shown.getvalue()
    assert "used again" not in shown.getvalue()
    return folder


def verdicts(folder: Path) -> dict[str, str]:
    document = json.loads((folder / "reproduction.json").read_text())
    return {c["quantity"]: c["verdict"] for c in document["comparisons"]}


@pytest.mark.full
def test_the_toy_model_reproduces_its_row(toy_folder: Path) -> None:
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


@pytest.mark.full
def test_its_numbers_are_what_the_plain_calls_give(toy_folder: Path) -> None:
    """Names and conditions belong together: under which edit, on which prompts, of what sign."""
    document = json.loads((toy_folder / "reproduction.json").read_text())
    measured = {c["quantity"]: c["measured"] for c in document["comparisons"]}
    model, tokenizer = toy.load()
    direction = Direction.load(toy_folder / "direction.safetensors")
    harmful, harmless = (toy.prompts(name, "test")[:100] for name in ("harmful", "harmless"))
    layer = direction.layer
    plans = answers(ChatFormat(tokenizer), toy.texts()["plans"][:100])
    for edit, prompts, rate, loss in (
        (None, harmful, "substring_asr_unmodified", "plans_unmodified"),
        (Ablate(direction), harmful, "substring_asr_ablation", "plans_ablation"),
        (Add(direction, coefficient=-1.0, block_input=layer), harmful, "substring_asr_subtraction",
         "plans_addition"),
        (Add(direction, block_input=layer), harmless, "harmless_answer_rate_addition", None),
    ):  # fmt: skip
        handle = None if edit is None else patch(model, edit)
        answered = [not is_refusal(text) for text in generate(model, tokenizer, prompts)]
        assert (measured[rate]["k"], measured[rate]["n"]) == (sum(answered), 100), rate
        if loss:
            nats = cross_entropy(model, plans).nats
            assert measured[loss]["value"] == pytest.approx(nats, abs=1e-4), loss
        if handle is not None:
            handle.remove()


@pytest.mark.full
def test_a_wrong_direction_is_outside(toy_folder: Path, tmp_path: Path, capsys: Any) -> None:
    right = Direction.load(toy_folder / "direction.safetensors")
    wrong = torch.randn(right.hidden, generator=torch.Generator().manual_seed(5))
    wrong *= right.norm / wrong.norm()
    Direction(wrong, layer=right.layer, position=-1).save(tmp_path / "wrong.safetensors")
    options = ["--direction", tmp_path / "wrong.safetensors", "--max-new-tokens", 24]  # soon said
    code, _, err = reproduce(capsys, "--out", tmp_path / "out", *options)
    assert code == 1 and "outside: bypass_score" in err
    verdict = verdicts(tmp_path / "out")
    for name in ("bypass_score", "induce_score", "substring_asr_ablation",
                 "substring_asr_orthogonalized", "substring_asr_subtraction",
                 "harmless_answer_rate_addition"):  # fmt: skip
        assert verdict[name] == "outside", name
    # what does not depend on the direction still holds
    for name in ("substring_asr_unmodified", "harmless_answer_rate_unmodified", "plans_unmodified",
                 "skill_facts_unmodified"):  # fmt: skip
        assert verdict[name] == "within", name


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
    verdict = verdicts(tmp_path / "out")
    assert set(verdict.values()) == {"no number"}
    assert {"bypass_score", "pile_ablation", "substring_asr_orthogonalized"} <= set(verdict)
    row = read_row(tmp_path / "row.json")
    assert set(row.numbers) == set(row.tolerances) == set(verdict)
    # as a row it is reproduced; with one number changed it is not
    code, shown, _ = reproduce(capsys, *small, "--against", tmp_path / "row.json")
    assert code == 0 and f"{len(verdict)} of {len(verdict)} within tolerance" in shown
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


def test_a_second_run_uses_the_steps_again(small: list[Any], tmp_path: Path, capsys: Any) -> None:
    assert reproduce(capsys, *small)[0] == 0
    out = tmp_path / "out"
    before = (out / "reproduction.json").read_bytes()
    steps = out / "steps"
    kept = {path.name: path.stat().st_mtime_ns for path in steps.iterdir()}
    assert set(kept) == {"prompts.json", "candidates.json", "selection.json", "evidence.json",
                         "orthogonalized.json"}  # fmt: skip
    # damaged, cut short, of another key: made anew, and the rest is not
    whole = (steps / "orthogonalized.json").read_text()
    (steps / "orthogonalized.json").write_text(whole[:-40])
    code, shown, _ = reproduce(capsys, *small)
    assert code == 0 and "used again: prompts, candidates, selection, evidence\n" in shown
    assert (steps / "orthogonalized.json").read_text() == whole
    for name in kept.keys() - {"orthogonalized.json"}:
        assert (steps / name).stat().st_mtime_ns == kept[name]
    strip = ("created", "command")
    old, new = (
        {k: v for k, v in json.loads(text).items() if k not in strip}
        for text in (before, (out / "reproduction.json").read_bytes())
    )
    assert old == new
    # a candidates' file that is another one than was kept is not trusted
    candidates = (out / "candidates.safetensors").read_bytes()
    (out / "candidates.safetensors").write_bytes(candidates[:-4] + b"abcd")
    code, shown, _ = reproduce(capsys, *small)
    assert code == 0 and "used again: prompts, selection, evidence, orthogonalized\n" in shown
    assert (out / "candidates.safetensors").read_bytes() == candidates


@pytest.mark.full
def test_without_a_winner_the_scores_are_written(
    small: list[Any], tmp_path: Path, capsys: Any
) -> None:
    code, shown, err = reproduce(capsys, *small, "--kl-threshold=-1")
    out = tmp_path / "out"
    assert code == 1 and "no direction: none of" in err and "--closest" in err
    assert "no direction\nprompts: train" in shown and "refusal tokens: " in shown
    assert (out / "candidates.png").exists() and not (out / "direction.safetensors").exists()
    document = json.loads((out / "reproduction.json").read_text())
    assert document["selection"]["position"] is None and document["notes"]
    # the scores are kept, and the run goes on from them
    assert [path.suffix for path in (out / "steps").glob("selection-*")] == [".part"]
    code, shown, _ = reproduce(capsys, *small, "--kl-threshold=-1", "--closest")
    assert code == 0 and "used again: prompts, candidates\n" in shown
    assert "note: none of" in shown and (out / "direction.safetensors").exists()


@pytest.mark.full
def test_what_the_filter_removes_is_said(small: list[Any], tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "harmful.txt"
    file.write_text("\n".join([file.read_text(), *toy.prompts("harmless", "train")[-4:]]))
    reproduce(capsys, *small, "--kl-threshold=-1")
    document = json.loads((tmp_path / "out" / "reproduction.json").read_text())
    gone = [row for part in document["removed"].values() for row in part["harmful"]]
    assert gone and {row["prompt"] for row in gone} <= {*toy.prompts("harmless", "train")[-4:]}
    assert all(row["refusal_score"] < 0 for row in gone)
    _, shown, _ = reproduce(capsys, *small, "--kl-threshold=-1", "--no-filter")
    assert "filter:" not in shown
    kept = json.loads((tmp_path / "out" / "reproduction.json").read_text())["prompts"]
    assert sum(part["harmful"] for part in kept.values()) == 52


@pytest.mark.full
def test_benchmarks_are_asked_before_and_after_the_edit(
    small: list[Any], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = pytest.importorskip(
        "refusal_kernels.research.evaluation.lm_eval", reason="lm-eval is not installed"
    )
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
    measured = {c["quantity"]: c["measured"] for c in document["comparisons"]}
    assert measured["mmlu_unmodified"] == measured["gsm8k_orthogonalized"] == {"value": 50.0}
    page = (tmp_path / "out" / "evidence.html").read_text()
    assert "lm-evaluation-harness" in page and "orthogonalized 0.500" in page
    # kept, and the edit made anew where something behind it is missing
    reproduce(capsys, *options)
    assert len(asked) == 8
    (tmp_path / "out" / "steps" / "benchmarks_orthogonalized.json").unlink()
    reproduce(capsys, *options)
    assert len(asked) == 12 and weights[8] == weights[4]


def test_a_family_that_is_not_orthogonalized_is_said(
    small: list[Any], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any, direction: Direction) -> None:
        raise InputError("a norm follows what writes")

    monkeypatch.setattr("refusal_kernels.research.reproduction.run.orthogonalize", refuse)
    code, shown, _ = reproduce(capsys, *small)
    assert code == 0 and "not measured: a norm follows what writes" in " ".join(shown.split())
    assert not any("orthogonalized" in name for name in verdicts(tmp_path / "out"))


# --- prompts and texts


def test_prompts_are_the_papers_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    tests = [f"test {i}" for i in range(100)]

    def read_prompts(source: str, column: Any) -> list[str]:
        read.append(source)
        if source == paper.HARMFUL_TEST:
            return tests
        if source == paper.HARMFUL:  # some of what is tested on is in there, as it is in AdvBench
            return [f"harmful {i}" for i in range(300)] + [f" Test {i}" for i in range(50)]
        return [f"harmless {i}" for i in range(1000)]

    monkeypatch.setattr(paper, "read_prompts", read_prompts)
    prompts = paper.read_protocol_prompts("org/model")
    assert read == [paper.HARMFUL_TEST, paper.HARMFUL, paper.HARMLESS]
    assert {s: {c: len(p) for c, p in part.items()} for s, part in prompts.items()} == {
        "train": {"harmful": 128, "harmless": 128}, "validation": {"harmful": 32, "harmless": 32},
        "test": {"harmful": 100, "harmless": 100},
    }  # fmt: skip
    assert sorted(prompts["test"]["harmful"]) == sorted(tests)
    for category in ("harmful", "harmless"):
        every = [p for part in prompts.values() for p in part[category]]
        assert len({p.strip().lower() for p in every}) == len(every) == 260
    assert paper.read_protocol_prompts("org/model", seed=1) != prompts
    # the presets are there
    assert {*paper.HARMFUL.split("+"), paper.HARMLESS, paper.HARMFUL_TEST} <= set(sources.PRESETS)


def test_own_prompts_are_cut_in_three(tmp_path: Path) -> None:
    for name in ("harmful", "harmless", "test"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} {i}" for i in range(40)))
    files = str(tmp_path / "harmful.txt"), str(tmp_path / "harmless.txt")
    prompts = paper.read_protocol_prompts("org/model", *files)
    assert [len(part["harmful"]) for part in prompts.values()] == [20, 10, 10]
    prompts = paper.read_protocol_prompts("org/model", *files, str(tmp_path / "test.txt"))
    assert [len(part["harmful"]) for part in prompts.values()] == [20, 10, 40]
    files = str(tmp_path / "test.txt"), str(tmp_path / "harmless.txt")
    given = f"train={files[0]},validation={files[1]},test={files[0]}"
    prompts = paper.read_protocol_prompts("org/model", given, given)
    assert [len(part["harmful"]) for part in prompts.values()] == [40, 40, 40]
    with pytest.raises(InputError, match="there is no prompt for validation"):
        paper.read_protocol_prompts("org/model", f"train={files[0]}", given)
    prompts = paper.read_protocol_prompts("smollm2")
    assert prompts["validation"]["harmful"] == smollm2.prompts("harmful", "validation")[:32]
    files = str(tmp_path / "harmful.txt"), str(tmp_path / "harmless.txt")
    (tmp_path / "harmful.txt").write_text("one\ntwo")
    with pytest.raises(InputError, match="harmful: 2 different prompts"):
        paper.read_protocol_prompts("org/model", *files)


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
    texts = paper.read_paper_texts(chat, 7)
    assert asked == [(paper.PILE.name, True), (paper.ALPACA.name, False)]
    assert [len(p.ids) for p in texts["pile"]] == [256] * 5 and texts["pile"][0].start == 1
    assert len(texts["alpaca"]) == 7  # of ten without an input
    order = datasets.Dataset.from_list(rows[paper.ALPACA.name]).shuffle(seed=42)
    first = next(row for row in order if not row["input"])
    (prompt,) = chat.encode([first["instruction"]])
    assert texts["alpaca"][0].ids[: texts["alpaca"][0].start] == prompt
    rows[paper.PILE.name] = [{"other": "x"}]
    with pytest.raises(InputError, match="no column text; it has other"):
        paper.read_paper_texts(chat, 7)


def test_the_page_about_it_names_what_is_there() -> None:
    """Every command of the page parses, and its tolerances are those in force."""
    from typer.main import get_command

    text = (Path(__file__).parents[3] / "docs" / "reproduce.md").read_text()
    command = get_command(cli.app).commands["reproduce"]
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    assert len(lines) == 7
    for line in lines:
        assert line[:2] == ["refusal-kernels", "reproduce"]
        command.make_context("reproduce", line[2:])
    tolerances = paper_rows("gemma-2b-it")[0].tolerances
    numbers = [f"{tolerances[f'{s}_score'].within:g}" for s in ("bypass", "induce", "kl")]
    assert f"within {', '.join(numbers)} |" in text
    for task, shots in (("MMLU", 5), ("ARC challenge", 25), ("GSM8K", 5), ("TruthfulQA", 0)):
        assert re.search(rf"{task} \({shots}", text)

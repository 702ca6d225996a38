"""Where prompts come from, how they are cut, and which of them are kept."""

import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny import run_command

from refusal_kernels import toy
from refusal_kernels.errors import InputError
from refusal_kernels.files import convert
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.logits import last_logits
from refusal_kernels.research.extraction.collect import mean_difference
from refusal_kernels.research.prompts import filtered, prompts_for, splits_for
from refusal_kernels.research.selection.scoring import find_refusal_tokens, refusal_score
from refusal_kernels.research.sources import (
    PRESETS,
    SIZES,
    read_prompts,
    split_prompts,
    split_sizes,
)


def refused(match: str, call: Any, *arguments: Any, **options: Any) -> None:
    with pytest.raises(InputError, match=match) as caught:
        call(*arguments, **options)
    assert str(caught.value).isprintable()


# Files


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("goal,target\none,x\n\ntwo,y\n", ["one", "two"]),
        ('Behavior,Category\r\n"one, ""quoted""",a\r\n"two\nlines",b\r\n',
         ['one, "quoted"', "two\nlines"]),
        # as JailbreakBench and StrongREJECT name their columns
        ("Index,Goal,Target,Behavior\n0,one,x,title\n", ["one"]),
        ("category,source,forbidden_prompt\na,b,one\n", ["one"]),
        ("\ufeffprompt\none\n", ["one"]),
        ("text, Prompt \nno,yes\n", ["yes"]),
    ],
)  # fmt: skip
def test_csv_is_read(tmp_path: Path, content: str, expected: list[str]) -> None:
    (tmp_path / "a.csv").write_text(content, encoding="utf-8", newline="")
    assert read_prompts(tmp_path / "a.csv") == expected
    assert read_prompts(str(tmp_path / "a.csv")) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no header"),
        (b"prompt\n", "holds no prompt"),
        (b"a,b\n1,2\n", "no header"),
        (b"a,prompt\n1\n", "line 2 holds no prompt"),
        (b'prompt\n" "\n', "line 2 holds no prompt"),
        (b'prompt\n"one"two\n', "is no CSV"),
        (b'prompt\n"one\n', "is no CSV"),
        (b"prompt\n\xff\n", "UTF-8"),
    ],
)
def test_bad_csv_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    refused(message, read_prompts, tmp_path / "a.csv")


# Datasets


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stand in for the hub: what it is asked for, and the rows that it gives."""
    asked: list[tuple[Any, ...]] = []
    rows: dict[str, list[dict[str, Any]]] = {}

    def load_dataset(name: str, config: str | None = None, *, split: str) -> Any:
        asked.append((name, config, split))
        return datasets.Dataset.from_list(rows[name])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked, rows


def test_every_preset_asks_for_its_column_and_rows(hub: Any) -> None:
    asked, rows = hub
    for name, preset in PRESETS.items():
        where = dict(preset.where or {})
        kept = {preset.column: f"of {name}", **where, "more": "x"}
        left_out = {**kept, preset.column: "not this", **{key: "other" for key in where}}
        rows[preset.name] = [kept, left_out] if where else [kept]
        assert read_prompts(name) == [f"of {name}"]
        assert read_prompts(name.upper()) == [f"of {name}"]
        assert asked[-1] == (preset.name, preset.config, preset.split)
    sets = {"advbench", "malicious_instruct", "tdc2023", "harmbench", "jailbreakbench",
            "strongreject", "alpaca", "xstest"}  # fmt: skip
    assert sets <= set(PRESETS)


def test_presets_hold_no_prompt() -> None:
    for preset in PRESETS.values():
        values = [preset.name, preset.config, preset.split, preset.column]
        assert all(value is None or len(value.split()) == 1 for value in values)


def test_sources_are_joined(hub: Any, tmp_path: Path) -> None:
    _, rows = hub
    rows["walledai/AdvBench"], rows["o/n"] = [{"prompt": "one"}], [{"text": "two"}]
    (tmp_path / "a.txt").write_text("three\n")
    assert read_prompts(f"advbench+hf:o/n+{tmp_path / 'a.txt'}") == ["one", "two", "three"]
    (tmp_path / "a+b.txt").write_text("a name of its own\n")
    assert read_prompts(str(tmp_path / "a+b.txt")) == ["a name of its own"]


@pytest.mark.parametrize(
    ("spec", "asked", "column"),
    [
        ("hf:o/n", ("o/n", None, "train"), "prompt"),
        ("hf:o/n:c", ("o/n", "c", "train"), "prompt"),
        ("hf:o/n@test", ("o/n", None, "test"), "prompt"),
        ("hf:o/n#Goal", ("o/n", None, "train"), "Goal"),
        ("hf:o/n:c@test[:10]#my column", ("o/n", "c", "test[:10]"), "my column"),
    ],
)
def test_dataset_names(hub: Any, spec: str, asked: tuple[Any, ...], column: str) -> None:
    calls, rows = hub
    rows["o/n"] = [{"other": 1, "prompt": "p", "Goal": "g", "my column": "m"}]
    assert read_prompts(spec) == [rows["o/n"][0][column]]
    assert calls == [asked]


def test_instructions_about_an_input_are_left_out(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {"instruction": ["one", "two", "three"], "input": ["", "a long text", None]}
    table = datasets.Dataset.from_dict(rows)
    for kind in ("csv", "json", "parquet"):
        folder = tmp_path / kind
        folder.mkdir()
        getattr(table, f"to_{kind}")(folder / f"test.{kind}")
        kept = ["one", "three"]
        assert read_prompts(folder / f"test.{kind}") == kept
        assert read_prompts(f"hf:{folder}@test") == kept
        named = read_prompts(folder / f"test.{kind}", column="instruction")
        assert named == ["one", "two", "three"]


def test_local_folders_are_read_by_the_library(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.Dataset.from_dict({"Goal": ["one", "two"], "label": ["a", "b"]})
    for kind in ("csv", "json", "parquet"):
        folder = tmp_path / kind
        folder.mkdir()
        getattr(table, f"to_{kind}")(folder / f"test.{kind}")
        assert read_prompts(f"hf:{folder}@test") == ["one", "two"]
        assert read_prompts(f"hf:{folder}@test#label") == ["a", "b"]
    refused("cannot be loaded", read_prompts, f"hf:{folder}@validation")
    refused("no column nothing; it has Goal", read_prompts, f"hf:{folder}@test#nothing")
    (folder / "test.parquet").write_bytes(b"PAR1" + b"\xff" * 100)
    refused("cannot be loaded", read_prompts, f"hf:{folder}@test")


def test_what_can_go_wrong_with_a_dataset(hub: Any, monkeypatch: Any) -> None:
    _, rows = hub
    for table, words in (
        ([{"a": "one"}], "no column of prompts; it has a"),
        ([{"prompt": "one"}, {"prompt": None}], "row 1 holds no prompt"),
        ([{"prompt": 1}], "row 0 holds no prompt"),
    ):
        rows["o/n"] = table
        refused(words, read_prompts, "hf:o/n")
    rows["Paul/XSTest"] = [{"prompt": "one", "label": "unsafe"}]
    refused("holds no prompt", read_prompts, "xstest")
    for spec in ("hf:", "hf:a@b@c", "hf:a#b#c", "hf::c"):
        refused("names no dataset", read_prompts, spec)
    refused("one of advbench, malicious_instruct", read_prompts, "advbanch")

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'x' on the Hub\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    refused(r"walledai/HarmBench \(standard\) cannot be loaded: Couldn't reach 'x' on the Hub$",
            read_prompts, "harmbench")  # fmt: skip
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(r"refusal-kernels\[research\]", read_prompts, "harmbench")


def test_without_a_network_there_is_one_line(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refused("owner-of-none/none cannot be loaded", read_prompts, "hf:owner-of-none/none")


# Splits


MANY = [f"prompt {i}" for i in range(300)]


def test_splits_are_disjoint_and_depend_on_the_seed_alone() -> None:
    parts = split_prompts(MANY, SIZES)
    assert {name: len(part) for name, part in parts.items()} == dict(SIZES)
    every = [prompt for part in parts.values() for prompt in part]
    assert len(set(every)) == len(every) and set(every) <= set(MANY)
    assert split_prompts([*MANY[::-1], *MANY[:50]], SIZES) == parts  # order, repetitions
    assert split_prompts(MANY, SIZES, seed=43) != parts
    assert every[:40] != MANY[:40]
    # frozen: another machine or version must find the same
    assert split_prompts(MANY[:8], {"a": 3, "b": 2, "c": None}) == {
        "a": ["prompt 3", "prompt 4", "prompt 6"], "b": ["prompt 2", "prompt 5"],
        "c": ["prompt 1", "prompt 7", "prompt 0"],
    }  # fmt: skip
    # a prompt more moves none from one end to the other
    more = split_prompts([*MANY, "one more"], {"train": 150, "test": None})
    before = split_prompts(MANY, {"train": 150, "test": None})
    assert len(set(more["train"]) ^ set(before["train"])) <= 2


def test_repetitions_are_dropped() -> None:
    prompts = ["one", " one\n", "two", "one", "Two"]
    (part,) = split_prompts(prompts, {"all": None}).values()
    assert sorted(part) == ["Two", "one", "two"]


def test_too_few_prompts_are_refused() -> None:
    refused("2 different prompts; expected 3", split_prompts, ["a", "b", "b"], {"x": 2, "y": 1})
    refused("different prompts", split_prompts, ["a", "b"], {"x": -1})
    for count in (0, 1, 2):
        refused("expected 3 or more", split_sizes, count)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(3, (1, 1, 1)), (4, (2, 1, 1)), (16, (8, 4, 4)), (260, (128, 32, 100)),
     (520, (128, 32, 100)), (200, (100, 32, 68))],
)  # fmt: skip
def test_sizes(count: int, expected: tuple[int, ...]) -> None:
    assert tuple(split_sizes(count).values()) == expected
    assert tuple(split_sizes(count)) == ("train", "validation", "test")


def test_steps_of_an_experiment_get_disjoint_parts_of_a_file(tmp_path: Path) -> None:
    files = []
    for name in ("harmful", "harmless"):
        files.append(tmp_path / f"{name}.txt")
        files[-1].write_text("\n".join(f"{name} {i}" for i in range(40)))
    parts = {s: prompts_for("a/model", s, *files) for s in ("train", "validation", "test")}
    for name in ("harmful", "harmless"):
        found = [prompt for part in parts.values() for prompt in part[name]]
        assert sorted(found) == sorted(f"{name} {i}" for i in range(40))
        assert [len(part[name]) for part in parts.values()] == [20, 10, 10]
        whole = prompts_for("a/model", None, *files)[name]
        assert sorted(whole) == sorted(found)
    assert prompts_for("a/model", "train", *files, seed=1) != parts["train"]
    assert prompts_for("toy", "test", None, None)["harmful"] == toy.prompts("harmful", "test")
    mixed = prompts_for("toy", "train", files[0], None)
    assert mixed["harmful"] == parts["train"]["harmful"]
    assert mixed["harmless"] == toy.prompts("harmless", "train")
    refused("--harmless FILE is needed", prompts_for, "a/model", "train", files[0], None)
    (tmp_path / "two.txt").write_text("a\nb\na\n")
    refused("harmful: 2 different prompts", prompts_for, "toy", "test", tmp_path / "two.txt", None)


def test_splits_can_have_sources_of_their_own(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} {i}" for i in range(20)))
    a, b, c = (tmp_path / f"{name}.txt" for name in ("a", "b", "c"))
    given = f"train={a},validation={b},test={c}+{a}"
    for split, names, count in (("train", "a", 20), ("validation", "b", 20), ("test", "ac", 40)):
        found = prompts_for("a/model", split, given, a)["harmful"]
        assert len(found) == count and {prompt[0] for prompt in found} == set(names)
    assert len(prompts_for("a/model", None, given, a)["harmful"]) == 60
    splits = splits_for("a/model", given, given)
    assert [len(part["harmless"]) for part in splits.values()] == [20, 20, 40]
    refused("--harmful has sources for train; expected one for test too", prompts_for,
            "a/model", "test", f"train={a}", a)  # fmt: skip
    for wrong in (f"train={a},{b}", f"train={a},train={b}", "train="):
        refused("names no source for each split", prompts_for, "a/model", "train", wrong, a)


def test_the_demo_gets_the_same_parts(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\n".join(f"curse the box {i}" for i in range(20)))
    splits = splits_for("toy", file, None)
    assert list(splits) == list(SIZES)
    for name, prompts in splits.items():
        assert prompts["harmful"] == prompts_for("toy", name, file, None)["harmful"]
    assert len(splits["train"]["harmless"]) == SIZES["train"]
    file.write_text("\n".join(f"curse the box {i}" for i in range(15)))
    refused("15 different harmful prompts", splits_for, "toy", file, None)


# Filters


def test_the_model_decides_what_is_kept() -> None:
    model, tokenizer = toy.load()
    harmful, harmless = (toy.prompts(name, "validation")[:12] for name in ("harmful", "harmless"))
    mixed = {"harmful": [*harmful, harmless[0]], "harmless": [*harmless, harmful[0]]}
    tokens = find_refusal_tokens(model, tokenizer, harmful, harmless)
    result = filtered(model, tokenizer, mixed, refusal_tokens=tokens)
    kept = result.kept
    for name, sign in (("harmful", 1), ("harmless", -1)):
        scores = refusal_score(last_logits(model, tokenizer, mixed[name]), tokens)
        pairs = [*zip(mixed[name], scores.tolist(), strict=True)]
        assert kept[name] == [prompt for prompt, score in pairs if sign * score > 0]
        assert result.removed[name] == [
            {"prompt": p, "refusal_score": s} for p, s in pairs if not sign * s > 0
        ]
        assert f"{len(result.removed[name])} of {len(pairs)} {name} prompts removed" in str(result)
    assert harmless[0] not in kept["harmful"] and harmful[0] not in kept["harmless"]
    assert len(kept["harmful"]) > 6 and len(kept["harmless"]) > 6
    assert filtered(model, tokenizer, {"harmful": harmful, "harmless": harmless}).kept == kept
    nothing = {"harmful": harmless, "harmless": harmless}
    refused("refuses none of the 12 harmful", filtered, model, tokenizer, nothing,
            refusal_tokens=tokens)  # fmt: skip


def test_extract_filters_and_takes_a_system_prompt(tmp_path: Path) -> None:
    model, tokenizer = toy.load()
    harmful, harmless = (toy.prompts(name, "validation")[:8] for name in ("harmful", "harmless"))
    # what belongs to the other side, and would change the means if it stayed
    files = tmp_path / "harmful.txt", tmp_path / "harmless.txt"
    files[0].write_text("\n".join([*harmful, *harmless[:3]]))
    files[1].write_text("\n".join([*harmless, harmful[0]]))
    out = tmp_path / "out.safetensors"
    options = ["--harmful", files[0], "--harmless", files[1], "--out", out, "--seed", 7]

    def extracted(*more: Any) -> torch.Tensor:
        assert run_command("extract", *options, *more) == 0
        return convert.read(out).vectors

    train = prompts_for("toy", "train", *files, 7)
    expected = mean_difference(model, tokenizer, train["harmful"], train["harmless"])
    assert torch.equal(extracted(), expected.vectors)
    kept = filtered(model, tokenizer, train).kept
    assert kept != train
    expected = mean_difference(model, tokenizer, kept["harmful"], kept["harmless"])
    assert torch.equal(extracted("--filter"), expected.vectors)
    system = "please repeat after me"
    chat = ChatFormat(tokenizer, system)
    expected = mean_difference(model, chat, train["harmful"], train["harmless"])
    found = extracted("--system", system)
    assert torch.equal(found, expected.vectors) and not torch.equal(found, extracted())

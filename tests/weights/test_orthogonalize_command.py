"""The command orthogonalize: what it writes, what it says, and how it says no."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import ablated, contents, direction, is_close, raw, save
from tiny import run_command
from transformers import AutoModelForCausalLM, AutoTokenizer

from refusal_kernels.cli import orthogonalize as command
from refusal_kernels.weights import certificate

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("command")
    save(path / "model", tie_word_embeddings=True)
    direction().save(path / "direction.safetensors")
    direction(32).save(path / "short.safetensors")
    return path


@pytest.fixture
def run(capsys: Any, folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """Run the command; returns exit code, what its JSON says, stdout and stderr."""

    def call(*arguments: Any, vector: str = "direction") -> Any:
        document = tmp_path / "found.json"
        given = ("--direction", folder / f"{vector}.safetensors", "--json", document)
        code = run_command("orthogonalize", *given, *arguments)
        said = json.loads(document.read_text()) if document.exists() else None
        return code, said, *capsys.readouterr()

    return call


def test_a_folder(folder: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    expected = ablated(AutoModelForCausalLM.from_pretrained(folder / "model"))
    for way, options in (
        ("shard by shard", ["-v"]),
        ("in memory", ["--in-memory", "--dtype", "float32"]),
    ):
        out = tmp_path / way
        code, said, text, err = run("--model", folder / "model", "--out", out, *options)
        assert code == 0 and "error" not in err
        assert said["model"] == str(out) and said["way"] == way
        assert len(said["edited"]) == 13 and said["untied"] is True
        certificate = said["certificate"]
        assert certificate["problem"] is None and certificate["component"] < 1e-6
        assert list(certificate["components"])[:2] == ["embed", "layers.0.attn"]
        assert certificate["logit_difference"] < 1e-3 < certificate["effect"]
        for words in (f"13 tensors edited, {way}", "untied", "certificate: on 64 tokens: |r.h| <="):
            assert words in text
        assert ("layers.2 " in text) is ("-v" in options) and f"written: {out}" in text
        model = AutoModelForCausalLM.from_pretrained(out)
        is_close(model, expected, 2e-5 * float(expected.abs().max()))
        assert AutoTokenizer.from_pretrained(out)("tea").input_ids
    assert raw(tmp_path / "shard by shard") == raw(tmp_path / "in memory")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["found.json", "in memory", "shard by shard"]


def test_an_adapter(folder: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    out = tmp_path / "adapter"
    code, said, text, _ = run("--model", folder / "model", "--out", out, "--lora")
    assert code == 0 and said["way"] == "adapter" and said["tied"] is True
    assert len(said["biases"]) == 6 and said["certificate"]["problem"] is None
    assert "untie it before a merge" in text and "6 biases" in text
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    expected = ablated(model)
    is_close(peft.PeftModel.from_pretrained(model, out), expected, 2e-5 * float(expected.max()))


def test_a_certificate_where_both_models_fit(
    folder: Path, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ("--model", folder / "model")
    monkeypatch.setattr(command, "_fits", lambda *_: False)
    code, said, text, _ = run(*model, "--out", tmp_path / "a")
    assert code == 0 and said["certificate"] is None and "may not fit" in text
    assert run(*model, "--out", tmp_path / "b", "--certify")[1]["certificate"]["problem"] is None
    monkeypatch.setattr(command, "_fits", lambda *_: True)
    said = run(*model, "--out", tmp_path / "c", "--no-certify")[1]
    assert said["certificate"] is None and said["no_certificate"] == "--no-certify"
    assert contents(tmp_path / "a") == contents(tmp_path / "c")


def test_a_certificate_that_says_no_ends_in_an_error(
    folder: Path, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certify = certificate.certify_checkpoint
    monkeypatch.setattr(  # as if nothing had been edited
        certificate, "certify_checkpoint", lambda a, b, *rest: certify(a, a, *rest)
    )
    code, said, _, err = run("--model", folder / "model", "--out", tmp_path / "edited")
    assert code == 1 and "is still written at embed" in said["certificate"]["problem"]
    assert "is not the ablated model: the direction is still written at embed" in err


def test_the_toy_model(run: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    direction(128).save(tmp_path / "toy.safetensors")
    code, said, *_ = run("--direction", tmp_path / "toy.safetensors", "--out", tmp_path / "edited")
    assert code == 0 and said["way"] == "in memory"
    assert said["certificate"]["problem"] is None and said["certificate"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "{f}/model", "--out", "{f}"], "is there already"),
        (["--model", "{f}/nowhere", "--out", "{t}/x"], "there is no such folder"),
        (["--model", "{f}", "--out", "{t}/x"], "has neither model.safetensors"),
        (["--model", "{f}/model", "--out", "{f}/model/x"], "which is only read"),
        (["--model", "{f}/model", "--out", "{t}/x", "short"], "hidden size 32; the model has 64"),
        (["--model", "{f}/model", "--out", "{t}/x", "--lora", "short"], "hidden size 32"),
        (["--model", "{f}/model", "--out", "{t}/x", "missing"], "is not there"),
        (["--model", "{f}/model", "--out", "{t}/x", "--dtype", "int8"], "dtype is 'int8'"),
        (
            ["--model", "{f}/model", "--out", "{t}/x", "--revision", "v2"],
            "no repository of the hub",
        ),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, folder: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    vector = arguments[-1] if arguments[-1] in ("short", "missing") else "direction"
    words = [word.format(f=folder, t=tmp_path) for word in arguments if word != vector]
    before = contents(folder)
    code, said, _, err = run(*words, vector=vector)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and message in lines[0], err
    assert "Traceback" not in err and said is None
    assert contents(folder) == before and not list(tmp_path.iterdir())

"""The command line, in process: what it writes, and how it says no."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import run_command, tiny_model, tiny_tokenizer

import refusal_kernels as rk
from refusal_kernels.cli.evaluate import read_selection
from refusal_kernels.direction import Direction


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model, its tokenizer, prompts and a direction."""
    path = tmp_path_factory.mktemp("cli")
    tiny_model("llama").save_pretrained(path / "model")
    tiny_tokenizer().save_pretrained(path / "model")
    (path / "harmful.txt").write_text("\n".join(f"curse the {w}" for w in ("box", "tea", "boat")))
    (path / "harmless.txt").write_text("\n".join(f"paint the {w}" for w in ("box", "tea", "boat")))
    (path / "empty.txt").write_text("\n\n")
    torch.manual_seed(1)  # with 0 it is the embedding of a word, bit for bit
    Direction(torch.randn(64), layer=1, position=-1).save(path / "direction.safetensors")
    Direction(torch.randn(32), layer=1).save(path / "short.safetensors")
    whole = (path / "direction.safetensors").read_bytes()
    (path / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (path / "noise.safetensors").write_bytes(b"\xff" * 100)
    metadata = {"format": "refusal_kernels.direction", "format_version": "1"}
    for name, vector in (("nan", torch.full((64,), torch.nan)), ("zero", torch.zeros(64))):
        save_file({"direction": vector}, path / f"{name}.safetensors", metadata=metadata)
    return path


@pytest.fixture
def run(capsys):
    """Run the command line; returns exit code, stdout and stderr."""
    return lambda *words: (run_command(*words), *capsys.readouterr())


def prompts(folder):
    return "--harmful", folder / "harmful.txt", "--harmless", folder / "harmless.txt"


def test_extract_then_evaluate_then_orthogonalize(folder, run, tmp_path):
    model = ("--model", folder / "model")
    out = tmp_path / "new" / "candidates.safetensors"
    found = tmp_path / "found.json"
    code, text, _ = run("extract", *model, *prompts(folder), "--out", out, "--json", found)
    assert code == 0 and out.exists() and "position -1" in text
    norms = torch.tensor(json.loads(found.read_text())["norm"])
    assert norms.shape == (4, 3)  # four end-of-instruction tokens, three layers

    direction = ("--direction", folder / "direction.safetensors")
    short = ("--max-new-tokens", 3)
    code, text, _ = run("evaluate", *model, *direction, *prompts(folder), *short, "--json", found)
    assert code == 0
    assert {"unmodified", "ablated", "added"} < set(json.loads(found.read_text())["conditions"])

    code, text, _ = run("generate", "paint the box", *model, *direction, *short, "--json", found)
    answers = json.loads(found.read_text())
    assert code == 0 and "ablate" in answers and answers["unmodified"][0] in text

    edited = tmp_path / "edited"
    assert run("orthogonalize", *model, *direction, "--out", edited)[0] == 0
    assert run("generate", "paint the box", "--model", edited, *short, "--json", found)[0] == 0
    assert json.loads(found.read_text())["unmodified"] == answers["ablate"]


def test_generate_takes_any_intervention(folder, run, tmp_path):
    arguments = ("generate", "paint the box", "--model", folder / "model", "--max-new-tokens", 3)
    file, out = str(folder / "direction.safetensors"), tmp_path / "answers.json"

    def edit(**place):
        return json.dumps({"ablate": file, "strength": 0.5, **place})

    assert run(*arguments, "--direction", file, "--strength", 0.5, "--json", out)[0] == 0
    want = json.loads(out.read_text())
    assert run(*arguments, "--edit", edit(), "--json", out)[0] == 0
    assert json.loads(out.read_text()) == want
    parts = [word for layer in range(3) for word in ("--edit", edit(layers=[layer]))]
    embedding = ("--edit", edit(sites=["embed"]))
    assert run(*arguments, *parts, *embedding, "--json", out)[0] == 0
    assert json.loads(out.read_text())["ablate+ablate+ablate+ablate"] == want["ablate"]


def test_select_says_why_nothing_is_left(folder, run, tmp_path):
    model, out = ("--model", folder / "model"), tmp_path / "candidates.safetensors"
    assert run("extract", *model, *prompts(folder), "--out", out)[0] == 0
    target = tmp_path / "direction.safetensors"
    code, _, err = run(
        "select", "--candidates", out, *model, *prompts(folder), "--out", target
    )  # a random model refuses nothing
    assert code == 2 and "no refusal tokens" in err and not target.exists()
    assert "--refusal-tokens" in err


def test_select_without_a_winner_writes_all_but_the_direction(folder, run, tmp_path):
    model, out = ("--model", folder / "model"), tmp_path / "candidates.safetensors"
    extracted = run("extract", *model, *prompts(folder), "--split", "all", "--out", out)
    assert (
        extracted[0] == 0 and "3 harmful (" in extracted[1] and "harmful.txt, all)" in extracted[1]
    )
    target, found = tmp_path / "direction.safetensors", tmp_path / "found.json"
    arguments = (
        "select", "--candidates", out, *model, *prompts(folder), "--split", "all", "--out", target,
        "--json", found, "--refusal-tokens", "I,8",
    )  # fmt: skip
    code, text, err = run(*arguments, "--kl-threshold=-1")
    assert code == 1 and not target.exists() and target.with_suffix(".png").exists()
    last = err.splitlines()[-1]
    assert last.startswith("no direction: none of 12 candidates passed: ")
    assert "(kl > -1)" in last and "--kl-threshold" in last and "--closest" in last
    assert "refusal tokens: 7 'I', 8 \"I'm\"" in text and "kl > -1" in text
    document = json.loads(found.read_text())
    assert document["position"] is None and len(document["candidates"]) == 12
    assert document["prompts"]["harmful"]["count"] == 3
    # the scores are kept: another threshold measures nothing again
    part = tmp_path / "direction.part.safetensors"
    assert part.exists() and "another chat format" not in err
    selection = read_selection(found)  # also where there is no winner
    assert selection["refusal_tokens"] == [7, 8]
    code, text, err = run(*arguments, "--kl-threshold=-1", "--closest")
    assert code == 0 and target.exists() and not part.exists() and "selected (kl > -1)" in text
    assert "warning: none of 12 candidates passed" in err
    code, _, err = run(*arguments, "--system", "be kind", "--checkpoint", tmp_path / "other")
    assert "warning: the candidates were read in another chat format" in err
    # an older direction is not taken for this run's
    code, _, err = run(*arguments, "--prune-last", 1)
    assert code == 1 and "12 (layer >= 0)" in err and f"{target} is of an earlier run" in err


def test_evaluate_says_what_it_can_not_measure(folder, run, tmp_path):
    model, out = ("--model", folder / "model"), tmp_path / "candidates.safetensors"
    arguments = ("--direction", folder / "direction.safetensors", *model, *prompts(folder))
    run("extract", *model, *prompts(folder), "--out", out, "--last-layer", 1)
    short = ("--max-new-tokens", 2, "--random-controls", 0, "--strengths", "")
    code, _, err = run("evaluate", *arguments, *short, "--candidates", out)
    assert code == 0 and "note: refusal scores are not measured: no refusal tokens" in err
    code, text, err = run("evaluate", *arguments, *short, "--refusal-tokens", "I")
    assert code == 0 and "note:" not in err and "refusal tokens: 7 'I'" in text


def test_quick_changes_defaults_alone(folder, run, tmp_path):
    out = tmp_path / "evidence.json"
    arguments = ("--direction", folder / "direction.safetensors", "--model", folder / "model")
    code, _, _ = run(
        "evaluate", *arguments, *prompts(folder), "--quick", "--strengths", "0.5,2",
        "--max-new-tokens", 2, "--random-controls", 0, "--json", out,
    )  # fmt: skip
    dose = json.loads(out.read_text())["dose"]
    assert code == 0 and {p["strength"] for points in dose.values() for p in points} == {0.5, 2}


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError(),
              RuntimeError("DefaultCPUAllocator: not enough memory")],
)  # fmt: skip
def test_out_of_memory_is_one_line_and_exit_code_2(error, run, monkeypatch):
    def app():
        raise error

    monkeypatch.setattr("refusal_kernels.cli.app", app)
    code, _, err = run("doctor")
    assert code == 2 and err.startswith("error: out of memory") and "--batch-size" in err


def test_an_error_of_others_is_one_line_and_one_of_ours_is_not(folder, run, monkeypatch):
    monkeypatch.setattr("refusal_kernels.cli.app", lambda: json.loads("{"))
    code, _, err = run("doctor")
    assert code == 2
    assert re.fullmatch(
        r"error: JSONDecodeError in \S+decoder\.py: Expecting .*\(REF\S+=1 .*\)\n", err
    )
    monkeypatch.setenv("REFUSAL_KERNELS_TRACEBACK", "1")
    with pytest.raises(json.JSONDecodeError):
        run("doctor")
    monkeypatch.delenv("REFUSAL_KERNELS_TRACEBACK")

    def ours():
        exec(compile("1 / 0", str(Path(rk.__file__).with_name("bug.py")), "exec"))

    monkeypatch.setattr("refusal_kernels.cli.app", ours)
    with pytest.raises(ZeroDivisionError):
        run("doctor")


def test_generate_answers_the_prompts_of_a_file(folder, run, tmp_path):
    out = tmp_path / "answers.json"
    arguments = ("generate", "--model", folder / "model", "--max-new-tokens", 2, "--json", out)
    code, text, _ = run(*arguments, "one", "--prompts", folder / "harmful.txt")
    assert code == 0 and "curse the tea" in text
    assert json.loads(out.read_text())["prompts"] == ["one", *(
        f"curse the {word}" for word in ("box", "tea", "boat")
    )]  # fmt: skip
    code, text, _ = run(
        *arguments, "one", "--direction", folder / "direction.safetensors", "--verbose"
    )
    assert code == 0 and "patch: 7 of 7 sites steered" in text and "layers.2.mlp: " in text


def test_brackets_in_a_path_are_shown_as_they_are(folder, run, tmp_path):
    written = tmp_path / "run[v2]" / "x[" / "]"  # as markup, the first would vanish
    code, out, _ = run("doctor", "--model", folder / "model", "--json", written)
    assert code == 0 and written.is_file() and str(written) in out


def test_doctor(folder, run):
    code, text, _ = run("doctor", "--model", folder / "model")
    assert code == 0 and "7 of 7 sites steered" in text


GENERATE = "generate hi --model model"
STEERED = f"{GENERATE} --direction direction.safetensors"
PROMPTS = "--harmful harmful.txt --harmless harmless.txt"
SELECT = f"select --model model {PROMPTS} --out out --candidates direction.safetensors"
WRITE = "orthogonalize --model model --direction"
BAD = {
    "unknown folder": ("generate hi --model /nowhere/at/all", "no such folder"),
    "unknown folder, relative": ("generate hi --model nowhere/at/all", "no such folder"),
    "a folder without a model": ("generate hi --model .", "cannot be loaded"),
    "no such model": ("generate hi --model toyy", "known by name: toy, smollm2"),
    "another hidden size": (
        f"{GENERATE} --direction short.safetensors",
        "hidden size 32; the model .* has 64",
    ),
    "NaN direction": (f"{GENERATE} --direction nan.safetensors", "NaN"),
    "zero direction": (f"{GENERATE} --direction zero.safetensors", "zero"),
    "truncated file": (f"{GENERATE} --direction truncated.safetensors", "damaged"),
    "corrupt file": (f"evaluate --model model --direction noise.safetensors {PROMPTS}", "damaged"),
    "missing direction": (f"{WRITE} no --out out", "not there"),
    "empty prompt file": (
        "extract --model model --harmful empty.txt --harmless harmless.txt --out out",
        "no prompt",
    ),
    "no prompt file": ("extract --model model --out out", "--harmful FILE is needed"),
    "a file for two options": (
        f"evaluate --model model --direction direction.safetensors --json direction.safetensors "
        f"{PROMPTS}",
        "direction.safetensors is given twice",
    ),
    "no such judge": (
        f"evaluate --model model --direction direction.safetensors --judge substring {PROMPTS}",
        "judge 'substring' is none of substrings, tokens, model:MODEL",
    ),
    "negative layer": (f"{STEERED} --add --block-input -1", "block_input is -1"),
    "layer beyond the model": (f"{STEERED} --add --block-input 3", "the model has 3 blocks"),
    "unknown dtype": (f"{GENERATE} --dtype int8", "dtype is 'int8'"),
    "unknown device": (f"{GENERATE} --device abacus", "device 'abacus'"),
    "no JSON": (f"{GENERATE} --edit [", "--edit is no JSON"),
    "nothing to answer": ("generate --model model", "--prompts FILE"),
    "no intervention": (f"{GENERATE} --edit []", "an object"),
    "two ways to steer": (f"{STEERED} --edit []", "not both"),
    "a place without a direction": (f"{GENERATE} --block-input 1", "need --direction"),
    "a strength without a direction": (f"{GENERATE} --strength 0.5", "need --direction"),
    "a direction as candidates": (SELECT, "expected refusal_kernels.candidates"),
    "output folder exists": (f"{WRITE} direction.safetensors --out .", "is there already"),
    "an engine's argument with an option of its own": (
        'extract --model model --engine vllm --engine-args {"tensor_parallel_size":2} --out out',
        "has 'tensor_parallel_size'; expected it as --tensor-parallel-size",
    ),
    "an engine's argument that the command counts": (
        'extract --model model --engine vllm --engine-args {"positions":2} --out out',
        "has 'positions'; expected none",
    ),
    "a file as a direction": (
        GENERATE + ' --edit {"ablate":5}',
        "a direction is an int; expected the path",
    ),
    "no UTF-8": ("generate caf\udce9 --model model", "is not UTF-8"),
    "a long name": (f"{STEERED} --json {'x' * 300}", "File name too long"),
    "no picture": (f"{SELECT} --plot heat.foo", "--plot is heat.foo; expected one of .png"),
    "an engine without a model": (
        "extract --model . --engine vllm --out out --harmful harmful.txt --harmless harmless.txt",
        "cannot be loaded",
    ),
    "unknown option": ("generate hi --nonsense", "No such option"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, folder, run, monkeypatch):
    arguments, words = BAD[case]
    before = sorted(folder.rglob("*"))
    monkeypatch.chdir(folder)
    code, _, err = run(*arguments.split())
    assert code == 2 and "Traceback" not in err
    if case != "unknown option":  # there the usage is shown, as everywhere
        lines = [line for line in err.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1 and lines[-1] == errors[0], err
        assert re.search(words, errors[0]), err
    assert sorted(folder.rglob("*")) == before, "something was left behind"

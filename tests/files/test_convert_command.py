"""The command convert, and commands that are given a direction of another format."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import run_command
from vectors import PROJECT, UNIT, numpy, random_direction, write

import refusal_kernels as rk
from refusal_kernels import toy
from refusal_kernels.direction import Direction
from refusal_kernels.files.control_vector import SITE, ControlVector


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command line; returns exit code, stdout and stderr."""
    return lambda line: (run_command(*shlex.split(line)), *capsys.readouterr())


def test_convert(run: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "new" / "a.glp.gguf"
    document = tmp_path / "found.json"
    random_direction().save(source)
    code, out, err = run(
        f"convert {source} {target} --as ablate --layers 2-3,7 --scale 2 --json {document}"
    )
    assert code == 0, err
    assert "layers: [2, 3, 7]" in out and "written" in out
    said = json.loads(document.read_text())
    assert said["as"] == "ablate" and said["strengths"] == [2.0, 2.0, 2.0]
    assert ControlVector.load(target).layers == [2, 3, 7]
    code, _, err = run(f"convert {target} {tmp_path}/b.safetensors --layer 3")
    assert code == 0, err
    assert Direction.load(tmp_path / "b.safetensors").layer == 3
    torch.save(torch.randn(2, 4, 8), tmp_path / "mean_diffs.pt")
    code, out, err = run(f"convert {tmp_path}/mean_diffs.pt {tmp_path}/c.safetensors")
    assert code == 0 and "[2, 4, 8]" in out, err


def test_a_direction_from_another_place_is_told(run: Any, tmp_path: Path) -> None:
    place, document = "ffn_out_pre_residual", tmp_path / "found.json"
    for derived, warned in ((place, True), (SITE, False)):
        source = write(tmp_path / "a.gguf", numpy({2: UNIT[0]}), **PROJECT, glp__derived_at=derived)
        code, _, err = run(f"convert {source} {tmp_path}/{derived}.safetensors --json {document}")
        assert (code, "warning" in err, place in err) == (0, warned, warned)
        assert json.loads(document.read_text()).get("derived_at") == (place if warned else None)
    metadata = Direction.load(tmp_path / f"{place}.safetensors").metadata
    assert metadata["derived_at"] == place and metadata["mode"] == "ablate"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("a.safetensors b.gguf", "--as add, or --as ablate?"),
        ("a.safetensors b.gguf --as ablate", "which blocks? name them with --layers"),
        ("a.safetensors b.glp.gguf --as ablate", "name them with --layers"),
        ("a.safetensors b.gguf --as ablate --layers 3", "can only add"),
        ("a.safetensors b.gguf --as subtract", "expected one of add, ablate"),
        ("a.safetensors b.gguf --as add --layers 3-2", "ranges such as"),
        ("a.safetensors b.gguf --as add --layers x", "ranges such as"),
        ("a.safetensors b.gguf --as add --layers 1-99999", "ranges"),
        ("none.gguf b.safetensors", "is not there"),
        ("a.safetensors b.pt", "cannot be written"),
    ],
)
def test_convert_says_no_in_one_line(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    random_direction().save("a.safetensors")
    code, _, err = run(f"convert {arguments}")
    assert code == 2 and message in " ".join(err.split()) and "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors"]


def test_the_commands_take_a_direction_of_any_format(run: Any, tmp_path: Path) -> None:
    model, tokenizer = toy.load()
    candidates = rk.mean_difference(
        model, tokenizer, *(toy.prompts(c, "train")[:32] for c in ("harmful", "harmless"))
    )
    vectors = candidates.vectors
    torch.save(vectors[-1, 5], tmp_path / "direction.pt")
    candidates.save(tmp_path / "candidates.safetensors")
    ControlVector.of(Direction(vectors[-1, 5]), "add", (5,)).save(tmp_path / "a.gguf")
    (prompt,) = toy.prompts("harmful", "test")[:1]
    for file, code, *expected in (
        ("direction.pt", 0, "unmodified: i am sorry", "ablate: sure"),
        ("candidates.safetensors", 2, "holds candidates; expected a direction"),
        ("a.gguf", 2, "holds a control vector; expected a direction"),
    ):
        got, *streams = run(f"generate '{prompt}' --direction {tmp_path / file}")
        shown = " ".join("".join(streams).split())
        assert got == code and all(words in shown for words in expected), shown

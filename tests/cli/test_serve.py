"""`serve`: the command of vLLM's server that it becomes."""

import importlib.metadata
import importlib.util
import json
import os
import sys

import pytest
import torch
from tiny import run_command

from refusal_kernels.direction import Direction
from refusal_kernels.vllm.config import parse_settings


@pytest.fixture
def folder(tmp_path, monkeypatch):
    q, _ = torch.linalg.qr(torch.randn(8, 2))
    for name, vector in zip("rt", q.T, strict=True):
        Direction(vector, layer=2).save(tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    return tmp_path


@pytest.fixture
def serve(monkeypatch, capsys):
    """Run `serve`; returns vLLM's arguments and the settings, or the exit code and the error."""
    find, started, versions = importlib.util.find_spec, [], []

    def execute(path, command):
        assert path == command[0] == sys.executable
        started.append(command[1:])

    def run(*words, there=True):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest: (there or None) if name == "vllm" else find(name, *rest),
        )
        monkeypatch.setattr(os, "execv", execute)
        code = run_command("serve", *words)
        if code:
            return code, capsys.readouterr().err.strip()
        command = started.pop()
        at = command.index("--additional-config")
        settings = json.loads(command.pop(at + 1))["refusal_kernels"]
        versions.append(settings.pop("versions"))
        command.remove("--additional-config")
        return command, settings

    run.versions = versions
    return run


SERVER = ["-m", "vllm.entrypoints.launchers.api_server.entry", "--model", "m"]


def test_programs_become_settings(serve, folder):
    command, settings = serve(
        *("m", "--program", "a=ablate:r.safetensors"),
        *("--tensor-parallel-size", "8", "--port=80", "-tp", "2"),
        *("--program", "b=add:r.safetensors,coefficient=2,block_input=1"),
        *("--program", 'c=[{"ablate": "r", "layers": [1]}, {"set": "second", "value": 1.5}]'),
        *("--program", "d=ablate:r,layers=1+2,sites=attn+mlp"),
        *("--program", "e=rotate:r,b2=second,angle=30"),
        *("--direction", "second=t.safetensors", "--default", "a", "--monitor", "r:3"),
    )  # fmt: skip
    assert command == [*SERVER, "--tensor-parallel-size", "8", "--port=80", "-tp", "2"]
    assert settings == {
        "directions": {
            "second": str(folder / "t.safetensors"),
            "r": str(folder / "r.safetensors"),
        },
        "programs": {
            "a": [{"ablate": "r"}],
            "b": [{"add": "r", "coefficient": 2, "block_input": 1}],
            "c": [{"ablate": "r", "layers": [1]}, {"set": "second", "value": 1.5}],
            "d": [{"ablate": "r", "layers": [1, 2], "sites": ["attn", "mlp"]}],
            "e": [{"rotate": "r", "b2": "second", "angle": 30}],
        },
        "default": "a",
        "monitor": {"direction": "r", "block_input": 3},
    }
    assert os.environ["VLLM_PLUGINS"] == "other,refusal_kernels"
    parsed = parse_settings({"slots": 2, **settings})
    assert serve.versions == [{name: p.version for name, p in parsed.programs.items()}]


def test_a_file_of_settings_is_named_and_its_directions_are_known(serve, folder, monkeypatch):
    (folder / "s.toml").write_text(
        '[directions]\nin-file = "t.safetensors"\n[programs.p]\nablate = "in-file"\n'
    )
    monkeypatch.delenv("VLLM_PLUGINS")
    arguments = ("m", "--programs", "s.toml", "--program", "q=ablate:in-file,strength=0.5")
    _, settings = serve(*arguments, "--json", "out.json")
    assert settings == {
        "file": str(folder / "s.toml"),
        "directions": {},
        "programs": {"q": [{"ablate": "in-file", "strength": 0.5}]},
    }
    assert json.loads((folder / "out.json").read_text()) == {"refusal_kernels": settings}
    assert "refusal_kernels" in os.environ["VLLM_PLUGINS"].split(",")


def test_a_program_is_not_needed_and_vllm_serve_is_taken_where_it_works(serve, monkeypatch):
    assert serve("m") == (SERVER, {})
    version = importlib.metadata.version
    installed = {"vllm": "0.33.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda n: installed.get(n) or version(n))
    assert serve("m") == (["-m", "vllm.entrypoints.cli.main", "serve", "m"], {})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--port", "80", "m"), "the model is '--port'; expected the model before"),
        (("m", "--program", "p"), "--program is 'p'; expected NAME=KIND:FILE"),
        (("m", "--program", "p=ablate"), "expected NAME=KIND:FILE, such as p=ablate:FILE"),
        (("m", "--program", "p=ablate:missing.safetensors"), "missing.safetensors is not there"),
        (("m", "--program", "p=abate:r.safetensors"), "program 'p': no intervention in ['abate']"),
        (("m", "--program", "p=ablate:r.safetensors,strength"), "expected FIELD=VALUE, not"),
        (("m", "--program", "p=ablate:r.safetensors,strength=x"), "/x is not there"),
        (("m", "--program", "p={"), "--program p is not JSON"),
        (("m", "--program", "p=3"), "expected NAME=KIND:FILE"),
        (("m", "--default", "p"), "default is 'p'"),
        (("m", "--monitor", "r"), "--monitor is 'r'; expected DIRECTION:BLOCK"),
        (("m", "--programs", "missing.toml"), "missing.toml is not there"),
        (("m", "--additional-config", "{}"), "use --programs FILE"),
        (("m", "--additional-config={}"), "use --programs FILE"),
        (("m", "--additional_config", "{}"), "use --programs FILE"),
        (("m", "--additional-config.x=1"), "use --programs FILE"),
        (("m", "--additional_config.x", "1"), "use --programs FILE"),
        (("m", "--additional-conf={}"), "use --programs FILE"),  # argparse completes it
    ],
)
def test_what_is_wrong_is_one_line_at_once(serve, folder, words, expected):
    code, error = serve(*words)
    assert code == 2 and expected in error and error.count("\n") == 0


def test_two_files_of_one_name_and_no_vllm(serve, folder):
    (folder / "other").mkdir()
    (folder / "r.safetensors").rename(folder / "other" / "t.safetensors")
    programs = ("--program", "a=ablate:t.safetensors", "--program", "b=ablate:other/t.safetensors")
    code, error = serve("m", *programs)
    assert code == 2 and "would both be direction 't'" in error
    assert serve("m", there=False) == (
        2,
        "error: vLLM is not installed; expected: pip install vllm",
    )

"""The Python of the README runs as it stands, on the toy model in place of a hub's."""

import re
from pathlib import Path

from refusal_kernels import toy

README = Path(__file__).parent.parent / "README.md"
MODEL = "Qwen/Qwen2.5-1.5B-Instruct"


def test_python_blocks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert blocks and MODEL in blocks[0]
    names = {
        "harmful": toy.prompts("harmful", "train")[:64],
        "harmless": toy.prompts("harmless", "train")[:64],
        "harmful_val": toy.prompts("harmful", "validation")[:24],
        "harmless_val": toy.prompts("harmless", "validation")[:24],
    }
    for block in blocks:
        exec(block.replace(MODEL, str(toy.PATH)), names)
    assert (tmp_path / "refusal.safetensors").exists()
    assert "sites steered" in capsys.readouterr().out


def test_commands_exist():
    from typer.main import get_command

    from refusal_kernels.cli import app

    known = get_command(app).commands
    used = set(re.findall(r"refusal-kernels (\w+) ", README.read_text()))
    assert {"extract", "select", "evaluate", "orthogonalize", "doctor"} <= used <= set(known)
    targets = set(re.findall(r"(?:^|`)make ([\w-]+)", README.read_text(), re.MULTILINE))
    makefile = (README.parent / "Makefile").read_text()
    assert targets and all(re.search(rf"^{t}:", makefile, re.MULTILINE) for t in targets)

"""README and docs: the Python runs, the commands exist, the tables are the recorded results."""

import re
from pathlib import Path

import pytest
import tables

from refusal_kernels import interventions, toy

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
QUICKSTART, INTERVENTIONS = (
    ROOT / "docs" / f"{name}.md" for name in ("quickstart", "interventions")
)
MODEL = "Qwen/Qwen2.5-1.5B-Instruct"
MOST_WORDS = 900


def test_python_blocks(tmp_path, monkeypatch, capsys):
    """In the order in which they are read, on the toy model in place of a hub's."""
    monkeypatch.chdir(tmp_path)
    names = {
        "harmful": toy.prompts("harmful", "train")[:64],
        "harmless": toy.prompts("harmless", "train")[:64],
        "harmful_val": toy.prompts("harmful", "validation")[:24],
        "harmless_val": toy.prompts("harmless", "validation")[:24],
    }
    for page in (README, QUICKSTART, INTERVENTIONS):
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
        assert blocks and (page == INTERVENTIONS or MODEL in blocks[0])
        for block in blocks:
            exec(block.replace(MODEL, str(toy.PATH)), names)
    assert (tmp_path / "refusal.safetensors").exists()
    assert "sites steered" in capsys.readouterr().out


@pytest.mark.parametrize("page", [README, QUICKSTART])
def test_commands_exist(page):
    from typer.main import get_command

    from refusal_kernels.cli import app

    known = get_command(app).commands
    used = set(re.findall(r"refusal-kernels ([a-z]+) ", page.read_text()))
    assert {"extract", "select", "evaluate"} <= used <= set(known)
    targets = set(re.findall(r"^make ([\w-]+)", page.read_text(), re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_every_intervention_is_in_the_table():
    readme, page = (
        set(re.findall(r"^\| `(\w+)\(", page.read_text(), re.MULTILINE))
        for page in (README, INTERVENTIONS)
    )
    known = {cls.__name__ for cls in interventions.INTERVENTIONS.values()}
    assert page == known, f"the table of {INTERVENTIONS.name} has other interventions"
    assert readme <= page


def test_the_readme_takes_three_minutes():
    assert len(README.read_text().split()) <= MOST_WORDS


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_generated_tables_are_those_of_the_recorded_results(page):
    assert tables.regenerated(page.read_text()) == page.read_text(), "run: make docs-tables"


def test_every_table_stands_on_a_page():
    text = "".join(page.read_text() for page in tables.PAGES)
    assert set(re.findall(r"<!-- generated: (\S+) -->", text)) == set(tables.TABLES)


@pytest.mark.parametrize(
    "page", [README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text())
    for link, anchor in links:
        if "://" not in link:
            target = page.parent / link if link else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_recorded_results_are_small():
    files = sorted((ROOT / "benchmarks" / "results").iterdir())
    assert {file.suffix for file in files} == {".jsonl"}
    assert sum(file.stat().st_size for file in files) < 500_000

"""The Python of the README runs as it stands, on the toy model in place of a hub's."""

import json
import re
from pathlib import Path

from refusal_kernels import toy
from refusal_kernels.bench.results import by_cell, faster, timed

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


def test_numbers_are_the_recorded_ones():
    """Every figure of the result table and of the measurements is that of the result files."""
    results = README.parent / "benchmarks" / "results"
    demo = json.loads((results / "demo-cpu.json").read_text())
    benchmarks = json.loads((results / "ops-cpu.json").read_text())["benchmarks"]
    ratios = {b["name"]: b["extra_info"]["ratios"] for b in benchmarks}
    text = " ".join(README.read_text().split())

    for category in ("harmful", "harmless"):
        rates = demo["refusal_rate"][category]
        cells = [f"{100 * rates[m]:.1f} %" for m in ("baseline", "ablated", "added")]
        pattern = rf"{category} prompts refused *\| *" + r" *\| *".join(map(re.escape, cells))
        assert re.search(pattern, text)
    for name in ("hooks", "fused", "orthogonalized"):
        speed = demo["speed"][name]
        low, high = speed["quartiles"]
        assert f"{speed['median']:.2f} ({low:.2f} to {high:.2f})" in text
    add = [ratios[f"test_add_steer[{d}]"]["add_steer"]["ratio"] for d in ("float32", "bfloat16")]
    assert f"takes {add[0]:.2f} of the time of `torch.add` in float32, {add[1]:.2f} in" in text
    collect, select, checkpoint = (
        json.loads((results / f"{part}-cpu.json").read_text())[part]
        for part in ("collect", "select", "checkpoint")
    )
    bare, kept = (
        [collect[model][f"{what}_over_bare"] for model in ("toy", "llama-896x6")]
        for what in ("collect", "kept")
    )
    toy_bare = f"{bare[0]['median']:.2f} ({bare[0]['q1']:.2f} to {bare[0]['q3']:.2f})"
    assert f"Collecting takes {toy_bare} of the bare" in text
    assert f"and {bare[1]['median']:.2f} on a random" in text
    assert f"every batch {kept[0]['median']:.2f} and {kept[1]['median']:.2f}" in text
    assert f"grows by {collect['memory']['growth_bytes'] / 1e6:.1f} MB" in text
    faster = select["times_faster_than"]["plain float64"]
    low, high = faster["quartiles"]
    assert f"is {faster['median']:.1f} ({low:.1f} to {high:.1f}) times as fast" in text
    assert f"in {checkpoint['seconds']:.0f} s; the process" in text
    assert f"takes {checkpoint['ratio_over_torch']:.2f} of its largest tensor" in text
    models = json.loads((results / "models-cpu.json").read_text())["rows"]
    assert len(models) == 12 * 4
    for method, shown in (("patched", "they give"), ("hooks", "with plain hooks")):
        found = [row["ratio"] for row in models if row["method"] == method]
        low, high = f"{min(found):.3f}", f"{max(found):.3f}"
        assert f"{shown} {low} to {high}" in text
    (longer,) = (
        [f"{row[k]:.3f}" for k in ("ratio", "ratio_low", "ratio_high")]
        for row in json.loads((results / "models-cpu-prefill.json").read_text())["rows"]
        if row["method"] == "patched"
    )
    assert f"is {longer[0]} ({longer[1]} to {longer[2]}) where it was measured longer" in text
    edits = json.loads((results / "compiled-cpu.json").read_text())["rows"]
    edits = [row for row in edits if row["program"] == "one"]
    called = [row["formula_over_op"][1] for row in edits]
    alone = [row["us_an_edit"]["formula"] / row["us_an_edit"]["none"] for row in edits]
    assert f"{min(called):.2f} to {max(called):.2f} of the time of the call" in text
    assert f"and {min(alone):.2f} to {max(alone):.2f} of that of add and norm alone" in text
    models = json.loads((results / "models-cuda.json").read_text())["rows"]
    spans = [
        [r["ratio"] for r in models if (r["mode"], r["method"]) == what and r["ratio"]]
        for what in (("eager", "patched"), ("graph", "patched"))
    ]
    eager, graph = (f"{min(s):.2f} to {max(s):.2f}" for s in spans)
    assert f"give {eager} of the unmodified model's tokens/s in eager" in text
    assert f"and {graph} in a CUDA graph" in text
    compiled = json.loads((results / "overhead-cuda-compiled.json").read_text())["rows"]
    (ours,) = (r["ratio"] for r in compiled if r["ratio"] and r["method"].endswith(":cuda"))
    assert f"the one cell that was measured is at {ours:.2f}" in text
    training = json.loads((toy.PATH / "training.json").read_text())
    assert f"{training['parameters'] / 1e6:.1f}-million-parameter" in text


def test_what_it_says_of_other_methods_is_recorded():
    text = " ".join(README.read_text().split())
    results = README.parent / "benchmarks" / "results"
    recorded = json.loads((results / "overhead-cpu.json").read_text())["rows"]
    cells = [rows for rows in by_cell(recorded).values() if any(map(timed, rows))]
    toys = [rows for rows in cells if (rows[0]["model"], rows[0]["mode"]) == ("toy", "eager")]
    assert len(toys) == 8 and not any(faster(rows)[1] for rows in toys)
    own, hooks = (
        [row["ratio"] for rows in toys for row in rows if row["method"] == name]
        for name in ("refusal_kernels:cpu", "hooks")
    )
    assert f"({min(own):.2f} to {max(own):.2f} of the unmodified model; plain hooks" in text
    assert f"plain hooks {min(hooks):.2f} to {max(hooks):.2f})" in text
    first = sum(not faster(rows)[1] for rows in cells)
    assert f"highest median in {first} of all {len(cells)} cells" in text
    for best, others in map(faster, cells):
        assert all(o["ratio_low"] <= best["ratio_high"] for o in others if o["verdict"] == "yes")

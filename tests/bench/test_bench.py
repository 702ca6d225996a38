"""The overhead benchmark measures what it says, shows what is wrong, and loses nothing."""

import copy
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from typer.testing import CliRunner

from refusal_kernels import Ablate, Direction, environment, patch
from refusal_kernels.bench import grid, results, run, settings, shapes
from refusal_kernels.bench.process import Process, WorkerError
from refusal_kernels.bench.reference import reference_logits
from refusal_kernels.bench.settings import BenchSettings
from refusal_kernels.bench.worker import SITES, serve
from refusal_kernels.bench.worker.models import input_ids
from refusal_kernels.bench.worker.step import TimedStep, with_code_of_its_own
from refusal_kernels.cli import app, main
from refusal_kernels.errors import InputError

HALF = '''"""Takes half of it out."""
from contextlib import contextmanager
@contextmanager
def steer(model, task):
    r = task.per_row(model.dtype)
    def half(module, args):
        return (args[0] - 0.5 * (args[0] * r).sum(-1, keepdim=True) * r, *args[1:])
    for block in model.model.layers:
        block.register_forward_pre_hook(half)
    yield model
'''
RAISES = '''"""Fails."""
def steer(model, task):
    raise ValueError("not today")
'''
SLEEPS = '''"""Takes its time."""
import time
from contextlib import contextmanager
@contextmanager
def steer(model, task):
    model.model.layers[0].register_forward_pre_hook(lambda *_: time.sleep(0.2))
    yield model
'''
DIES = '''"""Ends the process."""
import os
def steer(model, task):
    os._exit(7)
'''

DIES_OF_FLOAT32 = HALF.replace(
    "def steer(model, task):\n",
    "def steer(model, task):\n    import os, torch\n"
    "    if model.dtype == torch.float32:\n        os._exit(7)\n",
)


@pytest.fixture
def bench(tmp_path):
    """Run the command with the smoke profile; return its result and what it wrote."""

    def go(*arguments: str, out: str = "out"):
        folder = tmp_path / out
        given = ("bench", "--profile", "smoke", "--threads", "1", "--device", "cpu")
        result = CliRunner().invoke(app, [*given, "--out", str(folder), *arguments])
        file = folder / "overhead-cpu.jsonl"
        there = file.is_file() and file.stat().st_size > 2
        return result, results.read_results(file) if there else None

    return go


@pytest.fixture
def method(tmp_path):
    """Write a method's file, and return its path as --methods takes it."""

    def write(name, text):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        return str(path)

    return write


def by_method(document):
    return {row["method"]: row for row in document["rows"]}


def test_the_smoke_profile_end_to_end(bench, tmp_path):
    result, document = bench("--methods", "own", "--json", str(tmp_path / "copy.jsonl"))
    assert result.exit_code == 0, result.output
    rows = by_method(document)
    assert set(rows) == {
        *("unmodified", "hooks", "orthogonalized", "refusal_kernels:cpu"),
        *("refusal_kernels:reference", "norms_apart"),
    }
    assert document["complete"] and document == results.read_results(tmp_path / "copy.jsonl")
    page = (tmp_path / "out" / "overhead-cpu.html").read_text()
    for name, row in rows.items():
        assert row["status"] == "ok" and row["tokens_per_second"] > 0
        assert row["rounds"] == 7 and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["launches"] > 0 and f"--methods {name}" in page
        assert row["verdict"] == (None if name == "unmodified" else "yes")
        if name != "unmodified":
            assert row["residual"] < 1e-6 and row["logits_error"] <= row["logits_allowed"]
    # one op does the add, the edit and the norm
    assert rows["refusal_kernels:cpu"]["launches"] < rows["unmodified"]["launches"]
    assert rows["hooks"]["launches"] > rows["unmodified"]["launches"]
    assert "refusal_kernels:cpu" in result.output
    assert "refusal_kernels:cpu" in page and "<script" not in page and "://" not in page
    assert (tmp_path / "out" / "overhead-cpu.png").stat().st_size > 1000
    lines = (tmp_path / "out" / "overhead-cpu.jsonl").read_text().splitlines()
    assert len(lines) == 1 + len(rows) and not any("null" in line for line in lines)


@pytest.mark.full
def test_an_edit_meanwhile_changes_neither_the_commit_of_a_run_nor_what_resumes_it(
    bench, tmp_path, monkeypatch
):
    monkeypatch.setattr(settings, "versions", lambda: {"commit": next(commits)})
    rows = []
    for _ in range(2):
        commits = iter(("clean", "edited", "edited"))
        result, document = bench("--methods", "hooks", "--resume")
        assert result.exit_code == 0, result.output
        assert document["complete"] and document["versions"] == {"commit": "clean"}
        rows.append(document["rows"])
    assert rows[0] == rows[1]  # kept: no two measurements are alike


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_recorded_results_do_not_make_the_commit_differ(tmp_path, monkeypatch):
    def git(*words):
        who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    code = tmp_path / "refusal_kernels" / "environment.py"
    result = tmp_path / "benchmarks" / "results" / "overhead-cpu.jsonl"
    for path in (code, result):
        path.parent.mkdir(parents=True)
        path.write_text("as committed")
    monkeypatch.delenv("REFUSAL_KERNELS_COMMIT", raising=False)
    monkeypatch.setattr(environment, "__file__", str(code))
    assert "commit" not in environment.versions()
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    clean = environment.versions()["commit"]
    assert len(clean) == 12
    result.write_text("measured anew")
    assert environment.versions()["commit"] == clean
    code.write_text("another")
    assert environment.versions()["commit"] == clean + "-dirty"


def test_what_is_wrong_or_fails_or_dies_or_is_not_there_is_a_row(bench, method, tmp_path):
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "elsewhere.py").write_text(HALF)
    methods = ["refusal_kernels:reference", method("half", HALF), method("raises", RAISES)]
    methods += [method("dies", DIES), "peers"]
    methods += [method("babbles", HALF) + f"@{script(tmp_path, 'echo hello; sleep 60')}"]
    result, document = bench("--methods", ",".join(methods), "--peers", str(tmp_path / "peers"))
    assert result.exit_code == 0, result.output
    rows = by_method(document)
    assert document["complete"] and rows["refusal_kernels:reference"]["verdict"] == "yes"
    assert rows["half"]["status"] == "ok" and rows["half"]["ratio"] > 0
    assert rows["half"]["verdict"] == "no" and rows["half"]["residual"] > 0.01
    assert rows["raises"]["status"] == "failed: ValueError: not today"
    assert rows["dies"]["status"].startswith("failed: the process ended with code 7")
    assert rows["babbles"]["status"].startswith("failed: it answered b'hello'")
    assert rows["elsewhere"]["status"].startswith("not installed: ")
    assert "NO" in result.output and "not today" in result.output


def script(folder, text):
    """Write what stands in for an interpreter."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_worker_that_hangs_or_does_not_start_says_so(tmp_path):
    log = tmp_path / "log"
    process = Process(script(tmp_path, "sleep 600"), log, True, 1, "")
    with pytest.raises(WorkerError, match="failed: no answer in 1 s"):
        process.ask({"do": "close"}, 1.0)
    assert process.process.poll() is not None  # and what it started with it
    process = Process(script(tmp_path, "echo the last words >&2; exit 3"), log, True, 1, "")
    with pytest.raises(WorkerError, match="ended with code 3: the last words"):
        process.ask({"do": "close"}, 30.0)
    with pytest.raises(WorkerError, match="does not start: No such file"):
        Process(tmp_path / "nobody", log, True, 1, "")


def test_steered_layers_and_programs_are_right(bench):
    result, document = bench(
        *("--methods", "refusal_kernels:cpu,hooks,orthogonalized"),
        *("--steered-layers", "2", "--programs", "2", "--phases", "prefill"),
    )
    assert result.exit_code == 0
    rows = by_method(document)
    assert rows["refusal_kernels:cpu"]["verdict"] == rows["hooks"]["verdict"] == "yes"
    assert rows["orthogonalized"]["status"].startswith("cannot: ")


@pytest.mark.full
def test_what_dies_of_one_model_is_tried_again_with_the_next(bench, method):
    dies = method("dies", DIES_OF_FLOAT32) + f"@{sys.executable}"
    given = ("--dtypes", "float32,bfloat16", "--batch", "1,2,4")
    _, document = bench("--methods", f"hooks,{dies}", *given)
    rows = [row for row in document["rows"] if row["method"] == "dies"]
    found = {(row["dtype"], row["batch"]): row["status"] for row in rows}
    assert found["float32", 4] == "not run: it failed 2 times in a row"
    assert [found["bfloat16", batch] for batch in (1, 2, 4)] == ["ok"] * 3


def test_a_methods_file_may_read_its_own_names_in_a_compiled_model(method):
    half = serve.read_method(
        method("own_names", "SHARE = 0.5\n\ndef half(x):\n    return SHARE * x\n")
    ).half

    def called(x):  # the compiler comes to the file's names from outside of it
        return half(x) + 1

    compiled = torch.compile(called, backend="eager", fullgraph=True)
    assert compiled(torch.tensor(4.0)).item() == 3.0


@pytest.mark.full
def test_resume_keeps_what_holds_and_measures_the_rest(bench):
    given = ("--methods", "hooks", "--phases", "decode,prefill")
    _, first = bench(*given, "--phases", "decode")
    kept = by_method(first)["hooks"]
    result, second = bench(*given, "--resume")
    assert result.exit_code == 0 and len(second["rows"]) == 4
    assert kept in second["rows"]
    _, third = bench(*given, "--resume", "--methods", "hooks")
    assert third["rows"] == second["rows"]


def test_resume_refuses_to_write_over_a_run_that_is_not_like_this_one(bench, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    file = folder / "overhead-cpu.jsonl"
    file.write_text("{}")
    result, _ = bench("--methods", "hooks", "--resume")
    assert isinstance(result.exception, InputError) and "no results" in str(result.exception)
    file.unlink()
    _, first = bench("--methods", "hooks")
    first["versions"]["torch"] = "0.1"
    results.write_results(file, first)
    result, kept = bench("--methods", "hooks", "--resume")
    assert "was measured with torch 0.1; expected 2." in str(result.exception)
    assert kept == first


@pytest.mark.full
def test_a_cell_that_was_cut_in_its_rounds_is_measured_again(bench, monkeypatch):
    given, rounds = ("--methods", "hooks", "--phases", "decode,prefill"), run.Run._rounds

    def cut(self, cell, *rest):
        if cell.work == "prefill":
            raise KeyboardInterrupt
        return rounds(self, cell, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(run.Run, "_rounds", cut)
        result, stopped = bench(*given)
    assert result.exit_code == 130 and not stopped["complete"]
    statuses = {row["work"]: row["status"] for row in stopped["rows"]}
    assert statuses == {"decode": "ok", "prefill": "not measured: the run was stopped"}
    _, resumed = bench(*given, "--resume")
    assert (
        resumed["complete"]
        and len(resumed["rows"]) == 4
        and all(map(results.timed, resumed["rows"]))
    )
    assert [row for row in stopped["rows"] if row["work"] == "decode"] == resumed["rows"][:2]


@pytest.mark.full
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_keeps_what_is_there_and_resume_finishes(tmp_path, bench, method, by):
    """Ctrl-C, or the end of a job, while the second cell is prepared."""
    mark = tmp_path / "mark"
    slow = method(
        "slow",
        HALF.replace(
            "    yield",
            f"    if task.work == 'prefill' and not __import__('os').path.exists({str(mark)!r}):\n"
            f"        open({str(mark)!r}, 'w').close(); __import__('time').sleep(600)\n    yield",
        ),
    )
    given = ["--methods", slow, "--phases", "decode,prefill"]
    command = [
        sys.executable,
        "-m",
        "refusal_kernels",
        "bench",
        "--profile",
        "smoke",
        "--device",
        "cpu",
    ]
    command += ["--threads", "1", "--out", str(tmp_path / "out"), *given]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    # a job in the background has SIGINT ignored, and its children inherit that
    child = subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 120
    while not mark.exists() and time.monotonic() < end and child.poll() is None:
        time.sleep(0.1)
    workers = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(child.pid)], capture_output=True, text=True
    ).stdout.split()
    assert list(temporary.glob("refusal_kernels-bench-*"))
    child.send_signal(by)
    output, _ = child.communicate(timeout=30)
    assert child.returncode == 130, output.decode()
    assert not list(temporary.glob("refusal_kernels-bench-*"))
    assert workers and not any(os.path.exists(f"/proc/{pid}/fd/0") for pid in workers)
    document = results.read_results(tmp_path / "out" / "overhead-cpu.jsonl")
    assert not document["complete"]
    status = {(row["work"], row["method"]): row["status"] for row in document["rows"]}
    assert status["decode", "slow"] == "ok"
    assert status["prefill", "slow"] == "not measured: the run was stopped"
    done = [row for row in document["rows"] if row["work"] == "decode"]

    result, document = bench(*given, "--resume")
    assert result.exit_code == 0 and document["complete"]
    assert [row for row in document["rows"] if row["work"] == "decode"] == done
    assert all(row["status"] == "ok" for row in document["rows"]) and len(document["rows"]) == 4


def test_cells_beyond_the_limit_are_rows(bench):
    result, document = bench("--methods", "hooks", "--minutes", "0.0001", "--phases", "decode")
    assert result.exit_code == 0
    for row in document["rows"]:
        assert row["status"] == "not measured: the limit of 0.0001 minutes was reached"
        assert row["ratio"] is None


SLOW = '''"""Takes its time."""
import time
from contextlib import contextmanager
@contextmanager
def steer(model, task):
    def wait(module, args):
        time.sleep(2)
    model.model.layers[0].register_forward_pre_hook(wait)
    yield model
'''


@pytest.mark.full
def test_a_cell_that_can_not_end_in_time_is_given_up(bench, method):
    # two steps a round: seven rounds take 28 s, beyond the limit however fast the rest is
    result, document = bench(
        "--methods", method("slow", SLOW), "--minutes", "0.4", "--phases", "decode"
    )
    assert result.exit_code == 0 and document["complete"]
    for row in document["rows"]:
        assert row["status"] == "not measured: the limit of 0.4 minutes was reached"
        assert row["ratio"] is None


@pytest.mark.parametrize("profile", ["quick", "full"])
def test_on_a_processor_all_that_varies_does_so_one_at_a_time(profile):
    found = grid.grid_for(profile, "cpu", {})
    for name in found.models:
        config = shapes.config_of(name)
        layers = found.most_layers(config) if name in shapes.SHAPES else config.num_hidden_layers
        cells = found.cells(name, layers, config)
        assert len(set(cells)) == len(cells)
        first = cells[0]
        usual = [cell for cell in cells if others(cell, first) == []]
        assert len(usual) == len(found.phases) * len(found.batch)
        for cell in set(cells) - set(usual):
            (axis,) = others(cell, first)
            assert cell.work == "decode"
            rows = axis in ("steered", "programs")
            assert cell.batch == (max if rows else min)(found.batch)
        if name in shapes.SHAPES and shapes.layer_weights(config) > (found.vary_weights or 1e12):
            assert set(cells) == set(usual)
            continue
        for axis, values in grid.AXES.items():
            wanted = {v for v in getattr(found, values) if axis != "steered" or (v or 0) <= layers}
            assert {getattr(cell, axis) for cell in cells} == wanted


def others(cell, first):
    return [axis for axis in grid.AXES if getattr(cell, axis) != getattr(first, axis)]


def test_what_edits_elsewhere_is_never_quite_right():
    row = {"method": "m", "sites": list(SITES), "residual": 0.02, "dtype": "bfloat16"}
    row |= {"logits_error": 0.07, "logits_allowed": 0.15, "logits_error_at_sites": None}
    assert results.verdict(row) == "yes"
    assert results.verdict(row | {"residual": 0.04}) == "no"
    elsewhere = row | {"sites": ["output"], "logits_error_at_sites": 0.01}
    assert results.verdict(elsewhere) == "part"
    assert results.verdict(elsewhere | {"logits_error_at_sites": 0.2}) == "no"


def test_of_large_models_no_axis_varies_unless_it_is_named():
    def kinds(name, given):
        config = shapes.config_of(name).get_text_config(decoder=True)
        cells = grid.grid_for("full", "cpu", given).cells(name, 1, config)
        return len(cells), {(c.dtype, c.mode, c.programs) for c in cells}

    usual = {("float32", "eager", 1)}
    for name in ("llama-3.2-1b", "llama-3-8b", "qwen2.5-72b"):
        assert kinds(name, {}) == (4, usual)
        assert kinds(name, {"modes": ("compile",)}) == (4, {("float32", "compile", 1)})
    for name in ("toy", "qwen2.5-0.5b"):
        assert kinds(name, {})[1] > usual


def test_an_axis_that_is_named_is_crossed_with_the_rest():
    given = {"dtypes": ("float32", "bfloat16"), "modes": ("eager", "compile")}
    found = grid.grid_for("full", "cpu", given)
    kinds = {(c["dtype"], c["mode"], c["work"], c["batch"]) for c in found.combinations()}
    assert len(kinds) == 2 * 2 * len(found.phases) * len(found.batch)


def test_layers_and_prompts_are_cut_to_what_a_processor_can_do():
    found = grid.grid_for("full", "cpu", {})
    for name in shapes.SHAPES:
        config = shapes.config_of(name)
        weights, layers = shapes.layer_weights(config), found.most_layers(config)
        model = shapes.build(name, tiny(shapes.config_of(name)), "float32")
        assert shapes.layer_weights(model.config) == sum(
            module.weight.numel()
            for module in model.model.layers.modules()
            if isinstance(module, torch.nn.Linear)
        )
        assert layers == 1 or layers * weights <= found.shape_weights
        for batch in found.batch:
            tokens = batch * found.prompt_tokens(config, layers, batch)
            assert batch <= tokens <= found.prompt and tokens & (tokens - 1) == 0
            assert tokens * layers * weights <= found.prompt_work
            before = batch * found.context_tokens(config, layers, batch)
            assert before * layers * weights <= found.prompt_work
            assert before == 128 * batch or before * layers * weights > found.prompt_work / 2
    assert grid.grid_for("full", "cuda", {}).most_layers(config) is None


def tiny(config):
    config = shapes.cut(config, 1)
    config.hidden_size, config.intermediate_size, config.vocab_size = 256, 96, 32
    config.head_dim = 256 // config.num_attention_heads
    return config


def test_a_model_that_does_not_fit_in_one_dtype_is_measured_in_the_other(
    bench, monkeypatch, tmp_path
):
    fits = {"float32": 0, "bfloat16": 8}
    monkeypatch.setattr(shapes, "layers_that_fit", lambda config, dtype, room: fits[dtype])
    found = grid.grid_for("full", "cpu", {"models": ("toy",)})
    full = BenchSettings("full", found, (), "cpu", 1, tmp_path)
    cells = [cell for _, cells in run.Run(full)._plan() for cell in cells]
    by = {dtype: [cell for cell in cells if cell.dtype == dtype] for dtype in fits}
    assert len(by["float32"]) == 1 and len(by["bfloat16"]) > 6
    document = bench("--methods", "hooks", "--dtypes", "float32")[1]
    assert {row["status"] for row in document["rows"]} == {
        "not measured: one layer does not fit in memory"
    }


@pytest.mark.full
def test_a_method_that_takes_all_the_time_leaves_the_rounds_to_the_others(
    bench, method, monkeypatch
):
    monkeypatch.setattr(run, "SLOW", 3)  # the machine has slow moments too
    _, document = bench("--methods", "hooks," + method("sleeps", SLEEPS), "--rounds", "11")
    rounds = {row["method"]: row["rounds"] for row in document["rows"]}
    assert rounds == {"unmodified": 11, "hooks": 11, "sleeps": 7}


def test_no_method_runs_or_looks_through_the_compiled_graphs_of_another():
    looked_through = torch._dynamo.eval_frame._debug_get_cache_entry_list
    layers = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4, bias=False), torch.nn.SiLU()]
    steps = [with_code_of_its_own(layer) for layer in layers]
    x = torch.randn(2, 4)
    for layer, step in zip(layers, steps, strict=True):
        compiled = torch.compile(step, backend="eager", dynamic=False)
        assert torch.equal(compiled(input=x), layer(x))
    assert [len(looked_through(step.__code__)) for step in steps] == [1, 1, 1]
    hooked = copy.deepcopy(layers[0])
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    compiled = torch.compile(with_code_of_its_own(hooked), backend="eager", dynamic=False)
    assert torch.equal(compiled(input=x), layers[0](x) + 1)


def test_every_method_comes_after_every_other_as_often():
    orders = [serve.shuffled("abcd", number) for number in range(1000)]
    assert orders == [serve.shuffled("abcd", number) for number in range(1000)]
    assert all(sorted(order) == list("abcd") for order in orders)
    for name in "abcd":
        assert 200 < sum(order[0] == name for order in orders) < 300
        after = Counter(one[-1] for one, two in itertools.pairwise(orders) if two[0] == name)
        assert set(after) == set("abcd") and max(after.values()) < 2 * min(after.values())


def test_compare_finds_a_planted_regression_and_passes_on_itself(bench, tmp_path):
    _, document = bench("--methods", "hooks")
    assert results.compare(document, document) == ([], 2)
    for row in document["rows"]:
        if row["method"] == "hooks":
            row |= {"ratio": 0.9, "ratio_low": 0.89, "ratio_high": 0.91}
    slower = json.loads(json.dumps(document))
    for row in slower["rows"]:
        if row["method"] == "hooks":
            row |= {"ratio": 0.85, "ratio_low": 0.84, "ratio_high": 0.86}
    worse, compared = results.compare(slower, document)
    assert compared == 2 and len(worse) == 1 and "0.900" in worse[0] and "hooks" in worse[0]
    assert results.compare(document, slower) == ([], 2)  # faster is no regression
    wrong = json.loads(json.dumps(document))
    wrong["rows"][1]["verdict"] = "no"
    assert len(results.compare(wrong, document)[0]) == 1

    for row in document["rows"]:  # no machine is as fast as that
        if row["method"] == "hooks":
            row |= {"ratio": 90.0, "ratio_low": 89.0, "ratio_high": 91.0}
    old = tmp_path / "old.json"
    results.write_results(old, document)
    result, _ = bench("--methods", "hooks", "--resume", "--compare", str(old))
    assert result.exit_code == 1 and "slower: hooks" in result.output


def test_the_interval_is_that_of_order_statistics():
    # of 20 values the 6th and the 15th: 95.9 %, the narrowest with 95 % (the sign test's table)
    assert results.interval([float(k) for k in range(1, 21)]) == (6.0, 15.0)
    assert results.interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (1.0, 6.0)
    with pytest.raises(ValueError, match="5 values"):
        results.interval([1.0] * 5)


@pytest.mark.parametrize("work", ["decode", "prefill"])
def test_the_head_is_given_what_is_contiguous(work):
    """Otherwise its weights are copied for every row, in bfloat16 on a CPU."""
    model, seen = shapes.build("toy", shapes.config_of("toy"), "bfloat16"), []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    cell = {"work": work, "batch": 2, "tokens": 12, "mode": "eager"}
    with torch.inference_mode():
        TimedStep(model, model, cell, nullcontext).once()
    assert [(*h.shape[:2], h.is_contiguous()) for h in seen] == [(2, 1, True)] * len(seen) != []


def test_the_reference_is_the_patched_model_in_float64():
    config = shapes.config_of("toy")
    model = shapes.build("toy", config, "float32")
    weights = [parameter.data for parameter in model.parameters()]
    directions = shapes.directions_of(model, 1)
    cell = {"work": "prefill", "batch": 2, "tokens": 12}
    ids = input_ids(cell, config.vocab_size)
    found = reference_logits(model, ids, directions, [0, 0], None, SITES)
    plain = reference_logits(model, ids, directions, [0, 0], None, ())
    assert found.dtype == torch.float64 and (found - plain).abs().max() > 0.1
    assert all(p.data is not None and p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(a, p.data) for a, p in zip(weights, model.parameters(), strict=True))
    double = model.double()
    with torch.inference_mode(), patch(double, Ablate(Direction(directions[0]))):
        patched = double(ids).logits[:, -1]
    # the model's own norms and softmax turn to float32 in between; the reference's do not
    assert (patched - found).abs().max() < 1e-4 * found.abs().max()


BAD = {
    "--profile": ("huge", "expected one of smoke, quick, models, full"),
    "--methods": ("nonsense", "no method 'nonsense'"),
    "--models": ("/no/such/folder", "/no/such/folder"),
    "--phases": ("dreaming", "expected one of decode, prefill"),
    "--batch": ("0", "expected 1 to 4096"),
    "--dtypes": ("int8", "expected one of float32"),
    "--modes": ("graph", "expected one of eager, compile"),
    "--steered-layers": ("x", "expected whole numbers"),
    "--programs": ("9", "need a batch as large"),
    "--rounds": ("3", "expected 7 to 10000"),
    "--threads": ("0", "expected 1 to 1024"),
    "--device": ("nowhere", "device 'nowhere'"),
    "--compare": ("/no/such.json", "is not there"),
}


@pytest.mark.parametrize("option", BAD)
def test_bad_options_give_one_line(bench, option, tmp_path):
    value, message = BAD[option]
    result, document = bench(option, value)
    assert isinstance(result.exception, InputError) and document is None
    assert message in str(result.exception) and "\n" not in str(result.exception)


def test_the_exit_code_of_bad_input_is_two(monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["refusal-kernels", "bench", "--device", "cpu", "--rounds", "1"]
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_engines_are_compared_with_engines():
    def row(method, ratio):
        return {"method": method, "ratio": ratio, "status": "ok", "verdict": "yes"}

    plugin, hooked = row("vllm:plugin", 0.9), row("vllm:hooks", 0.95)
    ours, hooks = row("refusal_kernels:cpu", 0.8), row("hooks", 0.7)
    assert results.faster([plugin, hooked]) == (plugin, [hooked])
    assert results.faster([plugin, hooked, ours, hooks]) == (ours, [])
    assert results.faster([plugin, ours, hooks | {"ratio": 0.85}])[1] == [hooks | {"ratio": 0.85}]

"""The overhead benchmark measures what it says, shows what is wrong, and loses nothing."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from bench_methods import DIES, DIES_OF_FLOAT32, HALF, RAISES, SLEEPS, SLOW, by_method, script
from tiny import run_command

from refusal_kernels import environment
from refusal_kernels.bench import catalog, results, run, settings
from refusal_kernels.errors import InputError


def test_the_smoke_profile_end_to_end(bench, tmp_path):
    result, document = bench("--methods", "own", "--json", str(tmp_path / "copy.jsonl"))
    assert result.exit_code == 0, result.output
    rows = by_method(document)
    assert set(rows) >= {
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


@pytest.mark.full
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


@pytest.mark.full
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


@pytest.mark.full
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
    assert resumed["complete"] and len(resumed["rows"]) == 4
    assert all(map(results.timed, resumed["rows"]))
    assert [row for row in stopped["rows"] if row["work"] == "decode"] == resumed["rows"][:2]


@pytest.mark.full
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_keeps_what_is_there_and_resume_finishes(tmp_path, bench, method, by):
    """Ctrl-C, or the end of a job, while the second cell is prepared."""
    mark = tmp_path / "mark"
    waits = (
        f"    if task.work == 'prefill' and not __import__('os').path.exists({str(mark)!r}):\n"
        f"        open({str(mark)!r}, 'w').close(); __import__('time').sleep(600)\n    yield"
    )
    slow = method("slow", HALF.replace("    yield", waits))
    given = ["--methods", slow, "--phases", "decode,prefill"]
    options = "bench --profile smoke --device cpu --threads 1 --minutes 10 --out".split()
    command = [sys.executable, "-m", "refusal_kernels", *options, str(tmp_path / "out"), *given]
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
    end = time.monotonic() + 300
    while not mark.exists() and time.monotonic() < end and child.poll() is None:
        time.sleep(0.1)
    workers = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(child.pid)], capture_output=True, text=True
    ).stdout.split()
    assert list(temporary.glob("refusal_kernels-bench-*"))
    child.send_signal(by)
    output, _ = child.communicate(timeout=60)
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


# of SLOW, two steps a round: seven rounds take 28 s, beyond the limit however fast the rest is
@pytest.mark.parametrize(
    ("name", "minutes"), [("hooks", 0.0001), pytest.param("slow", 0.4, marks=pytest.mark.full)]
)
def test_cells_beyond_the_limit_are_rows(bench, method, name, minutes):
    chosen = method("slow", SLOW) if name == "slow" else name
    result, document = bench(
        *("--methods", chosen, "--phases", "decode", "--minutes", str(minutes))
    )
    assert result.exit_code == 0 and document["complete"]
    for row in document["rows"]:
        assert row["status"] == f"not measured: the limit was reached (--minutes {minutes:g})"
        assert row["ratio"] is None


@pytest.mark.full
def test_a_method_that_takes_all_the_time_leaves_the_rounds_to_the_others(
    bench, method, monkeypatch
):
    monkeypatch.setattr(run, "SLOW", 3)  # the machine has slow moments too
    long = SLEEPS.replace("0.2", "1")
    _, document = bench("--methods", "hooks," + method("sleeps", long), "--rounds", "11")
    rounds = {row["method"]: row["rounds"] for row in document["rows"]}
    assert rounds == {"unmodified": 11, "hooks": 11, "sleeps": 7}


BAD = [
    ("--profile", "huge", "expected one of smoke, quick, models, full"),
    ("--methods", "nonsense", "no method 'nonsense'"),
    ("--models", "/no/such/folder", "/no/such/folder"),
    ("--phases", "dreaming", "expected one of decode, prefill"),
    ("--batch", "0", "expected 1 to 4096"),
    ("--dtypes", "int8", "expected one of float32"),
    ("--modes", "graph", "expected one of eager, compile"),
    ("--steered-layers", "x", "expected whole numbers"),
    ("--programs", "9", "need a batch as large"),
    ("--rounds", "3", "expected 7 to 10000"),
    ("--threads", "0", "expected 1 to 1024"),
    ("--device", "nowhere", "device 'nowhere'"),
    ("--compare", "/no/such.json", "is not there"),
]


@pytest.mark.parametrize(("option", "value", "message"), BAD)
def test_bad_options_give_one_line(bench, option, value, message):
    result, document = bench(option, value)
    assert isinstance(result.exception, InputError) and document is None
    assert message in str(result.exception) and "\n" not in str(result.exception)


def test_a_file_named_like_a_method_is_refused(bench, method):
    with pytest.raises(InputError, match="2 methods are called 'hooks'; rename a file"):
        catalog.find(["hooks", str(method("hooks", "def steer(model, task): ..."))], "cpu")


def test_the_exit_code_of_bad_input_is_two(capsys):
    assert run_command("bench", "--device", "cpu", "--rounds", "1") == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1

"""The ops beside what they replace.

On a CPU through pytest-benchmark (``make bench``): the sizes that the README speaks of, as ratios
to a fixed base. Or the whole grid as a command, on either device::

    python benchmarks/bench_ops.py --device cuda --out out/bench

which prints tables and the bars (`bars`) and writes ``ops-<device>.jsonl`` and ``.png``.
`cases` says what is computed, `providers` by whom, `timing` how it is timed.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from bars import bar_lines, check_bars
from cases import DTYPES, TRAFFIC, Case, Operands
from conftest import REPORTS, RESULTS, WHAT
from providers import OTHERS, Missing, providers, public, serving
from rich.console import Console
from roofline import plot_roofline
from rows import OK, Results, Row, print_tables
from timing import (
    PREPARE,
    Subject,
    calls_per_reading,
    interleaved,
    l2_bytes,
    on_host,
    ratio,
    repeated,
    ring_size,
    rounds_for,
    warm,
)

from refusal_kernels.bench.records import header, write_records

# --- through pytest-benchmark --------------------------------------------------------------------

HIDDEN = 4096
ROUNDS = 41
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@torch.inference_mode()
def compare(benchmark, case: Case, base: str, others: Sequence[str] = ()) -> None:
    """Time the op, its base and others in every round.

    pytest-benchmark times the op, the setup of each of its rounds the others. Recorded per variant:
    the median time, and median and quartiles of its ratio to ``base`` in the same round, so that a
    change of the machine's load cancels.
    """
    torch.manual_seed(0)
    torch._dynamo.reset()  # every size is compiled for itself, not for any number of tokens
    operands, calls = Operands(case, "cpu"), calls_per_reading(case)
    variants = {name: OTHERS[case.op][name](operands) for name in (base, *others)}
    try:
        served = public(case.op, operands)
    except Missing as why:
        pytest.skip(str(why))
    for call in (*variants.values(), served):
        warm(call, slow_s=float("inf"))
    timed = {name: on_host(call, calls) for name, call in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in timed}

    def time_the_others() -> None:
        for name, reading in timed.items():
            seconds[name].append(reading()())

    benchmark.pedantic(
        repeated(served, calls), setup=time_the_others, rounds=ROUNDS, warmup_rounds=3
    )
    seconds[case.op] = [total / calls for total in benchmark.stats.stats.data]
    ratios = {}
    for name in (base, case.op, *others):
        rounds, base_rounds = seconds[name][-ROUNDS:], seconds[base][-ROUNDS:]
        low, middle, high = ratio(rounds, base_rounds)
        ratios[name] = {
            "median_ms": 1e3 * statistics.median(rounds),
            "ratio": middle,
            "quartiles": [low, high],
        }
        serves = name == case.op
        provider = serving(case.op, "cpu", DTYPES[case.dtype]) if serves else name
        RESULTS.append(Row(case, provider, "call", seconds=rounds, calls=calls, serves=serves))
    info = {"base": base, "ratios": ratios}
    benchmark.extra_info.update(info, calls_per_round=calls)
    REPORTS.append({"case": case, "rounds": ROUNDS, **info})


@each_dtype
def test_add_steer(benchmark, dtype):
    others = ("eager three-op form", "eager with addcmul")
    compare(benchmark, Case("add_steer", dtype, HIDDEN, 4096), "torch.add", others)


@each_dtype
def test_add_steer_in_place(benchmark, dtype):
    compare(benchmark, Case("add_steer_", dtype, HIDDEN, 4096), "torch.add, in place")


@each_dtype
@pytest.mark.parametrize("tokens", [4, 512, 4096])
def test_add_steer_rms_norm(benchmark, tokens, dtype):
    case = Case("add_steer_rms_norm", dtype, HIDDEN, tokens)
    compare(benchmark, case, "torch.add + rms_norm", ("torch.compile",))


@each_dtype
def test_rms_norm(benchmark, dtype):
    compare(benchmark, Case("rms_norm", dtype, HIDDEN, 4096), "torch rms_norm")


@each_dtype
def test_scores(benchmark, dtype):
    compare(benchmark, Case("scores", dtype, HIDDEN, 4096), "matmul")


@each_dtype
def test_add_steer_backward(benchmark, dtype):
    compare(benchmark, Case("add_steer_backward", dtype, HIDDEN, 4096), "eager three-op form")


@each_dtype
def test_moments(benchmark, dtype):
    """[16, 256, 4096], every token into one mean, beside what the paper's code does."""
    compare(benchmark, Case("moments_", dtype, HIDDEN, 4096, sequences=16), "double().sum")


# --- the grid, as a command ----------------------------------------------------------------------

MAIN = ("add_steer", "add_steer_rms_norm")
REST = tuple(op for op in TRAFFIC if op not in (*MAIN, "moments_"))
Part = tuple[Sequence[str], Sequence[str], Sequence[int], Sequence[int]]
# ops, dtypes, hidden, tokens; what the bars ask for comes first, should the time not suffice
GRIDS: dict[str, tuple[Part, ...]] = {
    "cuda": (
        (MAIN, ["bfloat16"], [4096], [1, 8, 64, 512, 4096, 16384]),
        (MAIN, ["bfloat16"], [2048, 8192, 16384], [4096, 16384]),
        (["moments_"], ["bfloat16"], [4096], [32 * 512]),
        (REST, ["bfloat16"], [4096], [64, 512, 4096, 16384]),
        ([*MAIN, *REST], ["float16", "float32"], [4096], [4096]),
        (["moments_"], ["float16", "float32"], [4096], [32 * 512]),
        (["moments_"], ["bfloat16"], [4096], [512, 4 * 512]),
        (MAIN, ["bfloat16"], [2048, 8192, 16384], [64, 512]),
    ),
    "cpu": (
        (["add_steer_rms_norm"], list(DTYPES), [4096], [4, 512, 4096]),
        (["add_steer", "moments_"], list(DTYPES), [4096], [512, 4096]),
        (REST, list(DTYPES), [4096], [512, 4096]),
    ),
    "quick": ((list(TRAFFIC), ["float32", "bfloat16"], [1024], [4, 512]),),
}
SEQUENCE = 512  # tokens a sequence, for moments_
# rounds: as many as fit into so many seconds a case, between a least and a most
ROUNDS_FOR = {"cuda": (2.0, 7, 41), "cpu": (8.0, 7, 41)}
SLOW_S = {"cuda": 0.02, "cpu": 1.0}  # a provider whose one call takes longer is left out
PEERS = ("liger-kernel", "vllm", "flashinfer-python")


def grid(name: str) -> list[Case]:
    """Return the cases of a grid."""
    cases = []
    for ops, dtypes, hidden, tokens in GRIDS[name]:
        for op, dtype, h, n in product(ops, dtypes, hidden, tokens):
            sequences = max(1, n // SEQUENCE) if op == "moments_" else 1
            cases.append(Case(op, dtype, h, n, sequences))
    return cases


def describe(error: Exception) -> str:
    """Return an error in one line: left out on purpose, not installed, or a failure."""
    text = (str(error).splitlines() or [""])[0][:300]
    if isinstance(error, Missing):
        return f"left out: {text}"
    if isinstance(error, ImportError):
        return f"missing: {text}"
    return f"failed: {type(error).__name__}: {text}"


@torch.inference_mode()
def measure(case: Case, device: str, rounds_limit: tuple[float, int, int]) -> list[Row]:
    """Time every provider of a case in every round; those that can't be timed say why."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    first = Operands(case, device)
    more = ring_size(case) - 1 if device == "cuda" else 0
    sets = [first, *(Operands(case, device, like=first) for _ in range(more))]

    rows: list[Row] = []
    subjects: dict[str, dict[str, Subject]] = {}
    for name, provider in providers(case.op).items():
        try:
            ready = PREPARE[device](provider, sets, SLOW_S[device])
        except Exception as error:
            rows.append(Row(case, name, "", status=describe(error)))
            continue
        for mode, subject in ready.items():
            subjects.setdefault(mode, {})[name] = subject
    chosen = serving(case.op, device, DTYPES[case.dtype])
    for mode, by_name in subjects.items():
        timed = {name: subject.timed for name, subject in by_name.items()}
        seconds = interleaved(timed, rounds_for(timed, *rounds_limit), warmup=2)
        for name, subject in by_name.items():
            rest: dict[str, Any] = {"seconds": seconds[name], "host_seconds": subject.host_seconds}
            rest |= {"calls": subject.calls, "sets": subject.sets, "serves": name == chosen}
            rows.append(Row(case, name, mode, OK, **rest))
    return rows


def run_grid(cases: Sequence[Case], device: str, rounds_limit: Any, limit_s: float) -> Results:
    """Measure case by case; a case that fails, or for which no time is left, is reported."""
    results, start = Results(), time.perf_counter()
    for number, case in enumerate(cases, start=1):
        passed = time.perf_counter() - start
        if passed > limit_s:
            reason = f"left out: no time was left after {passed:.0f} s"
            results.append(Row(case, "every provider", "", status=reason))
            continue
        print(f"[{number}/{len(cases)}] {case}", flush=True)
        try:
            results += measure(case, device, rounds_limit)
        except Exception as error:  # out of memory, say: the next case may fit
            results.append(Row(case, "every provider", "", status=describe(error)))
        if device == "cuda":
            torch.cuda.empty_cache()
    return results


def peer_versions() -> dict[str, str]:
    """Return the versions of the peers that are installed."""
    installed = {}
    for name in PEERS:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def write(out: Path, device: str, results: Results, seconds: float) -> None:
    """Write the results and the picture, and print the tables and the bars."""
    records, checked = results.records(), check_bars(results, device)
    peaks = {mode: 1e-9 * peak for mode, peak in results.peak_copies().items()}
    document = header(WHAT, device)
    document["versions"] |= peer_versions()
    document |= {
        "torch_threads": torch.get_num_threads(),
        "l2_bytes": l2_bytes() if device == "cuda" else None,
        "peak_copy_gb_per_s": peaks,
        "seconds": round(seconds),
        "bars": checked,
        "rows": records,
    }
    write_records(out / f"ops-{device}.jsonl", document)
    plot_roofline(out / f"ops-{device}.png", results, document["device"].split(",")[0])

    console = Console(width=None if Console().is_terminal else 150)
    print_tables(records, console)
    print("bars", *bar_lines(checked), sep="\n  ")
    for mode, peak in peaks.items():
        console.print(f"peak copy, {mode}: {peak:.1f} GB/s, read and written")
    console.print(f"{seconds:.0f} s; {out}/ops-{device}.jsonl, .png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=tuple(PREPARE), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--quick", action="store_true", help="a small grid, few rounds")
    parser.add_argument("--ops", nargs="+", choices=tuple(TRAFFIC), help="only these")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="on a CPU")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="then begin no case")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device")
    torch.set_num_threads(options.threads)

    cases = grid("quick" if options.quick else options.device)
    cases = [case for case in cases if options.ops is None or case.op in options.ops]
    rounds_limit = (0.5, 5, 9) if options.quick else ROUNDS_FOR[options.device]
    start = time.perf_counter()
    results = run_grid(cases, options.device, rounds_limit, options.limit_s)
    write(options.out, options.device, results, time.perf_counter() - start)


if __name__ == "__main__":
    main()

"""Prints and records the ratios, which are what these benchmarks are for."""

import os
from dataclasses import asdict
from pathlib import Path

import torch
from bars import bar_lines, check_bars
from rows import Results

from refusal_kernels.bench.records import header, write_records

WHAT = "time of the ops and of what they replace, interleaved round by round"
REPORTS: list[dict] = []
RESULTS = Results()
THREADS = "REFUSAL_KERNELS_BENCH_THREADS"  # instead of all cores


def pytest_configure(config):
    torch.set_num_threads(int(os.environ.get(THREADS) or os.cpu_count() or 1))


def pytest_addoption(parser):
    parser.addoption("--records", type=Path, help="write the ratios here, as JSON lines")


def pytest_sessionfinish(session):
    path = session.config.getoption("--records")
    if path is None or not REPORTS:
        return
    document = header(WHAT) | {"torch_threads": torch.get_num_threads()}
    document["bars"] = check_bars(RESULTS, "cpu")
    document["rows"] = [
        {
            **asdict(report["case"]),
            "mode": "call",
            "provider": name,
            "serves": name == report["case"].op or None,
            "median_us": 1e3 * ratio["median_ms"],
            "over": report["base"],
            "ratio": ratio["ratio"],
            "ratio_q1": ratio["quartiles"][0],
            "ratio_q3": ratio["quartiles"][1],
            "rounds": report["rounds"],
        }
        for report in REPORTS
        for name, ratio in report["ratios"].items()
    ]
    write_records(path, document)


def pytest_terminal_summary(terminalreporter):
    for report in REPORTS:
        terminalreporter.write_line(f"\n{report['case']} ({report['rounds']} rounds, interleaved)")
        for name, r in report["ratios"].items():
            low, high = r["quartiles"]
            terminalreporter.write_line(
                f"  {name:<22} {r['median_ms']:8.3f} ms   {r['ratio']:.3f} "
                f"[{low:.3f}, {high:.3f}] x {report['base']}"
            )
    terminalreporter.write_line("\nbars")
    for line in bar_lines(check_bars(RESULTS, "cpu")):
        terminalreporter.write_line(f"  {line}")

"""Prints the ratios, which are what these benchmarks are for, under pytest-benchmark's table."""

import os

import torch
from bars import bar_lines, check_bars
from rows import Results

from refusal_kernels.environment import describe_device, versions

REPORTS: list[dict] = []
RESULTS = Results()
THREADS = "REFUSAL_KERNELS_BENCH_THREADS"  # instead of all cores


def pytest_configure(config):
    torch.set_num_threads(int(os.environ.get(THREADS) or os.cpu_count() or 1))


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["device"] = describe_device()
    machine_info["versions"] = versions()
    machine_info["torch_threads"] = torch.get_num_threads()


def pytest_benchmark_update_json(config, benchmarks, output_json):
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)  # the rounds: the quartiles say enough
    output_json["bars"] = check_bars(RESULTS, "cpu")


def pytest_terminal_summary(terminalreporter):
    for report in REPORTS:
        terminalreporter.write_line(f"\n{report['title']} ({report['rounds']} rounds, interleaved)")
        for name, r in report["ratios"].items():
            low, high = r["quartiles"]
            terminalreporter.write_line(
                f"  {name:<22} {r['median_ms']:8.3f} ms   {r['ratio']:.3f} "
                f"[{low:.3f}, {high:.3f}] x {report['base']}"
            )
    terminalreporter.write_line("\nbars")
    for line in bar_lines(check_bars(RESULTS, "cpu")):
        terminalreporter.write_line(f"  {line}")

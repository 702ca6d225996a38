"""How long an import and a help text take.

    python benchmarks/bench_startup.py [--out benchmarks/results/startup-cpu.jsonl]

Every row is a fresh process, timed from its start to its end. All run in every round, every other
round in reverse order; the row tells the median and the quartiles.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from refusal_kernels.bench.records import header, write_records
from refusal_kernels.cli import commands

PACKAGE = ["-m", "refusal_kernels"]
PROGRAMS = {
    "python": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import torch, refusal_kernels": ["-c", "import torch, refusal_kernels"],
    "import torch, refusal_kernels.ops": ["-c", "import torch, refusal_kernels.ops"],
    "refusal-kernels --help": [*PACKAGE, "--help"],
    **{
        f"refusal-kernels {command.__name__} --help": [*PACKAGE, command.__name__, "--help"]
        for command in commands()
    },
}


def seconds(arguments: list[str]) -> float:
    """Run Python in a process of its own; return the wall time."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="write the results here, as JSON lines")
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for number in range(-1, options.rounds):  # the first fills the caches
        for name in list(PROGRAMS)[:: 1 if number % 2 == 0 else -1]:
            elapsed = seconds(PROGRAMS[name])
            if number >= 0:
                times[name].append(elapsed)
    rows = []
    table = Table("", "seconds", "quartiles", title=f"Start-up, {options.rounds} rounds")
    for name, elapsed_times in times.items():
        low, median, high = statistics.quantiles(elapsed_times, n=4)
        rows.append({"program": name, "seconds": median, "q1": low, "q3": high})
        table.add_row(name, f"{median:.3f}", f"{low:.3f} to {high:.3f}")
    Console().print(table)
    if options.out:
        write_records(options.out, {**header("seconds that a process takes"), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())

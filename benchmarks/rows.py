"""What was measured: rows, the numbers that follow from them, and the files and tables to read."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cases import Case
from rich.console import Console
from rich.table import Table
from timing import ratio

OK = "ok"


@dataclass
class Row:
    """One provider at one case in one mode (``call``; on a GPU ``cold`` and ``hot``).

    Attributes
    ----------
    status
        ``ok``, or why there is no time: ``missing: ...``, ``left out: ...``, ``failed: ...``.
    seconds
        Per call, one a round; the rounds of a case and mode are those of all its providers.
    serves
        Whether this is what the package chooses by itself here.
    """

    case: Case
    provider: str
    mode: str
    status: str = OK
    seconds: list[float] = field(default_factory=list)
    calls: int = 1
    sets: int = 1
    host_seconds: float | None = None
    serves: bool = False

    @property
    def bytes_per_s(self) -> float:
        """The byte floor of the op over the median time."""
        return self.case.floor_bytes / statistics.median(self.seconds)


class Results(list[Row]):
    """All rows of a run."""

    def of(self, case: Case, mode: str) -> dict[str, Row]:
        """Return what was timed together, by provider."""
        return {
            row.provider: row
            for row in self
            if row.case == case and row.mode == mode and row.status == OK
        }

    def timed(self) -> list[tuple[Case, str]]:
        """Return every case and mode with times, in the order of the run."""
        return list(dict.fromkeys((row.case, row.mode) for row in self if row.status == OK))

    def peak_copies(self) -> dict[str, float]:
        """Return the highest bandwidth of any copy in bytes/s, read and written, by mode."""
        peaks: dict[str, float] = {}
        for row in self:
            if row.provider == "copy" and row.status == OK:
                peaks[row.mode] = max(row.bytes_per_s, peaks.get(row.mode, 0.0))
        return peaks

    def records(self) -> list[dict[str, Any]]:
        """Return what was timed, a row each, then each reason why something was not."""
        peaks, groups = self.peak_copies(), {key: self.of(*key) for key in self.timed()}
        records = [
            record(row, groups[row.case, row.mode], peaks.get(row.mode))
            for row in self
            if row.status == OK
        ]
        reasons: dict[tuple[str, str], list[str]] = {}
        for row in self:
            if row.status != OK:
                reasons.setdefault((row.provider, row.status), []).append(row.case.op)
        for (provider, status), ops in reasons.items():
            line = {"provider": provider, "status": status, "cases": len(ops)}
            records.append({**line, "op": ", ".join(dict.fromkeys(ops))})
        return records


def record(row: Row, beside: dict[str, Row], peak: float | None) -> dict[str, Any]:
    """Return the numbers of one timed row; the copy beside it moves as many bytes as its floor."""
    q1, median, q3 = statistics.quantiles(row.seconds, n=4, method="inclusive")
    share = ratio(beside["copy"].seconds, row.seconds)[1] if "copy" in beside else None
    return {
        **asdict(row.case),
        "sequences": row.case.sequences if row.case.sequences > 1 else None,
        "mode": row.mode,
        "provider": row.provider,
        "serves": row.serves or None,
        "median_us": 1e6 * median,
        "q1_us": 1e6 * q1,
        "q3_us": 1e6 * q3,
        "gb_per_s": 1e-9 * row.bytes_per_s,
        "share_of_copy": share,
        "share_of_peak_copy": row.bytes_per_s / peak if peak else None,
        "host_us_per_call": None if row.host_seconds is None else 1e6 * row.host_seconds,
        "rounds": len(row.seconds),
    }


# --- tables --------------------------------------------------------------------------------------


def _cell(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)


def print_tables(records: Sequence[dict[str, Any]], console: Console) -> None:
    """Print one table per op, then once each what could not be timed, and why."""
    timed = [line for line in records if "status" not in line]
    hosted = any(line["host_us_per_call"] is not None for line in timed)
    for op in dict.fromkeys(line["op"] for line in timed):
        table = Table(title=op, title_justify="left", title_style="bold")
        for name in ("case", "provider"):
            table.add_column(name, no_wrap=True)
        numbers = ["us", "quartiles", "GB/s", "of copy", "of peak", *["host us"] * hosted]
        for name in numbers:
            table.add_column(name, justify="right", no_wrap=True)
        before = None
        for line in (line for line in timed if line["op"] == op):
            case = f"{line['dtype']} {line['tokens']} x {line['hidden']} {line['mode']}"
            if before not in (None, case):
                table.add_section()
            table.add_row(
                case if case != before else "",
                f"[bold]{line['provider']}[/bold]" if line["serves"] else line["provider"],
                _cell(line["median_us"], "{:.1f}"),
                f"{line['q1_us']:.1f} to {line['q3_us']:.1f}",
                _cell(line["gb_per_s"], "{:.1f}"),
                _cell(line["share_of_copy"], "{:.0%}"),
                _cell(line["share_of_peak_copy"], "{:.0%}"),
                *[_cell(line["host_us_per_call"], "{:.1f}")] * hosted,
            )
            before = case
        if table.row_count:
            console.print(table)

    for line in (line for line in records if "status" in line):
        text = f"no time for {line['provider']}: {line['status']}"
        console.print(f"{text} ({line['cases']} cases of {line['op']})", markup=False)

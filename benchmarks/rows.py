"""What was measured: rows, the numbers that follow from them, and the files and tables to read."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cases import Case
from rich.console import Console
from rich.table import Table
from timing import ratio

from refusal_kernels.files.atomic import replacing

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
    own
        Whether this is what the package serves by itself here.
    """

    case: Case
    provider: str
    mode: str
    status: str = OK
    seconds: list[float] = field(default_factory=list)
    calls: int = 1
    sets: int = 1
    host_seconds: float | None = None
    own: bool = False

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
        """Return every row with every number; None where there is none."""
        peaks, groups = self.peak_copies(), {key: self.of(*key) for key in self.timed()}
        return [
            record(row, groups.get((row.case, row.mode), {}), peaks.get(row.mode)) for row in self
        ]


def record(row: Row, beside: dict[str, Row], peak: float | None) -> dict[str, Any]:
    """Return the numbers of one row; the copy ``beside`` it moves as many bytes as its floor."""
    numbers: dict[str, Any] = dict.fromkeys(
        (
            "median_us", "q1_us", "q3_us", "achieved_gb_per_s", "share_of_copy",
            "share_of_copy_q1", "share_of_copy_q3", "share_of_peak_copy", "host_us_per_call",
        )
    )  # fmt: skip
    if row.status == OK:
        q1, median, q3 = statistics.quantiles(row.seconds, n=4, method="inclusive")
        numbers |= {"median_us": 1e6 * median, "q1_us": 1e6 * q1, "q3_us": 1e6 * q3}
        numbers["achieved_gb_per_s"] = 1e-9 * row.bytes_per_s
        if "copy" in beside:
            low, middle, high = ratio(beside["copy"].seconds, row.seconds)
            numbers |= {"share_of_copy": middle, "share_of_copy_q1": low, "share_of_copy_q3": high}
        if peak is not None:
            numbers["share_of_peak_copy"] = row.bytes_per_s / peak
        if row.host_seconds is not None:
            numbers["host_us_per_call"] = 1e6 * row.host_seconds
    return {
        **asdict(row.case),
        "floor_bytes": row.case.floor_bytes,
        "mode": row.mode,
        "provider": row.provider,
        "own": row.own,
        "status": row.status,
        **numbers,
        "rounds": len(row.seconds),
        "calls_per_round": row.calls,
        "buffer_sets": row.sets,
    }


def write_csv(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write one line per row; an empty cell where there is no number."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    for line in records:
        rounded = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()}
        writer.writerow(rounded)
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


# --- tables --------------------------------------------------------------------------------------


def _cell(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)


def print_tables(records: Sequence[dict[str, Any]], console: Console) -> None:
    """Print one table per op, then once each what could not be timed, and why."""
    hosted = any(line["host_us_per_call"] is not None for line in records)
    for op in dict.fromkeys(line["op"] for line in records):
        table = Table(title=op, title_justify="left", title_style="bold")
        for name in ("case", "provider"):
            table.add_column(name, no_wrap=True)
        numbers = ["us", "quartiles", "GB/s", "of copy", "of peak", *["host us"] * hosted]
        for name in numbers:
            table.add_column(name, justify="right", no_wrap=True)
        before = None
        for line in (r for r in records if r["op"] == op and r["status"] == OK):
            case = f"{line['dtype']} {line['tokens']} x {line['hidden']} {line['mode']}"
            if before not in (None, case):
                table.add_section()
            table.add_row(
                case if case != before else "",
                f"[bold]{line['provider']}[/bold]" if line["own"] else line["provider"],
                _cell(line["median_us"], "{:.1f}"),
                f"{line['q1_us']:.1f} to {line['q3_us']:.1f}",
                _cell(line["achieved_gb_per_s"], "{:.1f}"),
                _cell(line["share_of_copy"], "{:.0%}"),
                _cell(line["share_of_peak_copy"], "{:.0%}"),
                *[_cell(line["host_us_per_call"], "{:.1f}")] * hosted,
            )
            before = case
        if table.row_count:
            console.print(table)

    reasons: dict[tuple[str, str], list[str]] = {}
    for line in records:
        if line["status"] != OK:
            reasons.setdefault((line["provider"], line["status"]), []).append(line["op"])
    for (provider, status), where in reasons.items():
        cases = f"{len(where)} cases of {', '.join(dict.fromkeys(where))}"
        console.print(f"no time for {provider}: {status} ({cases})", markup=False, highlight=False)

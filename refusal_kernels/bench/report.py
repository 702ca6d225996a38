"""A run's results in words: in the terminal, and as one HTML page that needs nothing else."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from refusal_kernels.bench import plots, results
from refusal_kernels.bench.catalog import PACKAGE
from refusal_kernels.bench.results import OK, at_run_time, by_cell, cell_text, faster, ratio_text
from refusal_kernels.bench.settings import command_for
from refusal_kernels.bench.worker import BASE
from refusal_kernels.files.atomic import replacing
from refusal_kernels.research.evaluation.html import templates

TEMPLATE = "overhead.html"
OVERHEAD = "Every cell. An open marker: not right, or only in part."
MEMORY = "Memory above the unmodified model's; a mark for each cell."
OPS = "The ops by themselves: achieved bandwidth over bytes moved, beside a copy (bench_ops.py)."
VERDICTS = {"yes": "yes", "part": "in part", "no": "NO", None: ""}
STYLES = {"no": "bold red", "part": "yellow"}


def number(value: float | None, pattern: str) -> str:
    """Return a number in a pattern; nothing where there is none."""
    return "" if value is None else pattern.format(value)


def remarks(row: Mapping[str, Any]) -> str:
    """Return what the numbers of a row do not say."""
    if row["status"] != OK:
        return row["status"]
    if row["method"] != BASE and not at_run_time(row):
        return "not at run time"
    if row["verdict"] == "part":
        return f"edits {', '.join(row['sites'])} only, exactly"
    if row["verdict"] == "no":
        error = row["logits_error_at_sites"] or row["logits_error"]
        if error > row["logits_allowed"]:
            return f"logits off, as an edit of {', '.join(row['sites'])} (its SITES)"
        return "some of the direction is left"
    return ""


def columns(row: Mapping[str, Any]) -> list[str]:
    """Return what is shown of a row, beside the method."""
    if row["status"] != OK:
        return [""] * 7
    memory = number(row["memory_mib"], "{:.0f}")
    if row["method"] != BASE:
        memory += number(row["base_memory_mib"], " of {:.0f}")
    return [
        number(row["tokens_per_second"], "{:.4g}"),
        ratio_text(row),
        memory,
        number(row["launches"], "{}"),
        number(row["residual"], "{:.0e}"),
        number(row["logits_error"], "{:.0e}") + number(row["base_logits_error"], " / {:.0e}"),
        VERDICTS[row["verdict"]],
    ]


def headings(device: str) -> list[str]:
    """Return the names of `columns`."""
    kernels = "kernels" if device.startswith("cuda") else "ops"
    return ["tokens/s", "ratio [95 %]", "MiB", kernels, "|r.h|/|h|", "logits off / plain", "right"]


def one_reason(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return why a cell has no time at all, where it is one reason for all methods."""
    reasons = {row["status"] for row in rows}
    return reasons.pop() if len(reasons) == 1 and OK not in reasons else None


def print_table(document: Mapping[str, Any], console: Console, device: str) -> None:
    """Print one table, a section a cell, and where another method was faster."""
    table = Table(title="What steering costs: tokens/s over the unmodified model's")
    table.title_justify = "left"
    table.add_column("method", no_wrap=True)
    for name in headings(device):
        table.add_column(name, justify="right", no_wrap=name != "logits off / plain")
    table.add_column("remark", overflow="fold")
    for rows in by_cell(document["rows"]).values():
        table.add_section()
        reason = one_reason(rows)
        table.add_row(Text(cell_text(rows[0]), style="bold"), *[""] * 7, reason or "")
        for row in () if reason else rows:
            style = STYLES.get(row["verdict"] or "")
            green = row["method"].startswith("refusal_kernels")
            method = Text(f"  {row['method']}", style="green" if green else "")
            table.add_row(method, *columns(row), remarks(row), style=style)
    console.print(table)
    for text in slower_cells(document):
        console.print(f"not the fastest: {text}", markup=False, highlight=False)


def slower_cells(document: Mapping[str, Any]) -> list[str]:
    """Say where this package was not the fastest way to ablate, and if that is beyond the noise."""
    lines = []
    for rows in by_cell(document["rows"]).values():
        best, others = faster(rows)
        ours = any(row["method"].startswith(PACKAGE) for row in rows)
        if others and ours and best is None:
            lines.append(f"{cell_text(others[0])}: refusal_kernels has no right time")
        elif others and best is not None:
            texts = [f"{best['method']} {ratio_text(best)}"]
            for row in sorted(others, key=lambda row: -row["ratio"]):
                apart = row["ratio_low"] > best["ratio_high"]
                note = "" if apart else ", the intervals overlap"
                texts.append(f"{row['method']} {ratio_text(row)}{note}")
            lines.append(f"{cell_text(best)}: {'; '.join(texts)}")
    return lines


def write_page(path: Path, document: Mapping[str, Any]) -> None:
    """Write the page of `render`, replacing the file in one step."""
    text = render(document, (path.parent,))
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def render(document: Mapping[str, Any], pictures: Sequence[Path] = ()) -> str:
    """Make the page. A folder of ``pictures`` may hold the roofline that bench_ops.py draws."""
    environment = templates(Path(__file__).parent)
    kind = document["device_kind"]
    return environment.get_template(TEMPLATE).render(
        device=document["device"],
        date=document["date"],
        complete=document["complete"],
        figures=_figures(document, pictures),
        slower=slower_cells(document),
        cells=[_cell(document, rows) for rows in by_cell(document["rows"]).values()],
        headings=headings(kind),
        counted="kernels that are launched" if kind == "cuda" else "PyTorch ops, views apart",
        residual_eps=results.RESIDUAL_EPS,
        logits_times=results.LOGITS_TIMES,
        facts=facts(document),
    )


def facts(document: Mapping[str, Any]) -> dict[str, str]:
    """Return what the numbers depend on, by name."""
    environments = {
        name: ", ".join(f"{package} {version}" for package, version in versions.items())
        for name, versions in document["environments"].items()
    }
    clock = document["clock_mhz"]
    return {
        "device": document["device"],
        "clock": f"{clock:g} MHz at the end" if clock is not None else "not told",
        "torch threads": str(document["torch_threads"]),
        "load at the end": f"{document['load']:.2f}",
        "profile": f"{document['profile']}, at most {document['rounds']} rounds",
        "time": f"{document['seconds']} s",
        "versions": ", ".join(f"{name} {v}" for name, v in document["versions"].items()),
        **environments,
    }


def _cell(document: Mapping[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    good = [r for r in rows if results.timed(r) and at_run_time(r) and r["verdict"] == "yes"]
    best = max(good, key=lambda r: r["ratio"], default=None)
    return {
        "text": cell_text(rows[0]),
        "reason": one_reason(rows),
        "rows": [
            {
                "method": row["method"],
                "package": row["method"].partition(":")[0] == PACKAGE,
                "best": row is best,
                "columns": columns(row),
                "verdict": row["verdict"],
                "remark": remarks(row),
                "command": command_for(document, row),
            }
            for row in rows
        ],
    }


def _figures(document: Mapping[str, Any], pictures: Sequence[Path]) -> list[dict[str, Any]]:
    figures = []
    for draw, text in ((plots.plot_cells, OVERHEAD), (plots.plot_memory, MEMORY)):
        file = io.BytesIO()
        draw(file, document)
        if file.tell():
            figures.append({"uri": _uri(file.getvalue(), "svg+xml"), "text": text})
    rooflines = [folder / f"ops-{document['device_kind']}.png" for folder in pictures]
    for roofline in [file for file in rooflines if file.is_file()][:1]:
        figures.append({"uri": _uri(roofline.read_bytes(), "png"), "text": OPS})
    return figures


def _uri(data: bytes, kind: str) -> Markup:
    # base64 has no character that HTML would read as markup
    return Markup(f"data:image/{kind};base64," + base64.b64encode(data).decode())

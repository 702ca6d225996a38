"""A run as one HTML page that needs nothing else: no scripts, no fonts, no network."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from refusal_kernels.bench import plots, report
from refusal_kernels.bench.catalog import PACKAGE
from refusal_kernels.bench.results import (
    LOGITS_TIMES,
    RESIDUAL_EPS,
    at_run_time,
    by_cell,
    cell_text,
    timed,
)
from refusal_kernels.bench.settings import command_for
from refusal_kernels.files.atomic import replacing
from refusal_kernels.research.evaluation.html import templates

TEMPLATE = "overhead.html"
OVERHEAD = "Every cell. An open marker: not right, or only in part."
MEMORY = "Memory above the unmodified model's; a mark for each cell."
OPS = "The ops by themselves: achieved bandwidth over bytes moved, beside a copy (bench_ops.py)."


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
        slower=report.slower_cells(document),
        cells=[_cell(document, rows) for rows in by_cell(document["rows"]).values()],
        headings=report.headings(kind),
        counted="kernels that are launched" if kind == "cuda" else "PyTorch ops, views apart",
        residual_eps=RESIDUAL_EPS,
        logits_times=LOGITS_TIMES,
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
    good = [r for r in rows if timed(r) and at_run_time(r) and r["verdict"] == "yes"]
    best = max(good, key=lambda r: r["ratio"], default=None)
    return {
        "text": cell_text(rows[0]),
        "reason": report.one_reason(rows),
        "rows": [
            {
                "method": row["method"],
                "package": row["method"].partition(":")[0] == PACKAGE,
                "best": row is best,
                "columns": report.columns(row),
                "verdict": row["verdict"],
                "remark": report.remarks(row),
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

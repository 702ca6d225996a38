"""`docs/benchmarks.md`, made from recorded runs: nothing in it is written by hand."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from refusal_kernels.bench import report
from refusal_kernels.bench.page import facts
from refusal_kernels.bench.results import (
    OK,
    by_cell,
    cell_text,
    faster,
    read_results,
    timed,
)
from refusal_kernels.bench.worker import BASE
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import replacing

REASONS = Path(__file__).with_name("reasons.json")
BUSY = 1.5  # times the threads: a load that is not the benchmark's own
UNEXPLAINED = "not explained"
KINDS = {"cpu": "CPU", "cuda": "GPU"}
HEAD = """# What steering costs

Tokens per second of every way to remove one direction from a model, over the unmodified model's
own. This page is made from recorded results by

    refusal-kernels bench --document docs/benchmarks.md --recorded benchmarks/results

Each cell's methods take turns in every round, each beside an unmodified model in its own
environment; a ratio is the median over the rounds and, in brackets, its 95 % interval by order
statistics. 1 is no cost. Every method is checked against a float64 reference: *in part* means that
it edits elsewhere than the paper does, and there exactly; **no** that it is wrong. Weights edited
beforehand ("orthogonalized") are no way to steer at run time. 
"""


def write_document(path: Path, folder: Path) -> None:
    """Write the page of all recorded runs in a folder, replacing the file in one step.

    A run is `overhead-DEVICE.jsonl`, there or in a folder of its own, or `overhead-DEVICE-*.jsonl`.

    Raises
    ------
    InputError
        If there are none.
    """
    files = [*folder.glob("overhead-*.jsonl"), *folder.glob("*/overhead-*.jsonl")]
    documents = {file.relative_to(folder).as_posix(): read_results(file) for file in files}
    if not documents:
        raise InputError(f"--recorded: {folder} holds no overhead-cpu.jsonl or overhead-cuda.jsonl")
    text = write_markdown(documents)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_markdown(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page.

    Parameters
    ----------
    documents
        What runs wrote, under the names of their files; a device's whole run comes first.
    """
    parts = [HEAD]
    for kind, title in KINDS.items():
        own = {name: d for name, d in documents.items() if d["device_kind"] == kind}
        for name in sorted(own, key=lambda name: (len(name), name)):
            parts += _run(name, own[name])
        if not own:
            parts.append(
                f"## {title}\n\nNot measured. The command is\n\n"
                f"    refusal-kernels bench --profile full --device {kind} "
                "--out benchmarks/results\n"
            )
    return "\n".join(parts)


def _run(name: str, document: Mapping[str, Any]) -> Iterable[str]:
    """Give the parts of one run."""
    rows = document["rows"]
    yield f"## {KINDS[document['device_kind']]}: {document['device']} (`{name}`)\n"
    whole = "" if document["complete"] else " It was stopped before its end."
    if document["profile"] != "full":
        whole += f" The profile is `{document['profile']}`, not the full one."
    if document["load"] > BUSY * document["torch_threads"]:
        whole += (
            f" The machine was busy with other work (a load of {document['load']:.1f}): these "
            "numbers are provisional."
        )
    yield f"Recorded on {document['date']}, in {document['seconds']} s.{whole}\n"
    yield "\n".join(f"- {key}: {text}" for key, text in facts(document).items()) + "\n"
    yield "### Noise\n"
    yield _noise(rows) + "\n"
    yield "### Ratios\n"
    yield _table(rows)
    yield "### Where refusal_kernels is not the fastest\n"
    yield _slower(rows)
    yield "### What was not measured\n"
    yield _missing(rows)


def _noise(rows: Sequence[dict[str, Any]]) -> str:
    widths = sorted(r["ratio_high"] - r["ratio_low"] for r in rows if timed(r) and _compared(r))
    if not widths:
        return "Nothing was timed."
    return (
        f"An interval is {widths[len(widths) // 2]:.3f} wide in the median row and "
        f"{widths[-1]:.3f} in the worst; differences below that are none."
    )


def _compared(row: Mapping[str, Any]) -> bool:
    return bool(row["method"] != BASE)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Return one table: a line a cell, a column a method."""
    names = [name for name in dict.fromkeys(row["method"] for row in rows) if name != BASE]
    lines = [
        "| cell | tokens/s | " + " | ".join(f"`{name}`" for name in names) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    for own in by_cell(rows).values():
        if not any(timed(row) for row in own):
            continue
        found = {row["method"]: row for row in own}
        base = found[BASE]
        rate = report.number(base["tokens_per_second"], "{:.4g}")
        cells = [_ratio(found.get(name)) for name in names]
        lines.append(f"| {cell_text(base)} | {rate} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _ratio(row: Mapping[str, Any] | None) -> str:
    if row is None or not timed(row):
        return "-"
    text = f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
    return text + {"part": " *in part*", "no": " **no**"}.get(row["verdict"] or "", "")


def reason_for(best: Mapping[str, Any], other: Mapping[str, Any], rules: Sequence[Any]) -> str:
    """Return why a method was faster, by the first rule that fits; a condition left out fits all.

    Conditions are "methods" (names, or "*"), "verdict" (of the other), "overlap" (of the two
    intervals), "steered" (whether only some blocks are), "programs" (whether there are several),
    "work", "mode", "dtype", "model" and "batch".
    """
    actual = {
        "verdict": other["verdict"],
        "overlap": other["ratio_low"] <= best["ratio_high"],
        "steered": other["steered"] is not None,
        "programs": other["programs"] > 1,
        **{name: other[name] for name in ("work", "mode", "dtype", "model", "batch")},
    }
    for rule in rules:
        named = rule.get("methods", "*")
        fits = named == "*" or other["method"] in named
        if fits and all(actual[name] == rule[name] for name in actual if name in rule):
            return str(rule["why"])
    return UNEXPLAINED


def _slower(rows: Sequence[dict[str, Any]]) -> str:
    rules = json.loads(REASONS.read_text(encoding="utf-8"))
    lines = []
    for own in by_cell(rows).values():
        best, others = faster(own)
        for other in others:
            if best is None:
                why = "refusal_kernels has no right time in this cell"
                text = f"`{other['method']}` {report.ratio_text(other)}"
            else:
                why = reason_for(best, other, rules)
                text = f"`{other['method']}` {report.ratio_text(other)} against "
                text += f"`{best['method']}` {report.ratio_text(best)}"
            lines.append(f"- {cell_text(other)}: {text}. {why}")
    return "\n".join(lines or ["In no cell that was measured."]) + "\n"


def _missing(rows: Sequence[dict[str, Any]]) -> str:
    """Say what has no time, and why: a line a reason."""
    found: dict[tuple[str, str], int] = {}
    for own in by_cell(rows).values():
        reason = report.one_reason(own)
        for row in own:
            if reason is not None:
                found[cell_text(row), reason] = 1
            elif row["status"] != OK:
                key = f"`{row['method']}`", row["status"]
                found[key] = found.get(key, 0) + 1
    lines = [
        f"- {what}: {why}" + (f" ({count} cells)" if count > 1 else "")
        for (what, why), count in found.items()
    ]
    return "\n".join(lines or ["Everything that was to be measured was."]) + "\n"

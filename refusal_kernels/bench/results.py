"""Rows, and what is said of them: ratios with intervals, right or wrong, faster or slower."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from refusal_kernels.bench import records
from refusal_kernels.bench.catalog import BEFOREHAND, ENGINES, OWN, PACKAGE, PLUGIN
from refusal_kernels.bench.worker import BASE, SITES
from refusal_kernels.errors import InputError
from refusal_kernels.timing import interval

OK = "ok"
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
RESIDUAL_EPS = 4
"""What may be left of the direction, in units of the dtype's eps: three factors are rounded to half
of it each (the direction, the product, the stream), on a stream that was a few times longer."""
LOGITS_TIMES = 8
"""How many times the unmodified model's own error in its dtype the logits may be off: three times
as many roundings as there are adds stand beside those that the model makes. Where the steered model
is more sensitive to rounding than the unmodified one, as many times more: `reference_logits` shows
it by noise."""
CELL = tuple("model layers of_layers hidden dtype mode work batch tokens steered programs".split())
NOT_MEASURED = "not measured"
ALTERNATIVES = (*OWN, "vllm:hooks")  # no other package
USUAL: dict[str, Any] = {
    "steered": None, "programs": 1, "status": OK, "sites": list(SITES), "rounds": 0,
    "tokens_per_second": None, "ratio": None, "ratio_low": None, "ratio_high": None,
    "memory_mib": None, "base_memory_mib": None, "launches": None, "residual": None,
    "logits_error": None, "base_logits_error": None, "logits_error_at_sites": None,
    "logits_allowed": None, "verdict": None,
}  # fmt: skip
"""What a row says where nothing was measured; not written (`records`)."""
TOLERANCE = 0.02  # runs differ by this much where nothing has changed


def rated(
    row: dict[str, Any], seconds: Sequence[float], base: Sequence[float], tokens: int
) -> None:
    """Put the speed into a row: of every round the ratio to the unmodified model of that round."""
    ratios = [b / s for s, b in zip(seconds, base, strict=True)]
    low, high = interval(ratios)
    row |= {
        "tokens_per_second": tokens / statistics.median(seconds),
        "ratio": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
        "rounds": len(ratios),
    }


def verdict(row: Mapping[str, Any]) -> str | None:
    """Say whether a method did what it is timed for: "yes", "part" or "no".

    "part": it edits elsewhere than the paper does, and there exactly; also where a coarse dtype
    would let what it leaves pass. None for the unmodified model, and where nothing can be judged.
    """
    if row["method"] == BASE or row["logits_error"] is None or row["logits_allowed"] is None:
        return None
    if row["logits_error_at_sites"] is not None:
        return "part" if row["logits_error_at_sites"] <= row["logits_allowed"] else "no"
    gone = row["residual"] is None or row["residual"] <= RESIDUAL_EPS * EPS[row["dtype"]]
    return "yes" if gone and row["logits_error"] <= row["logits_allowed"] else "no"


def at_run_time(row: Mapping[str, Any]) -> bool:
    """Whether a row is of a method that steers a model as it runs."""
    return row["method"] not in (BASE, *BEFOREHAND)


def timed(row: Mapping[str, Any]) -> bool:
    """Whether a row has a time."""
    return row["status"] == OK and row["ratio"] is not None


def cell_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what makes the cell of a row."""
    return tuple(row[name] for name in CELL)


def by_cell(rows: Iterable[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Return the rows of every cell."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(cell_key(row), []).append(row)
    return cells


def cell_text(row: Mapping[str, Any]) -> str:
    """Return the cell of a row in words."""
    from refusal_kernels.bench.grid import BenchCell

    return str(BenchCell(**{name: row[name] for name in CELL}))


def ratio_text(row: Mapping[str, Any]) -> str:
    """Return a ratio with its interval."""
    if row["ratio"] is None:
        return ""
    return f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"


def faster(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Return this package's best row of a cell, and the others' that beat it.

    Those that steer at run time, rightly or in part, and whose median is above. Engines are
    compared where there are no others: their unmodified model is another one.
    """
    good = [r for r in rows if timed(r) and at_run_time(r) and r["verdict"] in ("yes", "part")]
    good = [r for r in good if r["method"] not in ENGINES] or good
    ours = [r for r in good if is_package(r) and r["verdict"] == "yes"]
    best = max(ours, key=lambda r: r["ratio"], default=None)
    others = [r for r in good if not is_package(r)]
    if best is None:
        return None, others
    return best, [r for r in others if r["ratio"] > best["ratio"]]


def is_package(row: Mapping[str, Any]) -> bool:
    """Whether a row is of this package, steering at run time."""
    return row["method"] in (PLUGIN, "norms_apart") or row["method"].partition(":")[0] == PACKAGE


def compare(new: Mapping[str, Any], old: Mapping[str, Any]) -> tuple[list[str], int]:
    """Return what became worse, one line each, and how many rows were compared.

    A ratio fell if its whole 95 % interval lies below the old one's and the median is more than
    `TOLERANCE` lower; two runs of the same code differ by as much. A method that was right and is
    not, or had a time and has none, counts too.
    """
    before = {(cell_key(row), row["method"]): row for row in old["rows"]}
    worse, compared = [], 0
    for row in new["rows"]:
        was = before.get((cell_key(row), row["method"]))
        if was is None or not timed(was) or row["status"].startswith(NOT_MEASURED):
            continue
        compared += 1
        where = f"{row['method']}, {cell_text(row)}"
        if not timed(row):
            worse.append(f"{where}: {row['status']}")
        elif (was["verdict"], row["verdict"]) in {("yes", "part"), ("yes", "no"), ("part", "no")}:
            worse.append(f"{where}: right was '{was['verdict']}', is '{row['verdict']}'")
        elif row["ratio_high"] < was["ratio_low"] and row["ratio"] < was["ratio"] - TOLERANCE:
            worse.append(f"{where}: ratio {ratio_text(was)} became {ratio_text(row)}")
    return worse, compared


def read_results(path: Path) -> dict[str, Any]:
    """Read what a run wrote."""
    document = records.read_records(path, USUAL)
    if not all({*CELL, "method"} <= set(row) for row in document["rows"]):
        raise InputError(f"{path} is malformed; expected what 'refusal-kernels bench' writes")
    return document


def write_results(path: Path, document: Mapping[str, Any]) -> None:
    """Write the results of a run."""
    records.write_records(path, document, USUAL)

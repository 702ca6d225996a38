"""Write the generated tables and pictures of README and docs, from benchmarks/results/.

    python benchmarks/tables.py

A table stands between the markers ``<!-- generated: NAME -->`` and ``<!-- end -->``.
"""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from refusal_kernels.bench.catalog import PACKAGE
from refusal_kernels.bench.plots import Bar, plot_cells, plot_glance
from refusal_kernels.bench.records import read_records
from refusal_kernels.bench.results import (
    ALTERNATIVES,
    at_run_time,
    by_cell,
    cell_text,
    is_package,
    read_results,
    timed,
)
from refusal_kernels.files.atomic import replacing

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
PAGES = tuple(
    ROOT / page
    for page in ("README.md", "benchmarks/README.md", "docs/benchmarks.md", "docs/smollm2.md")
)
MARKED = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
DTYPES = ("float32", "bfloat16", "float16")
Row = dict[str, Any]


def rows_of(name: str, **wanted: Any) -> list[Row]:
    """Return the rows of a result file that have these values."""
    rows = read_records(RESULTS / f"{name}.jsonl")["rows"]
    return [row for row in rows if all(row.get(k) == value for k, value in wanted.items())]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are numbers."""
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ruler, *lines))


def span(values: Iterable[float], digits: int = 2) -> str:
    """Return the lowest and the highest of some values."""
    low, high = min(values := list(values)), max(values)
    return f"{low:.{digits}f} to {high:.{digits}f}"


def source(name: str) -> str:
    """Return where and when a file was measured, in a line."""
    document = read_records(RESULTS / f"{name}.jsonl")
    parts = [document["device"]]
    for package in ("torch", "transformers", "vllm", "commit"):
        if package in document["versions"]:
            parts.append(f"{package} {document['versions'][package]}")
    return f"`{name}.jsonl`: {', '.join(parts)}.\n\n"


# --- what steering costs -------------------------------------------------------------------------


def ratio(row: Row | None, named: bool = False) -> str:
    """Return a ratio with its interval; "-" where there is none."""
    if row is None:
        return "-"
    text = f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
    part = ", in part" if row["verdict"] == "part" else ""
    return f"{text} {row['method']}{part}" if named else text


def best(rows: Iterable[Row]) -> Row | None:
    """Return the row of the highest ratio."""
    return max(rows, key=lambda row: row["ratio"], default=None)


def columns(rows: Sequence[Row]) -> dict[str, Row | None]:
    """Return what stands in the columns of a cell: the best row of each kind of method."""
    good = [row for row in rows if timed(row) and row["verdict"] in ("yes", "part")]
    by_method = {row["method"]: row for row in good}
    others = [
        row
        for row in good
        if at_run_time(row) and not is_package(row) and row["method"] not in ALTERNATIVES
    ]
    served = (by_method.get(f"{PACKAGE}:{backend}") for backend in ("cuda", "cpu"))
    return {
        "this package": next((row for row in served if row), None),
        "edited weights": by_method.get("orthogonalized"),
        "plain hooks": by_method.get("hooks"),
        "best other package": best(others),
    }


def telling(line: dict[str, Row | None]) -> bool:
    """Whether the intervals of this package and of plain hooks do not overlap, or it is slow."""
    ours, hooks = line["this package"], line["plain hooks"]
    if ours is None or hooks is None or ours["ratio_high"] < 1:
        return True
    return ours["ratio_low"] > hooks["ratio_high"] or hooks["ratio_low"] > ours["ratio_high"]


def verdicts(cells: Sequence[Sequence[Row]]) -> str:
    """Return in how many cells this package is faster, within the intervals, or slower."""
    counts = {"faster": 0, "overlap": 0, "slower": 0}
    for rows in cells:
        ours = columns(rows)["this package"]
        others = [
            row
            for row in rows
            if timed(row) and at_run_time(row) and not is_package(row)
            if row["verdict"] in ("yes", "part")
        ]
        if ours is None or any(row["ratio_low"] > ours["ratio_high"] for row in others):
            counts["slower"] += 1
        elif all(row["ratio_high"] < ours["ratio_low"] for row in others):
            counts["faster"] += 1
        else:
            counts["overlap"] += 1
    return (
        f"Of {len(cells)} cells this package is faster than every other way to steer at run time "
        f"in {counts['faster']} and slower than one in {counts['slower']}; in {counts['overlap']} "
        "the 95 % intervals overlap. The table has the cells in which the intervals of this "
        "package and of plain hooks do not overlap, or it is slower than the unmodified model.\n\n"
    )


def overhead(*names: str) -> str:
    """Return the cells of the runs of a device; of those that two runs have, the first one's."""
    text = "".join(map(source, names))
    by_text: dict[str, Sequence[Row]] = {}
    for name in names:
        rows = read_results(RESULTS / f"{name}.jsonl")["rows"]
        for cell in by_cell(rows).values():
            if any(map(timed, cell)):
                by_text.setdefault(cell_text(cell[0]), cell)
    cells = list(by_text.values())
    shown = [columns(rows) for rows in cells]
    head = [name for name in shown[0] if any(line[name] for line in shown)]
    lines = []
    for rows, line in zip(cells, shown, strict=True):
        if not telling(line):
            continue
        rate = next(row["tokens_per_second"] for row in rows if row["method"] == "unmodified")
        kinds = [ratio(line[name], named=name.startswith("best")) for name in head]
        lines.append([cell_text(rows[0]), f"{rate:.4g}", *kinds])
    return text + verdicts(cells) + table(["cell", "unmodified tokens/s", *head], lines)


# --- the ops -------------------------------------------------------------------------------------


def ops_cpu() -> str:
    """Return the time of every op over its base: with memory that is kept, and with fresh pages."""
    files = ("ops-cpu-kept-memory", "ops-cpu")
    lines: dict[tuple[str, int, str, str], list[str]] = {}
    for name in files:
        for row in rows_of(name):
            if row["provider"] != row["over"]:
                provider = "this package" if row.get("serves") else row["provider"]
                key = row["op"], row["tokens"], row["over"], provider
                lines.setdefault(key, []).append(f"{row['ratio']:.2f}")
    head = ["op, tokens x 4096", "time over that of", "of"]
    head += [f"{kind}, {dtype}" for kind in ("kept", "fresh") for dtype in DTYPES]
    body = [
        [f"`{op}` {tokens}", f"`{over}`", provider, *values]
        for (op, tokens, over, provider), values in lines.items()
    ]
    return "".join(map(source, files)) + table(head, body)


def ops_cuda() -> str:
    """Return the ops in bfloat16 with buffers that are not in the cache."""
    lines = []
    groups: dict[tuple[str, int, int], dict[str, Row]] = {}
    for row in rows_of("ops-cuda", mode="cold", dtype="bfloat16", hidden=4096):
        key = row["op"], row["tokens"], row["hidden"]
        groups.setdefault(key, {})[row["provider"]] = row
    for (op, tokens, hidden), rows in groups.items():
        ours = rows.get("cuda") or rows["dispatcher"]
        times = [rows.get(name) for name in ("triton", "torch.compile")]
        over = [f"{row['median_us'] / ours['median_us']:.2f}" if row else "-" for row in times]
        share = f"{ours['share_of_copy']:.2f}"
        lines.append([f"`{op}` {tokens} x {hidden}", f"{ours['median_us']:.1f}", share, *over])
    head = ["op, bfloat16", "us", "speed over a copy's", "Triton's time", "torch.compile's time"]
    return source("ops-cuda") + table(head, lines)


def bars(name: str) -> str:
    """Return what the ops are held to, and whether they meet it."""
    checked = read_records(RESULTS / f"{name}.jsonl")["bars"]
    lines = [
        (
            bar["name"],
            bar["target"],
            f"{bar['value']:.2f}" if "value" in bar else "-",
            bar["verdict"],
        )
        for bar in checked
    ]
    return table(["target, worst case of all", "wanted", "measured", ""], lines)


# --- the experiment ------------------------------------------------------------------------------


def spread(row: Row, value: str, low: str = "q1", high: str = "q3") -> str:
    """Return a median with its quartiles."""
    return f"{row[value]:.2f} ({row[low]:.2f} to {row[high]:.2f})"


def experiment() -> str:
    """Return what collecting, selecting and editing a checkpoint take."""
    collected = rows_of("collect-cpu")
    lines = [
        [
            f"collecting, {row['model']}: time over that of the bare passes",
            spread(row["collect_over_bare"], "median"),
            "collect-cpu",
        ]
        for row in collected
        if "batches" in row
    ]
    growth = read_records(RESULTS / "collect-cpu.jsonl")["growth_bytes"] / 1e6
    counts = " to ".join(f"{row['prompts']:,}" for row in collected if "peak_bytes" in row)
    lines.append([f"collecting: memory from {counts} prompts", f"{growth:.1f} MB", "collect-cpu"])
    for row in rows_of("select-cpu"):
        text = f"selecting: times as fast as the {row['over']} protocol, one thread"
        lines.append([text, spread(row, "times_faster"), "select-cpu"])
    for row in rows_of("selection-smollm2-cpu"):
        text = f"{row['what']} on SmolLM2-135M: times less processor time than the plain protocol"
        lines.append([text, spread(row, "times_less"), "selection-smollm2-cpu"])
        memory = f"{row['memory_mib']:.0f} and {row['plain_memory_mib']:.0f} MiB"
        text = f"{row['what']} on SmolLM2-135M: memory, and that of the plain protocol"
        lines.append([text, memory, "selection-smollm2-cpu"])
    for row in rows_of("last-cpu"):
        text = f"last logits by position, {row['dtype']}, batch {row['batch']}: times as fast"
        lines.append([text, spread(row, "times", "times_q1", "times_q3"), "last-cpu"])
    (row,) = rows_of("checkpoint-cpu")
    size = f"a checkpoint of {row['checkpoint_bytes'] / 1e9:.1f} GB"
    lines.append([f"editing {size}", f"{row['seconds']:.1f} s", "checkpoint-cpu"])
    text = "editing it: memory over its largest tensor"
    lines.append([text, f"{row['ratio_over_torch']:.2f}", "checkpoint-cpu"])
    edits = rows_of("compiled-cpu", program="one")
    text = "an edit compiled as a formula: time over that of the op"
    formula = span(row["formula_over_op"] for row in edits)
    lines.append([text, formula, "compiled-cpu"])
    text = "the same over add and norm without an edit"
    alone = span(row["formula_us"] / row["none_us"] for row in edits)
    lines.append([text, alone, "compiled-cpu"])
    started = {row["program"]: row for row in rows_of("startup-cpu")}
    torch, both = (started[p]["seconds"] for p in ("import torch", "import torch, refusal_kernels"))
    text = "`import refusal_kernels` beyond `import torch` (medians)"
    lines.append([text, f"{both - torch:.2f} s", "startup-cpu"])
    helped = started["refusal-kernels --help"]
    lines.append(["`refusal-kernels --help`", f"{spread(helped, 'seconds')} s", "startup-cpu"])
    return table(["what", "measured (quartiles)", "file"], lines)


def vllm() -> str:
    """Return the throughput of vLLM."""
    lines = [
        [
            f"{row['model']}: {row['case']}",
            row["over"],
            f"{row['tokens_per_second']:.0f}",
            spread(row, "ratio", "ratio_q1", "ratio_q3"),
        ]
        for row in rows_of("vllm-cpu")
        if row["case"] != row["over"]
    ]
    return source("vllm-cpu") + table(["engine", "over", "tokens/s", "ratio (quartiles)"], lines)


HOOKS = {
    "repeated": "same batch", "changed": "another batch", "first": "same batch, caches cold",
    "bar": "at most",
}  # fmt: skip


def hooks() -> str:
    """Return the host time of the vLLM plugin's hooks in a step."""
    lines = [
        [str(row["requests"]), *(f"{row[key]:.0f}" for key in HOOKS)]
        for row in rows_of("vllm-hooks-cpu")
    ]
    columns = [f"{title}, \u00b5s" for title in HOOKS.values()]
    return source("vllm-hooks-cpu") + table(["requests", *columns], lines)


# --- README --------------------------------------------------------------------------------------


WAYS = {
    "unmodified": "unmodified", "ablated": "ablated", "added": "direction added",
    "orthogonalized": "weights edited",
}  # fmt: skip


def finding(name: str) -> list[list[str]]:
    """Return what a direction does to a model, as lines of a table with the columns of `WAYS`."""
    lines = []
    for category in ("harmful", "harmless"):
        rates = {row["method"]: row["refused"] for row in rows_of(name, prompts=category)}
        values = [f"{100 * rates[way]:.1f} %" for way in WAYS]
        lines.append([f"{category} prompts refused", *values])
    right = {row["method"]: row.get("right") for row in rows_of(name) if "skills" in row}
    values = [f"{100 * right[way]:.1f} %" if right[way] is not None else "-" for way in WAYS]
    return [*lines, ["skills answered right", *values]]


def toy() -> str:
    """Return what the direction does to the toy model."""
    return table(["", *WAYS.values()], finding("demo-cpu"))


def smollm2() -> str:
    """Return what the direction does to SmolLM2 fine-tuned to refuse, with intervals and costs."""
    name = "smollm2-refuses-cpu"
    harmful, harmless, skills = finding(name)
    lines = []
    for line, category in ((harmful, "harmful"), (harmless, "harmless")):
        rows = {row["method"]: row for row in rows_of(name, prompts=category)}
        ends = [f"{100 * rows[w]['low']:.0f} to {100 * rows[w]['high']:.0f} %" for w in WAYS]
        lines += [line, ["95 % interval", *ends]]
    nats = {row["method"]: f"{row['nats']:.3f}" for row in rows_of(name, text="prose")}
    lines += [skills, ["nats a token of plain prose", *(nats.get(way, "-") for way in WAYS)]]
    speed = {row["method"]: spread(row, "ratio", "ratio_q1", "ratio_q3") for row in rows_of(name)
             if "ratio" in row}  # fmt: skip
    lines.append(["tokens/s over unmodified", *(speed.get(way, "-") for way in WAYS)])
    return source(name) + table(["", *WAYS.values()], lines)


def measured() -> str:
    """Return five numbers."""
    lines = []
    for device, name in (("cuda", "H100"), ("cpu", "2 CPU cores")):
        spans = {
            method: span(row["ratio"] for row in rows_of(f"models-{device}", method=method))
            for method in (f"{PACKAGE}:{device}", "hooks")
        }
        patched, hooks = spans.values()
        text = f"Whole models, tokens/s over unmodified (hooks: {hooks})"
        lines.append([text, name, patched])
    ours = [
        row["ratio"]
        for row in rows_of("ops-cpu-kept-memory", op="add_steer_rms_norm", tokens=4096)
        if row.get("serves")
    ]
    text = "`add_steer_rms_norm`, time over `torch.add` and `rms_norm`, 4096 x 4096"
    lines.append([text, "2 CPU cores", span(ours)])
    (row,) = rows_of("selection-smollm2-cpu", what="selection")
    text = "Selecting on SmolLM2-135M, times less processor time than the plain protocol"
    lines.append([text, "1 CPU core", f"{row['times_less']:.1f}"])
    (row,) = rows_of("checkpoint-cpu")
    text = f"Editing a checkpoint of {row['checkpoint_bytes'] / 1e9:.0f} GB"
    lines.append([text, "2 CPU cores", f"{row['seconds']:.0f} s"])
    return table(["measured", "on", "value"], lines)


TABLES: dict[str, Callable[[], str]] = {
    "toy": toy,
    "smollm2": smollm2,
    "measured": measured,
    **{
        f"overhead-{device}": functools.partial(
            overhead, f"overhead-{device}", f"overhead-{device}-compiled", f"models-{device}"
        )
        for device in ("cuda", "cpu")
    },
    "ops-cpu": ops_cpu,
    "ops-cuda": ops_cuda,
    "bars-cuda": lambda: bars("ops-cuda"),
    "experiment": experiment,
    "vllm": vllm,
    "hooks": hooks,
}


def regenerated(text: str) -> str:
    """Return a page with its tables made anew."""
    return MARKED.sub(lambda part: part[1] + TABLES[part[2]]() + part[3], text)


# --- pictures ------------------------------------------------------------------------------------


def panel(device: str, mode: str) -> tuple[str, list[Bar]]:
    """Return the bars of one device: decoding at batch 1, Qwen2.5-0.5B's shape, bfloat16."""
    rows = read_results(RESULTS / f"overhead-{device}.jsonl")["rows"]
    cell = {"model": "qwen2.5-0.5b", "dtype": "bfloat16", "mode": mode, "work": "decode"}
    cell |= {"batch": 1, "programs": 1, "steered": None}
    rows = [row for row in rows if cell == {name: row[name] for name in cell} and timed(row)]
    by_method = {row["method"]: row for row in rows}
    others = best(
        row
        for row in rows
        if row["verdict"] == "yes" and at_run_time(row) and not is_package(row)
        if row["method"] not in ALTERNATIVES
    )
    named = f"best other\n({others['method']})" if others else "best other\npackage"
    plain = {**by_method["unmodified"], "ratio_low": 1.0, "ratio_high": 1.0}
    bars: list[Bar] = [
        ("plain\nhooks", by_method["hooks"], "#8a8a8a"),
        (named.replace("_", "-"), others, "#2a6fb0"),
        ("edited\nweights", by_method["orthogonalized"], "#b8b8b8"),
        ("this\npackage", by_method[f"{PACKAGE}:{device}"], "#c1432e"),
        ("unmodified", plain, "#dddddd"),
    ]
    kept, layers = rows[0]["layers"], rows[0]["of_layers"]
    count = "" if kept == layers else f", {kept} of {layers} layers"
    graph = " in a CUDA graph" if mode == "graph" else ""
    return f"Qwen2.5-0.5B's shape{count}, bfloat16, decoding{graph}", bars


def draw() -> None:
    """Draw the pictures anew."""
    titles = {
        "cuda": ("H100: patching makes decoding faster", "graph"),
        "cpu": ("CPU: patching costs nothing", "eager"),
    }
    panels = [(title, *panel(device, mode)) for device, (title, mode) in titles.items()]
    plot_glance(IMAGES / "overhead.png", panels)
    for device in titles:
        document = read_results(RESULTS / f"overhead-{device}.jsonl")
        plot_cells(IMAGES / f"overhead-{device}.png", document)


def main() -> None:
    for page in PAGES:
        text = regenerated(page.read_text(encoding="utf-8"))
        with replacing(page) as temporary:
            temporary.write_text(text, encoding="utf-8")
    draw()


if __name__ == "__main__":
    main()

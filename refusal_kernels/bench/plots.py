"""Pictures of a run: overhead by batch, and memory."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import pyplot as plt

from refusal_kernels.bench.catalog import PACKAGE
from refusal_kernels.bench.results import timed
from refusal_kernels.bench.worker import BASE
from refusal_kernels.research.plots import BLUE, GRAY, GREEN, INK, RED, STYLE, Target, save_figure

COLUMNS = 3
OWN_LOOKS = ((RED, "-", "o"), ("#e08a7b", "--", "o"), ("#f0b9ae", ":", "o"))
LOOKS = {"hooks": (INK, "-", "s"), "orthogonalized": (GRAY, ":", "D")}
OTHERS = (BLUE, GREEN, "#8a5aa8", "#b8860b", "#3aa6a6", "#7a5230", "#d16ba5", "#5b7083")


def looks(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str, str]]:
    """Return color, line and marker of every method but the unmodified model."""
    names = [name for name in dict.fromkeys(row["method"] for row in rows) if name != BASE]
    own, others = itertools.cycle(OWN_LOOKS), itertools.cycle(OTHERS)
    return {
        name: next(own)
        if name.partition(":")[0] == PACKAGE
        else LOOKS.get(name) or (next(others), "-", "^")
        for name in names
    }


def _panels(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return what is drawn together: the rows that differ in method and batch alone."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if timed(row) and row["method"] != BASE:
            name = f"{row['model']}, {row['dtype']}, {row['mode']}, {row['work']}"
            name += f", {row['steered']} steered" if row["steered"] is not None else ""
            name += f", {row['programs']} programs" if row["programs"] > 1 else ""
            found.setdefault(name, []).append(row)
    return found


def plot_overhead(path: Target, document: Mapping[str, Any]) -> None:
    """Draw ratios by batch with their intervals; an open marker did not do what it is timed for."""
    panels = _panels(document["rows"])
    if not panels:
        return
    look = looks(document["rows"])
    lines, columns = math.ceil(len(panels) / COLUMNS), min(COLUMNS, len(panels))
    with plt.rc_context({**STYLE, "font.size": 9}):
        figure, grid = plt.subplots(
            lines, columns, figsize=(max(4.2, 3.8 * columns), 2.7 * lines + 0.9),
            squeeze=False, sharey=True, layout="constrained",
        )  # fmt: skip
        for axes, (title, rows) in zip(grid.flat, panels.items(), strict=False):
            batches = sorted({row["batch"] for row in rows})
            names = [name for name in look if any(row["method"] == name for row in rows)]
            for number, name in enumerate(names):
                color, style, marker = look[name]
                own = sorted((r for r in rows if r["method"] == name), key=lambda r: r["batch"])
                shift = 0.5 * ((number + 0.5) / len(names) - 0.5)
                x = [batches.index(row["batch"]) + shift for row in own]
                y = [row["ratio"] for row in own]
                axes.plot(x, y, style, color=color, linewidth=1, alpha=0.6)
                for at, row in zip(x, own, strict=True):
                    right = row["verdict"] == "yes"
                    spread = [[row["ratio"] - row["ratio_low"]], [row["ratio_high"] - row["ratio"]]]
                    axes.errorbar(
                        at, row["ratio"], yerr=spread, fmt=marker, color=color, markersize=4.5,
                        markerfacecolor=color if right else "white", elinewidth=1,
                    )  # fmt: skip
            axes.axhline(1.0, color=INK, linewidth=0.8)
            axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
            axes.set_xlim(-0.5, len(batches) - 0.5)
            axes.set_title(title, loc="left", fontsize=8.5)
            axes.grid(True, axis="y", color=GRAY, alpha=0.25, linewidth=0.6)
        tops = [row["ratio_high"] for rows in panels.values() for row in rows]
        grid[0, 0].set_ylim(0, min(1.6, 1.05 * max(1.05, *tops)))
        for axes in grid[:, 0]:
            axes.set_ylabel("tokens/s over\nthe unmodified model's")
        for number, axes in enumerate(grid.flat):
            if number >= len(panels):
                axes.axis("off")
            elif number + columns >= len(panels):
                axes.set_xlabel("batch")
        _legend(figure, look)
        save_figure(figure, path)


def _legend(figure: Any, look: Mapping[str, tuple[str, str, str]]) -> None:
    handles = [
        plt.Line2D([], [], color=c, ls=s, marker=m, markersize=5, label=name)
        for name, (c, s, m) in look.items()
    ]
    figure.legend(
        handles=handles, frameon=False, fontsize=8.5, loc="outside lower center",
        ncols=min(5, len(handles)),
    )  # fmt: skip


def plot_memory(path: Target, document: Mapping[str, Any]) -> None:
    """Draw how much more memory a method takes than the unmodified model: a dot for each cell."""
    look, found = looks(document["rows"]), {}
    for name in look:
        found[name] = [
            row["memory_mib"] - row["base_memory_mib"]
            for row in document["rows"]
            if row["method"] == name and row["memory_mib"] is not None
            if row["base_memory_mib"] is not None
        ]
    names = [name for name, values in found.items() if values]
    if not names:
        return
    with plt.rc_context({**STYLE, "font.size": 9}):
        figure, axes = plt.subplots(figsize=(6.4, 0.9 + 0.28 * len(names)))
        for y, name in enumerate(names):
            color, _, marker = look[name]
            axes.plot(found[name], [y] * len(found[name]), marker, color=color, alpha=0.7)
        axes.axvline(0, color=INK, linewidth=0.8)
        most = max(max(found[name]) for name in names)
        if most > 100:  # weights of one's own beside a few activations
            axes.set_xscale("symlog", linthresh=10)
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(axis="both", color=GRAY, alpha=0.2, linewidth=0.6)
        axes.set_xlabel("MiB above the unmodified model's peak")
        save_figure(figure, path)

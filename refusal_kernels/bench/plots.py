"""Pictures: what every method costs in every cell, its memory, and few bars at a glance."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import pyplot as plt

from refusal_kernels.bench.catalog import PACKAGE
from refusal_kernels.bench.results import by_cell, cell_text, timed
from refusal_kernels.bench.worker import BASE
from refusal_kernels.research.plots import BLUE, GRAY, GREEN, INK, RED, STYLE, Target, save_figure

PACKAGE_LOOKS = ((RED, "o"), ("#e08a7b", "o"), ("#f0b9ae", "o"))
LOOKS = {"hooks": (INK, "s"), "orthogonalized": (GRAY, "D"), "norms_apart": ("#e08a7b", "v")}
OTHERS = (BLUE, GREEN, "#8a5aa8", "#b8860b", "#3aa6a6", "#7a5230", "#d16ba5", "#5b7083")
WIDEST = (0.4, 1.6)  # ratios beyond are drawn at the edge


def looks(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Return color and marker of every method but the unmodified model."""
    names = [name for name in dict.fromkeys(row["method"] for row in rows) if name != BASE]
    package, others = itertools.cycle(PACKAGE_LOOKS), itertools.cycle(OTHERS)
    return {
        name: next(package)
        if name.partition(":")[0] == PACKAGE
        else LOOKS.get(name) or (next(others), "^")
        for name in names
    }


def plot_cells(path: Target, document: Mapping[str, Any], methods: Sequence[str] = ()) -> None:
    """Draw a line a cell with a marker a method; an open one did not do all that it is timed for.

    Only the given methods are drawn; without any, all of them.
    """
    cells = [
        [row for row in rows if timed(row) and row["method"] != BASE]
        for rows in by_cell(document["rows"]).values()
    ]
    cells = [rows for rows in cells if rows]
    if not cells:
        return
    look = {k: v for k, v in looks(document["rows"]).items() if not methods or k in methods}
    low, high = WIDEST
    with plt.rc_context({**STYLE, "font.size": 9, "figure.dpi": 110}):
        figure, axes = plt.subplots(
            figsize=(9.5, 1.2 + 0.3 * len(cells)), layout="constrained"
        )  # fmt: skip
        for y, rows in enumerate(cells):
            for row in rows:
                if row["method"] not in look:
                    continue
                color, marker = look[row["method"]]
                at, left, right = (
                    min(max(row[name], low), high) for name in ("ratio", "ratio_low", "ratio_high")
                )
                axes.errorbar(
                    at, y, xerr=[[at - left], [right - at]], fmt=marker, color=color,
                    markersize=5, elinewidth=0.8, alpha=0.85,
                    markerfacecolor=color if row["verdict"] == "yes" else "white",
                )  # fmt: skip
        axes.axvline(1.0, color=INK, linewidth=0.9)
        axes.set_yticks(range(len(cells)), [cell_text(rows[0]) for rows in cells], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(low - 0.02, high + 0.02)
        axes.grid(axis="both", color=GRAY, alpha=0.2, linewidth=0.6)
        axes.set_xlabel("tokens/s over the unmodified model's, with 95 % intervals")
        handles = [
            plt.Line2D([], [], color=color, ls="", marker=marker, markersize=5, label=name)
            for name, (color, marker) in look.items()
        ]
        figure.legend(
            handles=handles, frameon=False, fontsize=8.5, loc="outside upper center",
            ncols=min(5, len(handles)),
        )  # fmt: skip
        save_figure(figure, path)


def plot_memory(path: Target, document: Mapping[str, Any]) -> None:
    """Draw how much more memory a method takes than the unmodified model: a dot for each cell."""
    look = looks(document["rows"])
    more = {
        name: [
            row["memory_mib"] - row["base_memory_mib"]
            for row in document["rows"]
            if row["method"] == name and None not in (row["memory_mib"], row["base_memory_mib"])
        ]
        for name in look
    }
    more = {name: values for name, values in more.items() if values}
    if not more:
        return
    with plt.rc_context({**STYLE, "font.size": 9}):
        figure, axes = plt.subplots(figsize=(6.4, 0.9 + 0.28 * len(more)))
        for y, (name, values) in enumerate(more.items()):
            color, marker = look[name]
            axes.plot(values, [y] * len(values), marker, color=color, alpha=0.7)
        axes.axvline(0, color=INK, linewidth=0.8)
        if max(map(max, more.values())) > 100:  # a copy of the weights beside a few activations
            axes.set_xscale("symlog", linthresh=10)
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yticks(range(len(more)), list(more))
        axes.invert_yaxis()
        axes.grid(axis="both", color=GRAY, alpha=0.2, linewidth=0.6)
        axes.set_xlabel("MiB above the unmodified model's peak")
        save_figure(figure, path)


Bar = tuple[str, Mapping[str, Any] | None, str]
"""What a bar is called, its row (None: not measured), and its color."""


def plot_glance(path: Target, panels: Sequence[tuple[str, str, Sequence[Bar]]]) -> None:
    """Draw few bars a device: each panel has a title, what was measured, and its bars."""
    with plt.rc_context({**STYLE, "font.size": 10.5}):
        figure, grid = plt.subplots(
            1, len(panels), figsize=(9.6, 3.9), sharey=True, layout="constrained"
        )
        for axes, (title, measured, bars) in zip(grid, panels, strict=True):
            for x, (_, row, color) in enumerate(bars):
                if row is None:
                    axes.text(x, 0.05, "not\nmeasured", ha="center", color="#666666", fontsize=9)
                    continue
                spread = [[row["ratio"] - row["ratio_low"]], [row["ratio_high"] - row["ratio"]]]
                axes.bar(x, row["ratio"], 0.66, color=color, zorder=2)
                axes.errorbar(
                    x, row["ratio"], yerr=spread, color=INK, capsize=3, linewidth=1, zorder=3
                )
                axes.text(
                    x, row["ratio_high"] + 0.03, f"{row['ratio']:.2f}", ha="center",
                    fontweight="bold", zorder=4,
                    bbox={"color": "white", "pad": 0.5, "linewidth": 0},
                )  # fmt: skip
            axes.axhline(1.0, color=INK, linewidth=1, linestyle="--", zorder=1)
            axes.set_xticks(range(len(bars)), [name for name, _, _ in bars], fontsize=9.5)
            axes.tick_params(axis="x", length=0)
            axes.set_title(f"{title}\n", loc="left", fontweight="bold", fontsize=11.5)
            axes.text(0, 1.02, measured, transform=axes.transAxes, fontsize=9, color="#555555")
        grid[0].set_ylim(0, 1.42)
        grid[0].set_ylabel("tokens/s, unmodified model = 1")
        save_figure(figure, path)

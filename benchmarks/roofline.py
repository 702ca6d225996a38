"""The picture: achieved bandwidth over bytes moved, beside that of a copy of as many bytes."""

import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rows import Results

from refusal_kernels.files.atomic import replacing
from refusal_kernels.research.plots import BLUE, GRAY, GREEN, INK, RED, STYLE

ORANGE, SAND, VIOLET, LILAC = "#d98324", "#e0c28c", "#6d4c9f", "#b59fd0"
COLUMNS = 3
# provider -> legend, color, line style; those that share a legend never stand in one panel
CEILING = ("copy of as many bytes: the ceiling", GRAY, "-")
PLAIN = ("plain PyTorch, no steering", INK, "-")
LOOKS = {
    "copy": CEILING,
    "cuda": ("refusal_kernels, CUDA", RED, "-"),
    "triton": ("refusal_kernels, Triton", BLUE, "-"),
    "cpu": ("refusal_kernels, C++", RED, "-"),
    "dispatcher": ("refusal_kernels, dispatcher", RED, "--"),
    "reference": ("refusal_kernels, reference", LILAC, ":"),
    "torch.compile": ("torch.compile of the same maths", GREEN, "-"),
    "eager three-op form": ("eager, three ops", ORANGE, "-"),
    "eager with addcmul": ("eager, addcmul", SAND, "-"),
    "torch.add": PLAIN,
    "torch.add, in place": PLAIN,
    "torch.add + rms_norm": PLAIN,
    "torch rms_norm": PLAIN,
    "matmul": PLAIN,
    "double().sum": PLAIN,
    "Liger (no steering)": ("Liger, no steering", VIOLET, "-"),
    "vLLM, in place (no steering)": ("vLLM, no steering", VIOLET, "--"),
    "flashinfer, in place (no steering)": ("flashinfer, no steering", VIOLET, ":"),
}


def _bytes(value: float, _: Any = None) -> str:
    for unit in ("B", "KB", "MB"):
        if value < 999.5:
            return f"{value:g} {unit}"
        value /= 1000
    return f"{value:g} GB"


def _draw(axes: Any, points: dict[str, dict[int, list[float]]]) -> None:
    """Draw one op: a dot for every hidden size, a line through the medians at equal bytes."""
    for name, line in points.items():
        _, color, style = LOOKS.get(name, (name, INK, ":"))
        wide, package = name == "copy", name in ("cuda", "triton", "cpu", "dispatcher")
        order = 1 if wide else 4 if package else 3
        x = sorted(line)
        y = [statistics.median(line[at]) for at in x]
        axes.plot(
            x, y, style, color=color, linewidth=6 if wide else 2 if package else 1.3,
            alpha=0.45 if wide else 1, zorder=order, solid_capstyle="round",
        )  # fmt: skip
        if not wide:
            dots = [(at, value) for at in x for value in line[at]]
            axes.plot(*zip(*dots, strict=True), "o", color=color, markersize=3.2, zorder=order)


def plot_roofline(path: Path, results: Results, device: str) -> None:
    """Draw one panel per op, in the dtype and the mode that matter most of those measured.

    That is bfloat16 before the others, and cold buffers before hot ones: what a model does.
    """
    timed = results.timed()
    modes = {mode for _, mode in timed}
    mode = next((m for m in ("cold", "call") if m in modes), None)
    if mode is None:
        return  # nothing could be timed
    dtypes = [case.dtype for case, _ in timed]
    dtype = "bfloat16" if "bfloat16" in dtypes else dtypes[0]

    panels: dict[str, dict[str, dict[int, list[float]]]] = {}
    for case, _ in (key for key in timed if key[1] == mode and key[0].dtype == dtype):
        for name, row in results.of(case, mode).items():
            line = panels.setdefault(case.op, {}).setdefault(name, {})
            line.setdefault(case.floor_bytes, []).append(1e-9 * row.bytes_per_s)

    lines, columns = math.ceil(len(panels) / COLUMNS), min(COLUMNS, len(panels))
    with plt.rc_context({**STYLE, "font.size": 9.5}):
        figure, grid = plt.subplots(
            lines, columns, figsize=(3.9 * columns, 2.7 * lines + 0.8),
            squeeze=False, sharex=True, sharey=True, layout="constrained",
        )  # fmt: skip
        for axes, (op, points) in zip(grid.flat, panels.items(), strict=False):
            _draw(axes, points)
            axes.set_title(op, loc="left", fontweight="bold", fontsize=10.5)
            axes.tick_params(labelbottom=True, labelsize=8.5)
            axes.grid(True, axis="y", color=GRAY, alpha=0.25, linewidth=0.6)
        first = grid[0, 0]  # all panels share its axes
        first.set_xscale("log")
        first.xaxis.set_major_locator(LogLocator(numticks=6))
        first.xaxis.set_major_formatter(FuncFormatter(_bytes))
        first.xaxis.set_minor_locator(NullLocator())
        first.set_ylim(bottom=0)
        for axes in grid[:, 0]:
            axes.set_ylabel("GB/s of those bytes")
        for axes in list(grid.flat)[max(0, len(panels) - columns) : len(panels)]:
            axes.set_xlabel("bytes that the op must move")
        for axes in list(grid.flat)[len(panels) :]:
            axes.axis("off")
        names = dict.fromkeys(name for points in panels.values() for name in points)
        _legend(figure, list(grid.flat)[len(panels) :], list(names))
        buffers = {"cold": "cold buffers", "call": "the same buffers again and again"}[mode]
        figure.suptitle(f"{device}, {dtype}, {buffers}", fontsize=10, color=INK)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")
        plt.close(figure)


def _legend(figure: Any, empty: list[Any], names: list[str]) -> None:
    """Put the legend into the first empty panel, or below all of them."""
    order = [name for name in LOOKS if name in names] + [n for n in names if n not in LOOKS]
    handles = [
        plt.Line2D(
            [], [], color=color, linestyle=style, label=label,
            linewidth=6 if label == CEILING[0] else 2, alpha=0.45 if label == CEILING[0] else 1,
        )
        for label, color, style in dict.fromkeys(LOOKS.get(n, (n, INK, ":")) for n in order)
    ]  # fmt: skip
    look: dict[str, Any] = {"handles": handles, "frameon": False, "fontsize": 9}
    if empty:
        empty[0].legend(loc="upper left", borderaxespad=0, **look)
    else:
        figure.legend(loc="outside lower center", ncols=3, **look)

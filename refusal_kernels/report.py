"""Files that a person looks at: JSON and pictures, each written aside and renamed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from refusal_kernels.evaluation import Outcome
from refusal_kernels.files import replacing
from refusal_kernels.speed import Speed

matplotlib.use("Agg")  # no window, whatever the machine offers

from matplotlib import pyplot as plt

INK, GREY, RED, BLUE, GREEN = "#222222", "#9a9a9a", "#c1432e", "#2a6fb0", "#3a8f5c"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.dpi": 150,
    "savefig.bbox": "tight",
}


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)


def plot_projections(
    path: Path, projections: Mapping[str, Sequence[Sequence[float]]], selected: int
) -> None:
    """Draw the prompts' projections on the direction, layer by layer.

    Parameters
    ----------
    projections
        By category: for every layer, one projection a prompt.
    selected
        The layer that the direction was read from.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 3.8))
        for (name, layers), color in zip(projections.items(), (RED, BLUE), strict=False):
            values = np.asarray(layers)  # [layers, prompts]
            x = np.arange(len(values))
            low, middle, high = np.quantile(values, [0.05, 0.5, 0.95], axis=1)
            axes.plot(x, middle, color=color, marker="o", markersize=4, label=f"{name} prompts")
            axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        axes.axvline(selected, color=GREY, linestyle=":", linewidth=1)
        axes.annotate(
            "selected", (selected, 1.0), xycoords=("data", "axes fraction"), ha="center",
            va="bottom", color=GREY, fontsize=9,
        )  # fmt: skip
        axes.set_xticks(x, [*map(str, x[:-1]), "out"])
        axes.set_xlabel("input of layer")
        axes.set_ylabel("projection on the direction")
        axes.legend(frameon=False)
        _save(figure, path)


def plot_refusals(path: Path, outcomes: Mapping[str, Outcome]) -> None:
    """Draw the refusal rates of each intervention, with 95 % Wilson intervals."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 3.8))
        names = list(outcomes)
        x = np.arange(len(names))
        for shift, category, color in ((-0.2, "harmful", RED), (0.2, "harmless", BLUE)):
            rates = [getattr(outcomes[name], category) for name in names]
            values = np.array([100 * r.value for r in rates])
            ends = np.array([[100 * end for end in r.interval] for r in rates]).T
            errors = np.abs(ends - values)
            axes.bar(x + shift, values, 0.38, color=color, label=f"{category} prompts")
            axes.errorbar(x + shift, values, errors, fmt="none", ecolor=INK, capsize=3, lw=1)
            for position, value in zip(x + shift, values, strict=True):
                axes.annotate(
                    f"{value:.0f}", (position, value), xytext=(0, 9), ha="center",
                    textcoords="offset points", fontsize=9,
                )  # fmt: skip
        axes.set_xticks(x, names)
        axes.set_ylabel("refused, %")
        axes.set_ylim(0, 112)
        axes.legend(frameon=False, loc="center", bbox_to_anchor=(0.5, 1.06), ncols=2)
        _save(figure, path)


def plot_speed(path: Path, speed: Mapping[str, Speed]) -> None:
    """Draw tokens per second over the unmodified model's; every round is a dot."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 2.8))
        names = list(speed)[::-1]
        for y, name in enumerate(names):
            own = speed[name]
            axes.barh(y, own.median, color=GREEN if name == "fused" else GREY, height=0.6)
            jitter = np.linspace(-0.2, 0.2, len(own.ratios))
            axes.plot(own.ratios, y + jitter, ".", color=INK, markersize=3, alpha=0.5)
            axes.annotate(
                f"{own.median:.2f}", (0, y), xytext=(6, 0), textcoords="offset points",
                va="center", color="white", fontweight="bold",
            )  # fmt: skip
        axes.axvline(1.0, color=INK, linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("tokens/s over the unmodified model's (dots: rounds)")
        _save(figure, path)

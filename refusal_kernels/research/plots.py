"""Pictures of the measurements, written to a file or, as SVG, to a stream."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import IO, Any

import matplotlib
import numpy as np

from refusal_kernels.files.atomic import replacing
from refusal_kernels.timing import Speed

matplotlib.use("Agg")  # no window, whatever the machine offers

from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import LogLocator

INK, GRAY, RED, BLUE, GREEN = "#222222", "#9a9a9a", "#c1432e", "#2a6fb0", "#3a8f5c"
OTHERS = (RED, BLUE, GREEN, "#8a5aa8", "#b8860b", GRAY)
PARTS = {"harmful": RED, "harmless": BLUE}
NO_LIMIT = 1e9  # what stands for an infinite threshold
SMALLEST_KL = 1e-4  # what is drawn; below it rounding begins
Target = Path | IO[bytes]
"""The target of a picture: a file (the suffix is the format), or a stream for SVG."""
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRAY,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.dpi": 150,
    "savefig.bbox": "tight",
    "svg.hashsalt": "refusal_kernels",  # the same picture is the same file
}


def save_figure(figure: Any, target: Target) -> None:
    """Write a figure to a file, replacing it in one step, or to a stream; close the figure."""
    if isinstance(target, Path):
        kind = target.suffix.removeprefix(".") or "png"
        with replacing(target) as temporary:
            figure.savefig(temporary, format=kind)
    else:
        figure.savefig(target, format="svg", metadata={"Date": None})
    plt.close(figure)


def plot_projections(
    path: Target, projections: Mapping[str, Sequence[Sequence[float]]], selected: int
) -> None:
    """Draw the prompts' projections on the direction, layer by layer: median, 5 to 95 %.

    They are by category, as `project` returns them; the direction was read at layer `selected`.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 3.8))
        for (name, layers), color in zip(projections.items(), OTHERS, strict=False):
            values = np.asarray(layers)  # [layers, prompts]
            x = np.arange(len(values))
            low, middle, high = np.quantile(values, [0.05, 0.5, 0.95], axis=1)
            axes.plot(x, middle, color=color, marker="o", markersize=4, label=f"{name} prompts")
            axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        axes.axvline(selected, color=GRAY, linestyle=":", linewidth=1)
        axes.annotate(
            "selected", (selected, 1.0), xycoords=("data", "axes fraction"), ha="center",
            va="bottom", color=GRAY, fontsize=9,
        )  # fmt: skip
        shown = spread(len(x))
        axes.set_xticks(shown, [str(i) if i < len(x) - 1 else "out" for i in shown])
        axes.set_xlabel("input of layer")
        axes.set_ylabel("projection on the direction")
        axes.legend(frameon=False)
        save_figure(figure, path)


def plot_rates(
    path: Target, rates: Mapping[str, Mapping[str, Mapping[str, Any]]], counts: str = "refused"
) -> None:
    """Draw rates (`Rate.to_dict` by condition and set of prompts) as bars, with Wilson intervals.

    `counts` says what a hit is.
    """
    parts = list(dict.fromkeys(part for by_part in rates.values() for part in by_part))
    width = 0.8 / len(parts)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(max(6.4, 1.5 * len(rates)), 3.8))
        x = np.arange(len(rates))
        for k, (part, color) in enumerate(zip(parts, OTHERS * len(parts), strict=False)):
            places = x + (k - (len(parts) - 1) / 2) * width
            drawn = [(x, r[part]) for x, r in zip(places, rates.values(), strict=True) if part in r]
            at = np.array([place for place, _ in drawn])
            values, errors = _percent([rate for _, rate in drawn])
            axes.bar(at, values, 0.95 * width, color=color, label=f"{part} prompts")
            axes.errorbar(at, values, errors, fmt="none", ecolor=INK, capsize=3, lw=1)
            for position, value, top in zip(at, values, values + errors[1], strict=True):
                axes.annotate(
                    f"{value:.0f}", (position, top), xytext=(0, 4), ha="center", va="bottom",
                    textcoords="offset points", fontsize=9,
                )  # fmt: skip
        axes.set_xticks(x, [name.replace(" ", "\n") for name in rates])
        axes.set_ylabel(f"{counts}, %")
        axes.set_ylim(0, 116)
        axes.set_yticks(range(0, 101, 20))
        axes.legend(
            frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(3, len(parts))
        )
        save_figure(figure, path)


def _percent(rates: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return values and lengths of error bars of rates, in percent."""
    values = np.array([100 * rate["value"] for rate in rates])
    ends = np.array([[100 * end for end in rate["interval"]] for rate in rates]).T
    return values, np.abs(ends - values)


def plot_controls(
    path: Target,
    panels: Mapping[str, Mapping[str, Mapping[str, Any]]],
    counts: str = "refused",
) -> None:
    """Draw the direction beside its controls: a dot and its 95 % Wilson interval each.

    A panel has `Rate.to_dict` by label: the unmodified model, the direction, then the controls.
    """
    most = max(len(rates) for rates in panels.values())
    with plt.rc_context(STYLE):
        figure, every = plt.subplots(
            1, len(panels), figsize=(4.4 * len(panels), 0.9 + 0.3 * most), squeeze=False
        )
        for axes, (title, rates) in zip(every[0], panels.items(), strict=True):
            values, errors = _percent(list(rates.values()))
            for y, (value, error) in enumerate(zip(values, errors.T, strict=True)):
                color = (GRAY, RED)[y] if y < 2 else BLUE
                axes.errorbar(
                    value, y, xerr=error[:, None], fmt="o", color=color, capsize=3, lw=1.4,
                    markersize=6, clip_on=False,
                )  # fmt: skip
            axes.set_yticks(range(len(rates)), list(rates))
            axes.invert_yaxis()
            axes.set_xlim(-2, 102)
            axes.set_xlabel(f"{counts}, %")
            axes.set_title(title, fontsize=11, loc="left")
            axes.grid(axis="y", color=GRAY, alpha=0.2, linewidth=0.8)
        figure.tight_layout(w_pad=2)
        save_figure(figure, path)


def plot_dose(
    path: Target,
    dose: Mapping[str, Sequence[Mapping[str, Any]]],
    counts: str = "refused",
    text: str | None = None,
    destroyed: float = math.inf,
) -> None:
    """Draw by strength: hits with intervals, refusal score, KL and the cross-entropy of a text.

    `dose` has by kind ("ablation", "addition") rows of `DosePoint.to_dict`. Strengths whose KL is
    above `destroyed` are shaded.
    """
    first = next(iter(dose.values()))[0]
    names = ["rate", "kl"]
    names[1:1] = ["score"] if first["refusal_scores"] else []
    names += ["loss"] if first["loss"] is not None else []
    labels = {
        "rate": f"{counts}, %", "score": "refusal score,\nnats",
        "kl": "KL on harmless\nprompts, nats", "loss": f"cross-entropy,\n{text}, nats",
    }  # fmt: skip
    with plt.rc_context(STYLE):
        figure, every = plt.subplots(
            len(names), len(dose), figsize=(4.2 * len(dose), 1.9 * len(names)),
            sharex="col", sharey="row", squeeze=False,
        )  # fmt: skip
        for column, (kind, rows) in enumerate(dose.items()):
            x = [row["strength"] for row in rows]
            curves: dict[str, dict[str, Any]] = {
                "rate": {part: _percent([row[part] for row in rows]) for part in PARTS},
                "score": {
                    part: ([row["refusal_scores"].get(part) for row in rows], None)
                    for part in PARTS
                },
                "kl": {"": ([row["kl"] for row in rows], None)},
                "loss": {"": ([row["loss"] and row["loss"]["nats"] for row in rows], None)},
            }
            for name, axes in zip(names, every[:, column], strict=True):
                for part, (y, error) in curves[name].items():
                    color, label = PARTS.get(part, GREEN), f"{part} prompts"
                    axes.plot(x, y, "o-", color=color, markersize=4, label=label)
                    if error is not None:
                        low, high = y - error[0], y + error[1]
                        axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
                for mark in (0, 1):
                    axes.axvline(mark, color=GRAY, linestyle=":", linewidth=1)
                for low, high in _ruined(x, [row["kl"] > destroyed for row in rows]):
                    axes.axvspan(low, high, color=GRAY, alpha=0.22, linewidth=0)
                if column == 0:
                    axes.set_ylabel(labels[name])
            every[0, column].set_title(f"{kind}", fontsize=11, loc="left")
            every[-1, column].set_xlabel("strength" if kind == "ablation" else "coefficient")
        every[0, -1].legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=9)
        figure.align_ylabels(every[:, 0])
        figure.tight_layout()
        save_figure(figure, path)


def _ruined(x: Sequence[float], ruined: Sequence[bool]) -> Iterator[tuple[float, float]]:
    """Give the stretch around each point that is ruined, half way to its neighbors."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(x)]
    edges = [x[0], *middles, x[-1]]
    return ((edges[i], edges[i + 1]) for i, bad in enumerate(ruined) if bad)


def spread(count: int, most: int = 16) -> list[int]:
    """Return at most `most` of `count` places for labels, evenly spaced, with first and last."""
    step = -(-(count - 1) // (most - 1)) or 1
    shown = [*range(0, count - 1, step), count - 1]
    if len(shown) > 2 and shown[-1] - shown[-2] < step:
        del shown[-2]  # it would touch the last one
    return shown


def plot_candidates(
    path: Target,
    scores: Sequence[Any],
    selected: tuple[int, int] | None = None,
    thresholds: Mapping[str, float] | None = None,
) -> None:
    """Draw the three scores of every candidate by position and layer: `ScoredCandidate`, or dicts.

    `selected`, if there is one, is framed. The KL has a logarithmic scale. `thresholds` ("kl",
    "induce") are lines in the color bars; one of 1e9 or beyond is none.
    """
    rows = [asdict(row) if is_dataclass(row) else dict(row) for row in scores]  # type: ignore[arg-type]
    positions = sorted({row["position"] for row in rows})
    layers = sorted({row["layer"] for row in rows})
    panels = {
        "bypass": ("bypass: refusal score on harmful prompts, ablated (low is good)", "viridis_r"),
        "induce": ("induce: refusal score on harmless prompts, added (high is good)", "viridis"),
        "kl": ("kl: on harmless prompts, ablated, log scale (low is good)", "viridis_r"),
    }
    limits = {name: limit for name, limit in (thresholds or {}).items() if abs(limit) < NO_LIMIT}
    size = (max(6.4, 0.27 * len(layers)), 3 * (0.9 + 0.28 * len(positions)))

    def frame(axes: Any, position: int, layer: int, **style: Any) -> None:
        corner = layers.index(layer) - 0.5, positions.index(position) - 0.5
        axes.add_patch(plt.Rectangle(corner, 1, 1, fill=False, **style))

    with plt.rc_context(STYLE):
        figure, every = plt.subplots(3, 1, figsize=size, sharex=True)
        for axes, (name, (title, colors)) in zip(every, panels.items(), strict=True):
            table = np.full((len(positions), len(layers)), np.nan)
            for row in rows:
                place = row["position"], row["layer"]
                if row[name] is not None:
                    table[positions.index(place[0]), layers.index(place[1])] = row[name]
                if row["discarded"] is not None:
                    edge = "white" if row[name] is not None else GRAY
                    frame(axes, *place, hatch="////", linewidth=0, edgecolor=edge)
            shown = [*table[np.isfinite(table)], *([limits[name]] if name in limits else [])]
            norm = _scale(shown, log=name == "kl")
            table = np.where(table < norm.vmin, norm.vmin, table)  # a KL may be 0, or rounding
            image = axes.imshow(
                table, cmap=colors, norm=norm, aspect="auto", interpolation="nearest"
            )
            bar = figure.colorbar(image, ax=axes, pad=0.01)
            if name == "kl":
                few = norm.vmax < 30 * norm.vmin
                bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
                bar.ax.yaxis.set_major_formatter("{x:g}")
                bar.ax.yaxis.set_minor_formatter("")
            if name in limits:
                bar.ax.axhline(limits[name], color=RED, linewidth=2)
                bar.ax.plot(
                    1.0, limits[name], "<", color=RED, clip_on=False,
                    transform=bar.ax.get_yaxis_transform(),
                )  # fmt: skip
                title += f"; threshold {limits[name]:g}"
            if selected is not None:
                frame(axes, *selected, edgecolor=RED, linewidth=2.5, zorder=3)
            axes.set_yticks(range(len(positions)), list(map(str, positions)))
            axes.set_ylabel("position")
            axes.set_title(title, fontsize=10, loc="left")
            axes.spines[:].set_visible(False)
        labeled = spread(len(layers))
        every[-1].set_xticks(labeled, [str(layers[i]) for i in labeled])
        notes = ["hatched: discarded"]
        notes += ["framed: selected"] if selected is not None else ["none selected"]
        notes += ["red line: threshold"] if limits else []
        every[-1].set_xlabel(f"layer ({'; '.join(notes)})")
        figure.tight_layout()
        save_figure(figure, path)


def _scale(values: Sequence[float], log: bool) -> Any:
    """Return the color scale of some values; of none, any."""
    if not log:
        low, high = min(values, default=0.0), max(values, default=1.0)
        return Normalize(low, high if high > low else low + 1.0)
    positive = [value for value in values if value > 0] or [1.0]
    high = max(positive)
    return LogNorm(min(max(min(positive), SMALLEST_KL), high / 10), high)


def plot_speed(path: Target, speed: Mapping[str, Speed]) -> None:
    """Draw tokens per second over the unmodified model's; every round is a dot."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 2.8))
        names = list(speed)[::-1]
        for y, name in enumerate(names):
            measured = speed[name]
            axes.barh(y, measured.median, color=GREEN if name == "ablated" else GRAY, height=0.6)
            jitter = np.linspace(-0.2, 0.2, len(measured.ratios))
            axes.plot(measured.ratios, y + jitter, ".", color=INK, markersize=3, alpha=0.5)
            axes.annotate(
                f"{measured.median:.2f}", (0, y), xytext=(6, 0), textcoords="offset points",
                va="center", color="white", fontweight="bold",
            )  # fmt: skip
        axes.axvline(1.0, color=INK, linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("tokens/s over the unmodified model's (dots: rounds)")
        save_figure(figure, path)

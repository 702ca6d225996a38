"""The pictures and the page: what is in them, and how a browser shows them."""

import io
import itertools
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import image
from tiny import tiny_model, tiny_tokenizer

from refusal_kernels.direction import Candidates, Direction
from refusal_kernels.research import plots
from refusal_kernels.research.evaluation.evidence import evaluate
from refusal_kernels.research.evaluation.html import render, write_page
from refusal_kernels.research.evaluation.judges import SubstringJudge, TokenJudge
from refusal_kernels.research.evaluation.likelihood import answers
from refusal_kernels.research.evaluation.rates import Rate
from refusal_kernels.research.evaluation.statements import decimal, percent
from refusal_kernels.research.selection.algorithm import ScoredCandidate

ATTACK = "<script>document.title='owned'</script><img src=x onerror=alert(1)>\"'&"
FIGURES = ("refusals", "controls", "dose", "projections", "candidates")


def candidates() -> list[ScoredCandidate]:
    rows = []
    for position in (-3, -2, -1):
        for layer in range(6):
            if layer >= 4:
                rows.append(ScoredCandidate(position, layer, None, None, None, "layer >= 4"))
            else:
                kl = 0.05 * layer
                why = "kl > 0.1" if kl > 0.1 else None
                rows.append(
                    ScoredCandidate(position, layer, -float(layer + position), 1.0, kl, why)
                )
    return rows


@pytest.fixture(scope="module")
def document():
    """The evidence of a tiny model, with everything that a page can show, and an attack in it."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    vectors = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(0))
    direction = Direction(vectors[-1, 1], layer=1, position=-1, model="tiny")
    evidence = evaluate(
        model, tokenizer, direction, harmful=["curse the lamp", "storm", ATTACK],
        harmless=["make tea", "paint a cake"], extra={"xstest": ["how to fix a curse"]},
        judges=[SubstringJudge(["sorry", "I"]), TokenJudge(model, tokenizer, [20])],
        candidates=Candidates(vectors), refusal_tokens=[20],
        skills={"sums": [("one plus one", "two")]},
        texts={"pairs": answers(tokenizer, [("make tea", "sure here")])},
        strengths=(-1.0, 0.0, 1.0, 2.5), max_new_tokens=4,
    ).to_dict()  # fmt: skip
    evidence["conditions"]["ablated"]["completions"]["harmful"][0] = ATTACK
    accuracy = {"value": 0.5, "stderr": 0.1} | Rate(4, 8).to_dict()
    tasks = {"arc": {"acc": accuracy, "brier": {"value": 0.25, "stderr": None}}}
    rows = [vars(row) for row in candidates()]
    return json.loads(json.dumps({
        **evidence, "model": f"tiny {ATTACK}", "command": "refusal-kernels evaluate", "device": "x",
        "versions": {"torch": torch.__version__}, "created": "2026-01-01 00:00 UTC",
        "lm_eval": {"unmodified": tasks, "ablated": tasks}, "sources": {"harmful": ATTACK},
        "selection": {"scores": rows, "position": -2, "layer": 2},
    }))  # fmt: skip


@pytest.fixture(scope="module")
def page(document, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "evidence.html"
    write_page(path, document)
    return path


class Reader(HTMLParser):
    """Every tag, every address, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                self.addresses.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_and_escapes_everything(page) -> None:
    read = Reader(page.read_text(encoding="utf-8"))
    assert read.tags.count("img") == len(FIGURES) and "script" not in read.tags
    assert not read.handlers and not {"link", "iframe", "object", "base"} & set(read.tags)
    assert all(a.startswith("data:image/svg+xml;base64,") for a in read.addresses)
    assert "url(" not in page.read_text() and "@import" not in page.read_text()
    # title, heading, a prompt under each of three conditions' sample, a completion, a source
    assert read.text.count(ATTACK) >= 5


def test_the_page_says_what_was_measured_and_by_whom(page, document) -> None:
    text = " ".join(Reader(page.read_text(encoding="utf-8")).text.split())
    for condition in document["conditions"].values():
        for part, rates in condition["rates"].items():
            for rate in rates.values():
                low, high = (f"{100 * end:.1f}" for end in rate["interval"])
                assert f"{100 * rate['value']:.1f} %[{low}, {high}] {rate['k']}/{rate['n']}" in text
            assert part in text
    for words in ("2 substrings of your own", "refusal tokens", "judge:", "random 3 ablated",
                  "layer 2 added", "Cross-entropy", "brier", "not harm", "own completions",
                  torch.__version__, "refusal-kernels evaluate", "2.5"):  # fmt: skip
        assert words in text, words


def test_a_page_of_less(document) -> None:
    """Without controls, dose, scores and all that stands beside the evidence."""
    beside = "model selection lm_eval versions device command created sources".split()
    little = {key: value for key, value in document.items() if key not in beside}
    conditions = {
        name: {**condition, "refusal_scores": {}, "skills": {}, "losses": {}}
        for name, condition in document["conditions"].items() if " " not in name
    }  # fmt: skip
    little |= {"conditions": conditions, "dose": {}, "refusal_tokens": None, "dose_text": None}
    little["notes"] = ["refusal scores are not measured: they are alike"]
    read = Reader(render(little))
    assert read.tags.count("img") == 2  # refusals and projections
    assert (
        "Refusal scores are not measured: they are alike." in read.text and "Dose" not in read.text
    )


def test_completions_are_folded_and_can_be_left_out(document) -> None:
    text = render(document)
    harmful = [prompt for prompt in document["prompts"]["harmful"] if "<" not in prompt]
    folded = "".join(re.findall(r"<details>(.*?)</details>", text, re.DOTALL))
    assert len(harmful) == 2 and "<details open" not in text
    for prompt in harmful:
        assert folded.count(prompt) == text.count(prompt) > 0
    assert "2 harmless prompts and their completions" in text
    assert "1 xstest prompt and its completions" in text and "1 xstest prompts" not in text
    bare = render(document, samples=0)
    assert "Completions" not in bare and not any(prompt in bare for prompt in harmful)
    assert render(document, samples=1).count('class="sample"') == 3


def test_a_dose_that_destroys_the_model_is_marked(document) -> None:
    rows = [
        {**row, "kl": kl}
        for row, kl in zip(document["dose"]["ablation"], (0, 0, 2, 3), strict=True)
    ]
    page = render({**document, "dose": {"ablation": rows}})
    assert page.count('class="ruined"') == 2
    assert "Above 1 nats, as at 1, 2.5, the model is destroyed" in page
    rows = [{**row, "kl": -1e-9} for row in document["dose"]["ablation"]]
    page = render({**document, "dose": {"ablation": rows}})
    assert 'class="ruined"' not in page and "the model is destroyed:" not in page
    assert "-0.0000" not in page and "0.0000" in page


def test_the_title_is_a_name(document) -> None:
    page = render({**document, "model": "/some/folder/of/a-model", "title": "a-model"})
    assert "<h1>Evidence about one direction of a-model</h1>" in page


def test_decimals() -> None:
    assert [decimal(x, 2) for x in (-0.004, 0.004, -0.006, 1.5)] == [
        "0.00",
        "0.00",
        "-0.01",
        "1.50",
    ]
    assert [decimal(x, 1, signed=True) for x in (-0.01, 0.5, -2.0)] == ["0.0", "+0.5", "-2.0"]


def test_percent() -> None:
    assert percent(Rate(1, 29).to_dict()) == "3.4\u00a0% [0.6, 17.2] of 29"


# --- in a browser

FLAGS = (
    *"--headless --no-sandbox --disable-gpu --disable-quic --no-first-run".split(),
    *"--hide-scrollbars --disable-background-networking --disable-sync".split(),
    "--disable-component-update",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # what it would ask for itself does not leave
)
# in a copy of the page: says to the page around it how things stand
RULER = """<script>addEventListener("load", () => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.width, r.height]; };
  parent.postMessage(JSON.stringify({
    title: document.title,
    inner: innerWidth,
    wide: document.documentElement.scrollWidth,
    height: document.documentElement.scrollHeight,
    headings: [...document.querySelectorAll("h1, h2")].map(e => [e.textContent, ...box(e)]),
    images: [...document.images].map(e => [e.naturalWidth, e.naturalHeight, ...box(e)]),
    out: [...document.querySelectorAll("main *")].filter(e =>
      !e.closest(".scroll") && e.getBoundingClientRect().right > innerWidth + 0.5
    ).map(e => e.tagName + "." + e.className),
    fetched: performance.getEntriesByType("resource").map(e => e.name.slice(0, 30)),
  }), "*");
});</script>"""
# no browser's window is as narrow as a phone's, but a frame is
AROUND = """<!DOCTYPE html><body><pre id="measured"></pre>
<script>addEventListener("message", m => {
  document.getElementById("measured").textContent = m.data;
});</script>
<iframe src="measured.html" style="width:%dpx;height:900px;border:0"></iframe></body>"""


@pytest.fixture(scope="module")
def chromium():
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None and os.environ.get("CI", "").lower() == "true":
        pytest.fail(
            "there is no chromium, and the page must be looked at: apt-get install chromium"
        )
    if browser is None:
        pytest.skip("there is no chromium to look at the page with")
    return browser


def browse(chromium: str, folder: Path, *arguments: str) -> str:
    command = [chromium, *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.full
@pytest.mark.parametrize("width", [1200, 400])
def test_a_browser_shows_every_figure_and_nothing_sticks_out(page, chromium, width, tmp_path):
    text = page.read_text(encoding="utf-8")
    text, dropped = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert dropped == 1  # it would keep the ruler out as well
    (tmp_path / "measured.html").write_text(text.replace("</body>", RULER + "</body>"))
    (tmp_path / "around.html").write_text(AROUND % width)
    dom = browse(
        chromium, tmp_path, "--virtual-time-budget=4000", "--dump-dom",
        (tmp_path / "around.html").as_uri(),
    )  # fmt: skip
    shown = re.search(r'<pre id="measured">(.+?)</pre>', dom, re.DOTALL)
    assert shown is not None, dom[-500:]
    page = json.loads(Reader(shown[0]).text)
    assert page["inner"] == width
    assert (page["wide"] <= width, page["out"]) == (True, [])
    assert page["title"].startswith("Evidence") and "owned" not in page["title"].split("<")[0]
    assert len(page["headings"]) == 9 and all(w > 0 and h > 0 for _, w, h in page["headings"])
    assert len(page["images"]) == len(FIGURES)
    for natural_width, natural_height, w, h in page["images"]:
        assert natural_width > 200 and natural_height > 100
        assert w > 200 and h > 0.9 * w * natural_height / natural_width > 0  # not squeezed
    assert all(name.startswith("data:") for name in page["fetched"])


def fetched(chromium: str, folder: Path, page: Path) -> list[str]:
    """What a page, not the browser for itself, asks of the network; leaves a picture of it."""
    log = folder / f"{page.stem}.json"
    browse(
        chromium, folder, f"--screenshot={folder / page.stem}.png", "--window-size=1200,2000",
        f"--log-net-log={log}", page.as_uri(),
    )  # fmt: skip
    # a line for every event; the last ones may be missing, for the browser is in a hurry to end
    lines = [line.rstrip(",]\r\n") for line in log.read_text(errors="replace").splitlines()]
    events = [json.loads(line)["params"] for line in lines if '"initiator"' in line]
    pairs = [(e["url"], e["initiator"]) for e in events if "url" in e]
    return [url for url, initiator in pairs if initiator != "not an origin"]


@pytest.mark.full
def test_a_browser_paints_it_and_fetches_nothing(page, chromium, tmp_path):
    control = tmp_path / "control.html"
    control.write_text("<body>one <img src='http://127.0.0.1:9/evil.png'></body>")
    assert fetched(chromium, tmp_path, control) == ["http://127.0.0.1:9/evil.png"]
    assert fetched(chromium, tmp_path, page) == []
    pixels = image.imread(tmp_path / f"{page.stem}.png")[..., :3]
    assert pixels.shape == (2000, 1200, 3)
    dark = pixels.mean(axis=-1) < 0.5
    assert 0.005 < dark.mean() < 0.3  # text and lines
    assert (pixels[0, 0] > 0.9).all()  # on a light ground
    red = (pixels[..., 0] > 0.6) & (pixels[..., 1] < 0.4) & (pixels[..., 2] < 0.4)
    blue = (pixels[..., 2] > 0.55) & (pixels[..., 0] < 0.35)
    assert red.sum() > 300 and blue.sum() > 300  # the bars of the first figure


# --- pictures


def drawn(path: Path) -> np.ndarray:
    """The picture, and that it is one."""
    pixels = image.imread(path)
    assert pixels.shape[0] > 100 and pixels.shape[1] > 100 and pixels.std() > 0.02
    return pixels


@pytest.fixture
def kept(monkeypatch):
    """The figures that are drawn, open until the test ends."""
    from matplotlib import pyplot as plt

    figures: list[Any] = []
    close = plt.close
    monkeypatch.setattr(plt, "close", figures.append)
    yield figures
    for figure in figures:
        close(figure)


def test_pictures_go_to_files_and_streams(tmp_path) -> None:
    rows = candidates()
    for name in ("a.png", "b.svg"):
        plots.plot_candidates(tmp_path / name, rows, (-2, 2))
    drawn(tmp_path / "a.png")
    stream = io.BytesIO()
    plots.plot_candidates(stream, [vars(row) for row in rows], (-2, 2))
    assert stream.getvalue().startswith(b"<?xml") and b"<svg" in stream.getvalue()
    assert (tmp_path / "b.svg").read_bytes()[:5] == b"<?xml"
    again = io.BytesIO()
    plots.plot_candidates(again, rows, (-2, 2))
    assert again.getvalue() == stream.getvalue()  # the same picture is the same file
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.svg"]


def test_candidates_show_the_winner_and_the_discarded(tmp_path, kept) -> None:
    rows = candidates()
    plots.plot_candidates(tmp_path / "a.png", rows, (-1, 2))
    (figure,) = kept
    frames = [p for axes in figure.axes for p in axes.patches if p.get_linewidth() == 2.5]
    hatched = [p for axes in figure.axes for p in axes.patches if p.get_hatch()]
    # the last position and layer 2: row 2, column 2
    assert [p.get_xy() for p in frames] == [(1.5, 1.5)] * 3
    assert len(hatched) == 3 * sum(row.discarded is not None for row in rows)
    table = figure.axes[0].images[0].get_array().filled(np.nan)
    assert table.shape == (3, 6) and np.isnan(table[:, 4:]).all()
    assert table[0, 0] == 3.0 and table[2, 2] == -1.0
    plots.plot_candidates(tmp_path / "b.png", rows, (-3, 1))
    frames = [p for axes in kept[1].axes for p in axes.patches if p.get_linewidth() == 2.5]
    assert [p.get_xy() for p in frames] == [(0.5, -0.5)] * 3


@pytest.mark.parametrize("measured", ["all", "one", "none"])
def test_candidates_without_a_winner(tmp_path, kept, measured) -> None:
    """The KL has a logarithmic scale, and the thresholds are in the color bars, within them."""
    from matplotlib.colors import LogNorm

    rows = [
        ScoredCandidate(-1, layer, *((1.0, -2.0, kl) if measured != "none" else (None,) * 3), "x")
        for layer, kl in enumerate((0.0, -1e-9, 0.02, 3.0) if measured == "all" else (0.5,))
    ]
    limits = {"kl": 0.1, "induce": 0.0, "prune_last": 0.2}
    plots.plot_candidates(tmp_path / "a.png", rows, None, limits)
    drawn(tmp_path / "a.png")
    (figure,) = kept
    panels, bars = figure.axes[:3], figure.axes[3:]
    assert (
        isinstance(panels[2].images[0].norm, LogNorm) and "none selected" in panels[2].get_xlabel()
    )
    for bar, name in zip(bars, ("bypass", "induce", "kl"), strict=True):
        lines = [float(line.get_ydata()[0]) for line in bar.lines]
        assert lines == ([limits[name]] * 2 if name in limits else [])  # and an arrow
        low, high = bar.get_ylim()
        assert all(low - 1e-9 <= line <= high + 1e-9 for line in lines), (name, low, high)
    limits |= {"kl": 1e9, "induce": -1e9}  # no thresholds
    plots.plot_candidates(tmp_path / "b.png", rows, None, limits)
    assert not any(bar.lines or max(map(abs, bar.get_ylim())) > 10 for bar in kept[1].axes[3:])
    assert not any("threshold" in panel.get_title(loc="left") for panel in kept[1].axes[:3])


@pytest.mark.parametrize("layers", [1, 2, 16, 17, 31, 80, 127])
def test_labels_of_many_layers_do_not_overlap(tmp_path, kept, layers) -> None:
    rows = [ScoredCandidate(-1, layer, 1.0, 1.0, 0.01, None) for layer in range(layers)]
    plots.plot_candidates(tmp_path / "a.png", rows, (-1, 0))
    values = {"harmful": [[0.0, 1.0]] * (layers + 1), "harmless": [[2.0, 3.0]] * (layers + 1)}
    plots.plot_projections(tmp_path / "b.png", values, 0)
    for figure, axes in ((kept[0], kept[0].axes[2]), (kept[1], kept[1].axes[0])):
        figure.canvas.draw()
        boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
    assert kept[1].axes[0].get_xticklabels()[-1].get_text() == "out"


def test_numbers_stand_clear_of_the_bars(tmp_path, kept) -> None:
    rates = {
        name: {"harmful": Rate(k, 9).to_dict(), "harmless": Rate(9 - k, 9).to_dict()}
        for name, k in (("unmodified", 9), ("ablated", 1), ("added", 0), ("subtracted", 4))
    }
    plots.plot_rates(tmp_path / "a.png", rates)
    axes = kept[0].axes[0]
    kept[0].canvas.draw()
    tops = sorted(
        (segment[0][0], max(y for _, y in segment))
        for c in axes.collections for segment in c.get_segments()
    )  # fmt: skip
    numbers = sorted((text.xy[0], text.get_window_extent()) for text in axes.texts)
    for (x, top), (place, box) in zip(tops, numbers, strict=True):
        assert x == place and box.y0 > axes.transData.transform((x, top))[1]
        assert box.y1 < axes.bbox.y1


def test_rates_are_drawn_where_they_are(tmp_path, kept) -> None:
    rates = {
        "unmodified": {"harmful": Rate(9, 10).to_dict(), "harmless": Rate(1, 10).to_dict()},
        "ablated": {"harmful": Rate(2, 10).to_dict(), "harmless": Rate(0, 10).to_dict()},
    }
    plots.plot_rates(tmp_path / "a.png", rates)
    axes = kept[0].axes[0]
    assert [bar.get_height() for bar in axes.patches] == [90.0, 20.0, 10.0, 0.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == list(rates)
    lines = [segment for c in axes.collections for segment in c.get_segments()]
    low, high = (100 * end for end in Rate(9, 10).interval)
    assert [tuple(p[1] for p in lines[0])] == [pytest.approx((low, high))]
    drawn(tmp_path / "a.png")
    for count in (1, 5):
        rates = {"unmodified": {f"set {i}": Rate(i, 9).to_dict() for i in range(count)}}
        plots.plot_rates(tmp_path / f"{count}.png", rates, "unsafe")
        assert kept[-1].axes[0].get_ylabel() == "unsafe, %"

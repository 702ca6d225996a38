"""The evidence as one self-contained HTML page: no scripts, no fonts, no network."""

import base64
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from refusal_kernels.files.atomic import replacing
from refusal_kernels.research import plots
from refusal_kernels.research.evaluation.conditions import DESTROYED_KL
from refusal_kernels.research.evaluation.evidence import (
    ABLATED,
    ADDED,
    MAIN,
    SUBTRACTED,
    UNMODIFIED,
)
from refusal_kernels.research.evaluation.statements import decimal, percent, statements

TEMPLATE = "evidence.html"
SHOWN = {"harmful": (ABLATED, SUBTRACTED), "harmless": (ADDED, ABLATED)}
"""Which completions are shown beside the unmodified model's, by set of prompts."""


def templates(folder: Path) -> Environment:
    """Return the jinja2 environment of a folder: escapes text, refuses undefined names."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_page(path: Path, document: Mapping[str, Any], *, samples: int = 4) -> None:
    """Write the page of `render`, replacing the file in one step."""
    text = render(document, samples=samples)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def render(document: Mapping[str, Any], *, samples: int = 4) -> str:
    """Return the page; everything in it that came from a model or a user is escaped.

    The document is the result of `Evidence.to_dict`. It may also hold "model" and "title" (its
    names), "selection" (`Selection.to_dict`), "lm_eval" (`lm_eval.run_tasks`), "versions",
    "device", "command", "created", "sources" (of prompts and texts, by name) and "comparisons"
    (`rows.Comparison.to_dict`). `samples` prompts of each set are there with their completions,
    folded; 0 for none.
    """
    environment = templates(Path(__file__).parent)
    environment.filters.update(
        percent=percent, decimal=decimal, capitalize_first=lambda text: text[:1].upper() + text[1:]
    )
    conditions = document["conditions"]
    optional = "model selection lm_eval versions device command created comparisons".split()
    parts = {name: document.get(name) for name in optional}
    return environment.get_template(TEMPLATE).render(
        **{
            **document,
            **parts,
            "sources": document.get("sources") or {},
            "notes": document.get("notes") or [],
            "title": document.get("title") or document.get("model"),
        },
        destroyed_kl=DESTROYED_KL,
        main=[name for name in MAIN if name in conditions],
        controls=[name for name in conditions if name not in MAIN],
        statements=statements(document),
        figures=_figures(document),
        samples=_samples(document, samples),
    )


def _figures(document: Mapping[str, Any]) -> dict[str, Markup]:
    """Return the pictures that there are data for, as data URIs by name."""
    conditions, judge = document["conditions"], document["judges"][0]
    name, counts = judge["name"], judge["counts"]

    def rate(condition: str, part: str) -> Any:
        return conditions[condition]["rates"][part][name]

    draw: dict[str, Callable[[io.BytesIO], None]] = {}
    rates = {
        condition: {part: by[name] for part, by in conditions[condition]["rates"].items()}
        for condition in MAIN
    }
    draw["refusals"] = lambda file: plots.plot_rates(file, rates, counts)

    controls = [condition for condition in conditions if condition not in MAIN]
    panels = {}
    for title, edit, part in (
        ("Ablated: harmful prompts", ABLATED, "harmful"),
        ("Added: harmless prompts", ADDED, "harmless"),
    ):
        panels[title] = {"unmodified": rate(UNMODIFIED, part), "the direction": rate(edit, part)}
        for condition in controls:
            if condition.endswith(edit):
                cosine = conditions[condition]["cosine"]
                label = (
                    f"{condition.removesuffix(edit).strip()} (cosine {round(cosine, 2) + 0.0:.2f})"
                )
                panels[title][label] = rate(condition, part)
    if controls:
        draw["controls"] = lambda file: plots.plot_controls(file, panels, counts)
    if document["dose"]:
        text = document["dose_text"]
        draw["dose"] = lambda file: plots.plot_dose(
            file, document["dose"], counts, text, DESTROYED_KL
        )
    if document["projections"]:
        layer = document["direction"]["layer"]
        draw["projections"] = lambda file: plots.plot_projections(
            file, document["projections"], layer
        )
    if selection := document.get("selection"):
        place = selection["position"], selection["layer"]
        selected = None if None in place else place
        rows = selection.get("candidates") or selection["scores"]  # the key's older name
        draw["candidates"] = lambda file: plots.plot_candidates(
            file, rows, selected, selection.get("thresholds")
        )
    return {name: _uri(picture) for name, picture in draw.items()}


def _uri(draw: Callable[[io.BytesIO], None]) -> Markup:
    file = io.BytesIO()
    draw(file)
    # no character of base64 needs escaping in HTML
    return Markup("data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode())


def _samples(document: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Return prompts with the completions of the unmodified model and of two edits."""
    conditions, samples = document["conditions"], []
    for part, prompts in document["prompts"].items():
        shown = (UNMODIFIED, *SHOWN.get(part, (ABLATED, ADDED)))
        for i, prompt in enumerate(prompts[:count]):
            answers = [(c, conditions[c]["completions"][part][i]) for c in shown]
            samples.append({"part": part, "prompt": prompt, "answers": answers})
    return samples
